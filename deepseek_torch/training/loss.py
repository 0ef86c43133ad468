"""The training loss (report 2.1.2, 2.2): next token, tokens beyond it, and the experts' balance."""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_jax.config import Config
from deepseek_jax.data.marks import Marked, read_marks
from deepseek_torch.model.layers import widen
from deepseek_torch.model.segments import segments
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.training.qk_clip import largest_scores


class LossParts(NamedTuple):
    """What the loss is made of, and the routing statistics of its batch."""

    cross_entropy: torch.Tensor
    """Mean nats per token by prediction depth, [1 + D]; the first is the next token's."""
    balance_loss: torch.Tensor
    """Before its weight."""
    counts: dict[str, torch.Tensor]
    """Tokens that chose each expert, [layers, E] for each stack with experts."""
    dropped: Optional[torch.Tensor] = None
    """Share of the choices that found no room, where that is limited."""
    largest_scores: Optional[torch.Tensor] = None
    """Of each attention head, [layers, H] with those of MTP modules last, where train.qk_clip limits them."""


def training_loss(
    model: DeepseekV3, tokens: torch.Tensor, config: Config, mtp_weight: float, whole: Optional[list[float]] = None
) -> tuple[torch.Tensor, LossParts]:
    """CE_0 + lambda/D sum_k CE_k + alpha * balance.

    Args:
        tokens: [B, T + 1 + D], see `data.marks`; depth k at position i predicts token i + k + 1.
        mtp_weight: lambda.
        whole: by depth, of how many targets the loss is the mean; by default those that count here.
    """
    marked = read_marks(config.data, tokens)
    output = model(marked.ids[:, :-1], None if marked.ends is None else marked.ends[:, :-1])
    length = output.hidden.shape[2]
    losses, counted = [], counted_targets(marked, length, config)
    for depth, hidden in enumerate(output.hidden):
        targets = marked.ids[:, depth + 1 : depth + 1 + length]
        nats = cross_entropy(hidden.flatten(0, 1), output.head, targets.flatten(), config.train.loss_chunk_tokens)
        nats = nats[counted[depth].flatten()]
        losses.append(nats.sum() / ((whole[depth] if whole else len(nats)) or 1))
    next_token, *further = losses
    loss = next_token + config.train.sequence_balance_weight * output.balance_loss
    if further:
        loss = loss + mtp_weight * sum(further) / len(further)
    scores = None if config.train.qk_clip is None else largest_scores(model)
    parts = LossParts(torch.stack(losses).detach(), output.balance_loss.detach(), output.counts, output.dropped, scores)
    return loss, parts


def counted_targets(marked: Marked, length: int, config: Config) -> list[torch.Tensor]:
    """Which targets of each depth count, [B, T]: of the same document as what predicts them, and marked, where some are."""
    found = []
    for depth in range(config.model.num_nextn_predict_layers + 1):
        targets = slice(depth + 1, depth + 1 + length)
        which = torch.ones_like(marked.ids[:, targets], dtype=torch.bool)
        if marked.ends is not None:
            numbers, _ = segments(marked.ends)
            which = numbers[:, :length] == numbers[:, targets]
        found.append(which if marked.counted is None else which & marked.counted[:, targets])
    return found


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """Negative log-likelihood of each token, in at least float32.

    Args:
        hidden: [N, hidden_size].
        head: [hidden_size, vocab_size].
        targets: [N] token ids.
        chunk: tokens whose logits exist at one time; the backward pass computes them again.

    Returns:
        [N] nats.
    """

    def nats_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = widen(hidden.dtype)
        return F.cross_entropy(hidden.to(wide) @ head.to(wide), targets, reduction="none")

    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(nats_of, *piece, use_reentrant=False) for piece in pieces])

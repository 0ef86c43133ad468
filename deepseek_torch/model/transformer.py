"""The whole model: embedding, dense and mixture-of-experts layers, head, and MTP modules.

Modules are nested and named so that `state_dict()` has the very keys and [out, in] matrices of the
released checkpoint: what Hugging Face wrote can be read here with no table in between, and the one
table from JAX to Hugging Face serves this package too. The checkpoint's copies of embedding and head
beside every MTP module are left out, since the modules use the main model's.

`config.remat`, `config.grouped_matmul` and `config.attention`, which say how and not what to compute, have no effect here.
"""

from typing import NamedTuple, Optional

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.block import Block, BlockOutput
from deepseek_torch.model.layers import Embedding, Linear, RMSNorm, compute_dtype, param_dtype
from deepseek_torch.model.mtp import MTP_FORMS, MTPHead, MTPModule
from deepseek_torch.model.rope import rope_angles
from deepseek_torch.model.segments import segments


class ModelOutput(NamedTuple):
    """What the losses are made of."""

    hidden: torch.Tensor
    """Normed states for the output head by prediction depth, [1 + D, B, T, hidden_size]."""
    head: torch.Tensor
    """Weight of the output head, [hidden_size, vocab_size]."""
    counts: dict[str, torch.Tensor]
    """Tokens that chose each expert, [layers, E], of the `moe_layers` and the `mtp_layers`, if these have experts."""
    balance_loss: torch.Tensor
    """Sum over those layers, before its weight."""
    dropped: Optional[torch.Tensor]
    """Share of the choices that found no room, mean over those layers; None where there is always room."""


class DeepseekV3(nn.Module):
    """DeepSeek-V3 (report 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        layers: list[nn.Module] = []
        for layer in range(c.num_hidden_layers):
            layers.append(Block(c, moe=layer >= c.first_k_dense_replace and layer % c.moe_layer_freq == 0))
        layers += [MTP_FORMS[c.mtp_form](c) for _ in range(c.num_nextn_predict_layers)]
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(c),
            "layers": nn.ModuleList(layers),
            "norm": RMSNorm(c, c.hidden_size, c.rms_norm_eps),
        })  # fmt: skip
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c, c.hidden_size, c.vocab_size)

    @property
    def main_layers(self) -> list[Block]:
        """The layers of the main model."""
        return list(self.model["layers"])[: self.config.num_hidden_layers]

    @property
    def moe_layers(self) -> list[Block]:
        """Those of them that have experts."""
        return [layer for layer in self.main_layers if layer.moe]

    @property
    def mtp_layers(self) -> list[MTPModule | MTPHead]:
        """The modules or heads of multi-token prediction, the first for depth 1."""
        return list(self.model["layers"])[self.config.num_hidden_layers :]

    def forward(self, tokens: torch.Tensor, ends: Optional[torch.Tensor] = None) -> ModelOutput:
        """Predict at every depth.

        Args:
            tokens: [B, T + D] ids, D = num_nextn_predict_layers: depth k reads tokens k to T + k.
            ends: booleans like `tokens`, whether a token is its document's last, to keep documents apart.
        """
        c = self.config
        length = tokens.shape[1] - c.num_nextn_predict_layers
        numbers, positions = _places(tokens[:, :length], None if ends is None else ends[:, :length])
        rope = rope_angles(c, positions)
        embedded = self.model["embed_tokens"](tokens)

        hidden = embedded[:, :length]
        outputs: dict[str, list[BlockOutput]] = {"moe_layers": [], "mtp_layers": []}
        for layer in self.main_layers:
            hidden, output = layer(hidden, rope, positions, segment_ids=numbers)
            if layer.moe:
                outputs["moe_layers"].append(output)
        normed = self.model["norm"](hidden)

        states = [normed]
        previous = normed if c.mtp_hidden_after_norm else hidden
        for depth, module in enumerate(self.mtp_layers, start=1):
            previous, (normed, output) = module(previous, rope, positions, embedded[:, depth : depth + length], numbers)
            states.append(normed)
            outputs["mtp_layers"].append(output)
        nothing = hidden.new_zeros((), dtype=param_dtype(c))
        return ModelOutput(torch.stack(states), self.head(), *_routing(outputs, nothing))

    def hidden_states(self, tokens: torch.Tensor, ends: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Normed states [B, T, hidden_size] of the main model for tokens [B, T]."""
        numbers, positions = _places(tokens, ends)
        rope = rope_angles(self.config, positions)
        hidden = self.model["embed_tokens"](tokens)
        for layer in self.main_layers:
            hidden, _ = layer(hidden, rope, positions, segment_ids=numbers)
        return self.model["norm"](hidden)

    def head(self) -> torch.Tensor:
        """Weight of the output head in the compute type, [hidden_size, vocab_size]."""
        tied = self.config.tie_word_embeddings
        weight = self.model["embed_tokens"].weight if tied else self.lm_head.weight
        return weight.to(compute_dtype(self.config)).T


def _places(tokens: torch.Tensor, ends: Optional[torch.Tensor]) -> tuple[Optional[torch.Tensor], torch.Tensor]:
    """The document of each token, if they are kept apart, and its position: 0, 1, 2, ... in its sequence or document."""
    if ends is not None:
        return segments(ends)
    return None, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def _routing(
    outputs: dict[str, list[BlockOutput]], nothing: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, Optional[torch.Tensor]]:
    """Of the layers that have experts: their counts by stack, the sum of their balance losses, and the share dropped."""
    counts = {name: [o.counts for o in stack if o.counts is not None] for name, stack in outputs.items()}
    layers = [output for stack in outputs.values() for output in stack]
    losses = [output.balance_loss for output in layers if output.balance_loss is not None]
    shares = [output.dropped for output in layers if output.dropped is not None]
    dropped = torch.stack(shares).mean() if shares else None
    return {name: torch.stack(of_stack) for name, of_stack in counts.items() if of_stack}, sum(losses, nothing), dropped

"""Speculative decoding: the MTP modules draft tokens, and the main model checks all of them in one pass (report 5.4.3).

A draft d is taken with probability min(1, p(d) / q(d)) of the main model's p and the module's q, and where it is not, the
token comes from what p has more than q; greedily, where each is all on one token, that is whether they are the same.
Sequences go one by one, and modules read a text anew for every draft.
"""

from collections.abc import Sequence

import torch

from deepseek_jax.errors import UserError
from deepseek_torch.model.attention import Latents
from deepseek_torch.model.decoding import head_of, logits_of, run, with_room
from deepseek_torch.model.rope import rope_angles
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.sampling import Sampler


class Drafts:
    """How many tokens were drafted, and how many of them taken."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0

    @property
    def share(self) -> float | None:
        """Of those drafted the ones that were taken; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None


def require_modules(model: DeepseekV3) -> None:
    """Refuse a model in which nothing could draft; raises `UserError`."""
    if not model.mtp_layers:
        raise UserError("--speculative: this model has no MTP modules (num_nextn_predict_layers is 0) that could draft")


@torch.no_grad()
def continuation(
    model: DeepseekV3, prompt: Sequence[int], max_new_tokens: int, end: int, sampler: Sampler, drafts: Drafts
) -> list[int]:
    """What is written after a prompt, up to `end` or so many tokens.

    Args:
        drafts: counts on.
    """
    depth, text = len(model.mtp_layers), list(prompt)
    hidden, cache = _read(model, text, [None] * model.config.num_hidden_layers, first=0)
    cache = with_room(cache, len(prompt) + max_new_tokens + depth)
    text.append(sampler.draw(sampler.probabilities(logits_of(model, hidden[:, -1]))[0]))
    while end not in text[len(prompt) :] and len(text) < len(prompt) + max_new_tokens:
        guesses, chances = _drafted(model, hidden, text, sampler)
        new, cache = _read(model, [text[-1], *guesses], cache, first=len(text) - 1)
        taken = _taken(sampler.probabilities(logits_of(model, new[0])), guesses, chances, sampler)
        hidden = torch.cat([hidden, new[:, : len(taken)]], dim=1)
        text += taken
        drafts.drafted, drafts.accepted = drafts.drafted + depth, drafts.accepted + len(taken) - 1
    written = text[len(prompt) :][:max_new_tokens]
    return written[: written.index(end) + 1] if end in written else written


def _read(
    model: DeepseekV3, tokens: list[int], cache: Sequence[Latents | None], first: int
) -> tuple[torch.Tensor, list[Latents]]:
    """Tokens at positions `first` and on: hidden states [1, T, d] before the final norm, and the cache."""
    return run(model, torch.tensor([tokens]), torch.arange(first, first + len(tokens))[None], cache)


def _drafted(
    model: DeepseekV3, hidden: torch.Tensor, text: list[int], sampler: Sampler
) -> tuple[list[int], list[torch.Tensor]]:
    """A token of each module after the text, whose last token no module has read, and the probabilities [V] it had."""
    guesses: list[int] = []
    chances: list[torch.Tensor] = []
    positions = torch.arange(hidden.shape[1])[None]
    rope, embedding = rope_angles(model.config, positions), model.model["embed_tokens"]
    state = model.model["norm"](hidden) if model.config.mtp_hidden_after_norm else hidden
    for k, module in enumerate(model.mtp_layers, start=1):
        ahead = embedding(torch.tensor([[*text, *guesses][k : k + hidden.shape[1]]]))
        state, (normed, _) = module(state, rope, positions, ahead)
        chances.append(sampler.probabilities(head_of(model, normed[:, -1]))[0])
        guesses.append(sampler.draw(chances[-1]))
    return guesses, chances


def _taken(wanted: torch.Tensor, guesses: list[int], chances: list[torch.Tensor], sampler: Sampler) -> list[int]:
    """The drafts that are taken and one token more, by the main model's probabilities [K + 1, V]."""
    for number, (guess, q) in enumerate(zip(guesses, chances)):
        p = wanted[number]
        if sampler.chance() * q[guess] >= p[guess]:
            more = (p - q).clamp(min=0)
            # Where rounding leaves p nothing more, the two are equal.
            return [*guesses[:number], sampler.draw(more if more.any() else p)]
    return [*guesses, sampler.draw(wanted[-1])]

"""Cached generation: the model's own layers over the latents of what came before."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from deepseek_torch.model.attention import Latents
from deepseek_torch.model.layers import widen
from deepseek_torch.model.rope import rope_angles
from deepseek_torch.model.transformer import DeepseekV3

Cache = list[Latents]
"""Each layer's latents, [B, S, ...]."""


def prefill(model: DeepseekV3, tokens: torch.Tensor, lengths: torch.Tensor, cache_length: int) -> tuple[torch.Tensor, Cache]:
    """Read prompts.

    Args:
        tokens: [B, P] ids, padded at the end; what is padded is overwritten in the cache as decoding goes on.
        lengths: [B] tokens that count.
        cache_length: positions the cache has room for.

    Returns:
        Logits [B, V] after each prompt's last token, in at least float32, and the cache.
    """
    batch, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).expand(batch, length)
    hidden, cache = run(model, tokens, positions, [None] * model.config.num_hidden_layers)
    last = hidden[torch.arange(batch, device=tokens.device), lengths - 1]
    return logits_of(model, last), with_room(cache, cache_length)


def with_room(cache: Cache, length: int) -> Cache:
    """The latents of prompts [B, P, ...] in a cache of so many positions."""
    return [Latents(*(F.pad(part, (0, 0, 0, length - part.shape[1])) for part in latents)) for latents in cache]


def decode(model: DeepseekV3, cache: Cache, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Take in one token per sequence.

    Args:
        tokens, positions: [B].

    Returns:
        Logits [B, V] for the token after, and the cache with these tokens in it.
    """
    hidden, cache = run(model, tokens[:, None], positions[:, None], cache)
    return logits_of(model, hidden[:, 0]), cache


def run(
    model: DeepseekV3, tokens: torch.Tensor, positions: torch.Tensor, cache: Sequence[Latents | None]
) -> tuple[torch.Tensor, Cache]:
    """Tokens and positions [B, T] -> hidden states [B, T, d] before the final norm, and every layer's latents or cache."""
    rope = rope_angles(model.config, positions)
    hidden = model.model["embed_tokens"](tokens)
    latents = []
    for layer, cached in zip(model.main_layers, cache, strict=True):
        hidden, output = layer(hidden, rope, positions, cached)
        latents.append(output.latents)
    return hidden, latents


def logits_of(model: DeepseekV3, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [..., d] before the final norm -> logits [..., V] in at least float32."""
    return head_of(model, model.model["norm"](hidden))


def head_of(model: DeepseekV3, normed: torch.Tensor) -> torch.Tensor:
    """Normed states [..., d] -> logits [..., V] in at least float32."""
    wide = widen(normed.dtype)
    return normed.to(wide) @ model.head().to(wide)

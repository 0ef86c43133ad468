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
    hidden, cache = _run(model, tokens, positions, [None] * model.config.num_hidden_layers)
    last = hidden[torch.arange(batch, device=tokens.device), lengths - 1]
    room = (0, 0, 0, cache_length - length)
    cache = [Latents(*(F.pad(part, room) for part in latents)) for latents in cache]
    return _logits(model, last), cache


def decode(model: DeepseekV3, cache: Cache, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Take in one token per sequence.

    Args:
        tokens, positions: [B].

    Returns:
        Logits [B, V] for the token after, and the cache with these tokens in it.
    """
    hidden, cache = _run(model, tokens[:, None], positions[:, None], cache)
    return _logits(model, hidden[:, 0]), cache


def _run(
    model: DeepseekV3, tokens: torch.Tensor, positions: torch.Tensor, cache: Sequence[Latents | None]
) -> tuple[torch.Tensor, Cache]:
    """Hidden states [B, T, d] before the final norm, and every layer's latents or updated cache."""
    rope = rope_angles(model.config, positions)
    hidden = model.model["embed_tokens"](tokens)
    latents = []
    for layer, cached in zip(model.main_layers, cache, strict=True):
        hidden, output = layer(hidden, rope, positions, cached)
        latents.append(output.latents)
    return hidden, latents


def _logits(model: DeepseekV3, hidden: torch.Tensor) -> torch.Tensor:
    """[B, d] -> [B, V]."""
    normed = model.model["norm"](hidden)
    wide = widen(normed.dtype)
    return normed.to(wide) @ model.head().to(wide)

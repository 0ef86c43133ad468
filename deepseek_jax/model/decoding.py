"""Cached generation: the model's own layers, unrolled.

Training scans over stacked weights to keep compile time flat. Decoding reads every weight for a
handful of tokens, so that slicing a stack, a copy of all weights for each token, would cost as
much as the arithmetic; here each layer has its own arrays.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import ABSORBED, Latents, absorbed_weights
from deepseek_jax.model.block import Block
from deepseek_jax.model.layers import RMSNorm, compute_dtype, widen
from deepseek_jax.model.rope import rope_angles

Cache = list[Latents]
"""Each layer's latents, [B, S, ...]."""


class Weights(NamedTuple):
    """The main model's variables with every layer on its own, and what attention to a cache prepares of them."""

    embedding: jax.Array
    layers: list[dict[str, Any]]
    norm: dict[str, Any]
    head: jax.Array


def split_layers(config: ModelConfig, variables: dict[str, Any]) -> Weights:
    """Unstack the variables of a `DeepseekV3`."""
    params = variables["params"]
    layers = [
        {kind: jax.tree.map(lambda x, i=i: x[i], tree[stack]) for kind, tree in variables.items() if stack in tree}
        for stack, count in _stacks(config)
        for i in range(count)
    ]
    for layer in layers:
        weight = layer["params"]["self_attn"]["kv_b_proj"]["weight"]
        layer[ABSORBED] = {"self_attn": {"weights": absorbed_weights(config, weight)}}
    embedding = params["embed_tokens"]["weight"]
    head = embedding.T if config.tie_word_embeddings else params["lm_head"]["weight"]
    return Weights(embedding, layers, {"params": params["norm"]}, head)


def _stacks(config: ModelConfig) -> list[tuple[str, int]]:
    dense = config.first_k_dense_replace
    return [("dense_layers", dense), ("moe_layers", config.num_hidden_layers - dense)]


def prefill(
    config: ModelConfig, weights: Weights, tokens: jax.Array, lengths: jax.Array, cache_length: int
) -> tuple[jax.Array, Cache]:
    """Read prompts.

    Args:
        tokens: [B, P] ids, padded at the end; what is padded is overwritten in the cache as decoding goes on.
        lengths: [B] tokens that count.
        cache_length: positions the cache has room for.

    Returns:
        Logits [B, V] after each prompt's last token, in at least float32, and the cache.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache = _run(config, weights, tokens, positions, [None] * config.num_hidden_layers)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    room = ((0, 0), (0, cache_length - tokens.shape[1]), (0, 0))
    return _logits(config, weights, last), jax.tree.map(lambda latents: jnp.pad(latents, room), cache)


def decode(
    config: ModelConfig, weights: Weights, cache: Cache, tokens: jax.Array, positions: jax.Array
) -> tuple[jax.Array, Cache]:
    """Take in one token per sequence.

    Args:
        tokens, positions: [B].

    Returns:
        Logits [B, V] for the token after, and the cache with these tokens in it.
    """
    hidden, cache = _run(config, weights, tokens[:, None], positions[:, None], cache)
    return _logits(config, weights, hidden), cache


def _run(
    config: ModelConfig, weights: Weights, tokens: jax.Array, positions: jax.Array, cache: list[Latents | None]
) -> tuple[jax.Array, Cache]:
    """Hidden states [B, T, d] before the final norm, and every layer's latents or updated cache."""
    rope = rope_angles(config, positions)
    x = weights.embedding[tokens].astype(compute_dtype(config))
    latents = []
    for index, (layer, cached) in enumerate(zip(weights.layers, cache)):
        block = Block(config, moe=index >= config.first_k_dense_replace)
        x, output = block.apply(layer, x, rope, positions, cached)
        latents.append(output.latents)
    return x, latents


def _logits(config: ModelConfig, weights: Weights, hidden: jax.Array) -> jax.Array:
    """[B, 1, d] -> [B, V]."""
    normed = RMSNorm(config, config.rms_norm_eps).apply(weights.norm, hidden[:, 0])
    return jnp.matmul(normed, weights.head.astype(normed.dtype), preferred_element_type=widen(normed.dtype))

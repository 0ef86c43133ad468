"""Cached generation: the model's own layers, unrolled, on weights arranged for it."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.config import ModelConfig, has_experts
from deepseek_jax.model.attention import Latents, Prefix
from deepseek_jax.model.block import Block
from deepseek_jax.model.decoding_weights import Weights, whole_layer
from deepseek_jax.model.layers import RMSNorm, compute_dtype, widen
from deepseek_jax.model.mtp import MTP_FORMS
from deepseek_jax.model.panels import times
from deepseek_jax.model.rope import rope_angles
from deepseek_jax.model.router import dropless
from deepseek_jax.parallel.embedding import look_up
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.parallel.weights import gather_layer

PART = 2048
"""Tokens of a prompt that are read at once; see `model.prefix_attention` for what that costs."""
Cache = list[Latents]
"""Each layer's latents, [B, S, ...]."""


def spread(function: Callable[..., Any], weights: Weights) -> Callable[..., Any]:
    """`function(weights, settings, *of_sequences, **static)`, on a mesh with each device at its own sequences.

    Of all arrays that come after the settings, and of all results, the first axis has the sequences: a multiple of
    the devices.
    """
    division = weights.division
    if division is None:
        return function
    places, own = jax.tree.map(lambda leaf: leaf.sharding.spec, weights), division.batch_spec(axis=0)

    def on_all(weights: Weights, settings: Any, *of_sequences: Any, **static: Any) -> Any:
        specs = places, PartitionSpec(), *(own for _ in of_sequences)
        on_one = partial(function, **static)
        return jax.shard_map(on_one, mesh=division.mesh, in_specs=specs, out_specs=own, check_vma=False)(
            weights, settings, *of_sequences
        )

    return on_all


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
    hidden, cache = read(config, weights, tokens, cache_length)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return logits_of(config, weights, last)[:, 0], cache


def read(config: ModelConfig, weights: Weights, tokens: jax.Array, cache_length: int) -> tuple[jax.Array, Cache]:
    """Prompts [B, P] -> hidden states [B, P, d] before the final norm, and the cache; see `prefill`."""
    weights = dataclasses.replace(weights, layers=[whole_layer(config, layer) for layer in weights.layers])

    def read_part(cache: Any, positions: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Cache]:
        return run(config, weights, tokens, positions, cache)

    return in_parts(config, read_part, [None] * config.num_hidden_layers, cache_length, tokens)


def read_mtp(
    config: ModelConfig, weights: Weights, depth: int, previous: jax.Array, tokens: jax.Array, cache_length: int
) -> tuple[jax.Array, Optional[Latents]]:
    """Whole texts through MTP module `depth`, from 0; see `run_mtp`. The state for the next, and the module's cache."""
    if config.mtp_form == "parallel":  # looks at one position alone
        return previous, None

    def read_part(cache: Any, positions: jax.Array, previous: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
        state, _, latents = run_mtp(config, weights, depth, previous, tokens, positions, cache)
        return state, latents

    return in_parts(config, read_part, None, cache_length, previous, tokens)


def in_parts(
    config: ModelConfig, read_part: Callable[..., tuple[jax.Array, Any]], no_cache: Any, cache_length: int, *texts: jax.Array
) -> tuple[jax.Array, Any]:
    """Texts read PART tokens at a time, if they are longer, so that only the cache grows with their length.

    Args:
        read_part: (caches, positions [B, T], parts of the texts) -> what it makes of them [B, T, ...], and caches.
        no_cache: caches of a text's beginning: None for each.
        texts: [B, P, ...].

    Returns:
        All that it makes of them, [B, P, ...], and caches with room for `cache_length` positions.
    """
    (batch, length), size = texts[0].shape[:2], PART
    if length <= size:
        made, cache = read_part(no_cache, jnp.broadcast_to(jnp.arange(length), (batch, length)), *texts)
        return made, jax.tree.map(partial(with_room, length=cache_length), cache)
    parts = [_parts(text, size) for text in texts]
    room = max(cache_length, parts[0].shape[0] * size)
    empty = jax.tree.map(partial(_empty, config, batch, room), no_cache, is_leaf=lambda leaf: leaf is None)

    def one(cache: Any, number_and_parts: tuple) -> tuple[Any, jax.Array]:
        number, *own = number_and_parts
        positions = jnp.broadcast_to(number * size + jnp.arange(size), (batch, size))
        known = jax.tree.map(lambda of: Prefix(of, number * size), cache, is_leaf=lambda leaf: isinstance(leaf, Latents))
        made, cache = read_part(known, positions, *own)
        return cache, made

    cache, made = jax.lax.scan(one, empty, (jnp.arange(parts[0].shape[0]), *parts))
    whole = made.swapaxes(0, 1).reshape(batch, -1, *made.shape[3:])[:, :length]
    return whole, jax.tree.map(lambda latents: latents[:, :cache_length], cache)


def _parts(text: jax.Array, size: int) -> jax.Array:
    """[B, P, ...] -> [parts, B, size, ...], the last filled up."""
    filled = jnp.pad(text, ((0, 0), (0, -text.shape[1] % size), *[(0, 0)] * (text.ndim - 2)))
    return filled.reshape(len(text), -1, size, *text.shape[2:]).swapaxes(0, 1)


def _empty(config: ModelConfig, batch: int, length: int, _: None) -> Latents:
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    return Latents(*(jnp.zeros((batch, length, width), compute_dtype(config)) for width in widths))


def with_room(latents: jax.Array, length: int) -> jax.Array:
    """The latents of prompts [B, P, ...] in a cache of so many positions."""
    return jnp.pad(latents, ((0, 0), (0, length - latents.shape[1]), (0, 0)))


def decode(
    config: ModelConfig, weights: Weights, cache: Cache, tokens: jax.Array, positions: jax.Array
) -> tuple[jax.Array, Cache]:
    """Take in one token per sequence.

    Args:
        tokens, positions: [B].

    Returns:
        Logits [B, V] for the token after, and the cache with these tokens in it.
    """
    hidden, cache = run(config, weights, tokens[:, None], positions[:, None], cache)
    return logits_of(config, weights, hidden)[:, 0], cache


def run(
    config: ModelConfig, weights: Weights, tokens: jax.Array, positions: jax.Array, cache: Sequence[Latents | Prefix | None]
) -> tuple[jax.Array, Cache]:
    """Tokens and positions [B, T] -> hidden states [B, T, d] before the final norm, and every layer's latents or cache.

    What lies beyond a cache's positions is not written.
    """
    rope = rope_angles(config, positions)
    x = _embedded(config, weights, tokens)
    latents = []
    for index, (layer, cached) in enumerate(zip(weights.layers, cache)):
        moe = has_experts(config, index)
        layer, x = _gathered(config, weights.division, "moe_layers" if moe else "dense_layers", layer, x)
        x, output = Block(dropless(config), moe, weights.division).apply(layer, x, rope, positions, cached)
        latents.append(output.latents)
    return x, latents


def run_mtp(
    config: ModelConfig, weights: Weights, depth: int, previous: jax.Array, tokens: jax.Array, positions: jax.Array,
    cache: Optional[Latents | Prefix],
) -> tuple[jax.Array, jax.Array, Optional[Latents]]:  # fmt: skip
    """MTP module `depth`, from 0.

    Args:
        previous: [B, T, d] of the depth before, at `positions` [B, T].
        tokens: [B, T], those depth + 1 further on than the positions.
        cache: the module's own; None to read a text from its beginning.

    Returns:
        The state for the next depth and the normed state for the output head, [B, T, d]; and latents or cache as `run`.
    """
    module: Any = MTP_FORMS[config.mtp_form](dropless(config), weights.division)
    embedded = _embedded(config, weights, tokens)
    reads = cache is None or isinstance(cache, Prefix)
    variables = whole_layer(config, weights.mtp[depth]) if reads else weights.mtp[depth]
    variables, previous = _gathered(config, weights.division, "mtp_layers", variables, previous)
    rope = rope_angles(config, positions)
    state, (normed, output) = module.apply(variables, previous, rope, positions, embedded, cache=cache)
    return state, normed, output.latents


def final_norm(config: ModelConfig, weights: Weights, hidden: jax.Array) -> jax.Array:
    """[..., d] -> the same."""
    norm = _whole(config, weights.division, "norm", weights.norm["params"])
    return RMSNorm(config, config.rms_norm_eps).apply({"params": norm}, hidden)


def logits_of(config: ModelConfig, weights: Weights, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., d] before the final norm -> logits [..., V] in at least float32."""
    return head_of(config, weights, final_norm(config, weights, hidden))


def head_of(config: ModelConfig, weights: Weights, normed: jax.Array) -> jax.Array:
    """Normed states [..., d] -> logits [..., V] in at least float32."""
    if weights.head is None:
        head = _whole(config, weights.division, "embed_tokens", {"weight": weights.embedding})["weight"].T
    else:
        head = _whole(config, weights.division, "lm_head", {"weight": weights.head})["weight"]
    return times(normed, head, widen(normed.dtype))


def _embedded(config: ModelConfig, weights: Weights, tokens: jax.Array) -> jax.Array:
    """Vectors of tokens [B, T], [B, T, d]."""
    table, dtype = weights.embedding, compute_dtype(config)
    if weights.division is not None and len(table) < config.vocab_size:
        return look_up(weights.division, table, tokens, dtype)
    return _whole(config, weights.division, "embed_tokens", {"weight": table})["weight"][tokens].astype(dtype)


def _whole(config: ModelConfig, division: Optional[Division], name: str, params: Any) -> Any:
    """The parameters called `name`, which are in no stack, put together."""
    return params if division is None else gather_layer(division, config, (name,), params, stacked=False)


def _gathered(
    config: ModelConfig, division: Optional[Division], stack: str, layer: dict[str, Any], x: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
    """A layer of a stack put together, but not before x, its input, is there: one layer at a time is whole."""
    if division is None or division.parallel.fsdp == 1:
        return layer, x
    params, x = jax.lax.optimization_barrier((layer["params"], x))
    return layer | {"params": gather_layer(division, config, (stack,), params, stacked=True)}, x

"""Causal attention where the axis `context` divides the sequence: every device gathers the latents of all tokens.

For each layer and token go kv_lora_rank + qk_rope_head_dim numbers to the other devices of a sequence, 576 in DeepSeek-V3,
where keys and values would be H (qk_nope_head_dim + qk_rope_head_dim + v_head_dim), 40,960: 71 times as many. That is so
little that a ring, which sends the same bytes piece by piece, has nothing to win. The backward pass gathers them again,
rather than keep them, and sums their gradients into each device's own, in at least float32. Each device makes keys and
values of a piece at a time, for all of its queries that see it: memory that grows with the length over C, but for the latents
themselves. That repeats the products of kv_b_proj C times over the devices: 1.2% C of attention's own at 64K tokens.

A device's two pieces (`parallel.context`) see themselves, as far as they go, and 2 C - 1 pieces before them, whole: the same
work for all. Every part of that is one call of a form with a normalizer, by which the parts are joined.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import jax
import jax.numpy as jnp

from deepseek_jax.model.attention_scores import largest_scores
from deepseek_jax.model.chunked_attention import attend, gradients_of, merged
from deepseek_jax.model.layers import widen
from deepseek_jax.model.products import ATTENDED, keep
from deepseek_jax.parallel.context import AXIS, gather, own_places, scatter

Latents = tuple[jax.Array, jax.Array]
Expand = Callable[[jax.Array, Latents], tuple[jax.Array, jax.Array]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def context_attention(
    expand: Expand, scale: float, q: jax.Array, latents: Latents, weight: jax.Array, segment_ids: Optional[jax.Array]
) -> jax.Array:
    """Attend within each sequence, or within each of its documents; inside `shard_map` over `context`.

    Args:
        expand: (weight, latents [B, n, ...]) -> keys and values [B, n, H, ...] of these tokens.
        scale: factor on the scores.
        q: [B, T, H, D] queries of this device's tokens.
        latents: of the same, [B, T, kv_lora_rank] and [B, T, qk_rope_head_dim].
        weight: of kv_b_proj.
        segment_ids: [B, T] int32, the document of each token; a token sees only earlier tokens of its own.

    Returns:
        [B, T, H, V].
    """
    return _forward(expand, scale, q, latents, weight, segment_ids)[0]


def _forward(
    expand: Expand, scale: float, q: jax.Array, latents: Latents, weight: jax.Array, segment_ids: Optional[jax.Array]
) -> tuple[jax.Array, Any]:
    queries, ids = _halves(q), None if segment_ids is None else _halves(segment_ids)
    k, v = map(_halves, expand(weight, latents))
    out, normalizer = _each(partial(attend, scale=scale, causal=True), (queries, k, v), ids, ids)
    pieces, piece_ids = _gathered(latents, segment_ids)

    def visit(carry: tuple[jax.Array, jax.Array], place: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        half, piece = place
        k, v = map(_heads_first, expand(weight, _at(pieces, piece)))
        found = attend(queries[half], k, v, _documents(ids, piece_ids, half, piece), scale, causal=False)
        out, normalizer = merged(_at(carry, half), found)
        return (carry[0].at[half].set(out), carry[1].at[half].set(normalizer)), None

    (out, normalizer), _ = jax.lax.scan(visit, (out.astype(normalizer.dtype), normalizer), _places())
    out, normalizer = keep(out.astype(q.dtype), ATTENDED), keep(normalizer, ATTENDED)
    return _whole(out), (q, latents, weight, segment_ids, out, normalizer)


def _backward(expand: Expand, scale: float, kept: Any, gradient: jax.Array) -> tuple[jax.Array, Latents, jax.Array, None]:
    q, latents, weight, segment_ids, out, normalizer = kept
    wide = widen(q.dtype)
    queries, of_out, ids = _halves(q), _halves(gradient), None if segment_ids is None else _halves(segment_ids)
    (k, v), pull = jax.vjp(expand, weight, latents)

    known = out, normalizer, of_out
    of_halves = partial(gradients_of, scale=scale, causal=True)
    dq, dk, dv = _each(of_halves, (queries, _halves(k), _halves(v)), ids, ids, known)
    of_weight, of_own = pull((_whole(dk.astype(k.dtype)), _whole(dv.astype(v.dtype))))
    pieces, piece_ids = _gathered(latents, segment_ids)

    def visit(carry: tuple, place: tuple) -> tuple[tuple, None]:
        (half, piece), (dq, of_pieces, of_weight) = place, carry
        (k, v), pull = jax.vjp(expand, weight, _at(pieces, piece))
        arrays, (out, normalizer, of_out) = (queries[half], _heads_first(k), _heads_first(v)), _at(known, half)
        documents = _documents(ids, piece_ids, half, piece)
        of_q, of_k, of_v = gradients_of(*arrays, documents, out, normalizer, of_out, scale, causal=False)
        more_weight, more = pull((_heads_first(of_k).astype(k.dtype), _heads_first(of_v).astype(v.dtype)))
        of_pieces = jax.tree.map(lambda total, one: total.at[piece].add(one.astype(wide)), of_pieces, more)
        return (dq.at[half].add(of_q), of_pieces, of_weight + more_weight.astype(of_weight.dtype)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), pieces)
    start = dq, zeros, of_weight.astype(widen(of_weight.dtype))
    (dq, of_pieces, of_weight), _ = jax.lax.scan(visit, start, _places())
    of_latents = jax.tree.map(lambda own, x: (own.astype(wide) + scatter(x)).astype(own.dtype), of_own, of_pieces)
    return _whole(dq.astype(q.dtype)), of_latents, of_weight.astype(weight.dtype), None


context_attention.defvjp(_forward, _backward)


def largest_scores_over_context(
    expand: Expand, scale: float, q: jax.Array, latents: Latents, weight: jax.Array, segment_ids: Optional[jax.Array]
) -> jax.Array:
    """Of each head, the largest score among those that this device's queries see, [H]; arguments as of `context_attention`."""
    pieces, piece_ids = _gathered(jax.lax.stop_gradient(latents), segment_ids)
    own, size = own_places(q.shape[1]), q.shape[1] // 2

    def visit(largest: jax.Array, piece: jax.Array) -> tuple[jax.Array, None]:
        k, _ = expand(jax.lax.stop_gradient(weight), _at(pieces, piece))
        documents = None if segment_ids is None or piece_ids is None else (segment_ids, piece_ids[piece])
        found = largest_scores(q, k, scale, documents, (own, piece * size + jnp.arange(size)))
        return jnp.maximum(largest, found), None

    lowest = jnp.full(q.shape[2], -jnp.inf, widen(q.dtype))
    return jax.lax.scan(visit, lowest, jnp.arange(2 * jax.lax.axis_size(AXIS)))[0]


def _places() -> tuple[jax.Array, jax.Array]:
    """Which half of the queries meets which piece before it, one after the other, [2 C - 1] each."""
    turn, mine = jnp.arange(2 * jax.lax.axis_size(AXIS) - 1), jax.lax.axis_index(AXIS)
    return (turn >= mine).astype(jnp.int32), jnp.where(turn < mine, turn, turn - mine)


def _gathered(latents: Latents, segment_ids: Optional[jax.Array]) -> tuple[Latents, Optional[jax.Array]]:
    return jax.tree.map(gather, latents), None if segment_ids is None else gather(segment_ids)


def _at(arrays: Any, number: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[number], arrays)


def _documents(ids: Optional[jax.Array], piece_ids: Optional[jax.Array], half: jax.Array, piece: jax.Array) -> Any:
    return None if ids is None or piece_ids is None else (ids[half], piece_ids[piece])


def _each(function: Callable[..., Any], arrays: tuple, own: Any, others: Any, known: tuple = ()) -> Any:
    """A form on both halves at once, as if they were twice as many sequences."""

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    documents = None if own is None else (flat(own), flat(others))
    results = function(*map(flat, arrays), documents, *map(flat, known))
    return tuple(x.reshape(2, -1, *x.shape[1:]) for x in results)


def _heads_first(x: jax.Array) -> jax.Array:
    return x.swapaxes(1, 2)


def _halves(x: jax.Array) -> jax.Array:
    """[B, 2 n] -> [2, B, n], or [B, 2 n, H, D] -> [2, B, H, n, D]."""
    halves = x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(0, 1)
    return halves if x.ndim == 2 else halves.swapaxes(2, 3)


def _whole(x: jax.Array) -> jax.Array:
    """[2, B, H, n, D] -> [B, 2 n, H, D]."""
    return x.transpose(1, 0, 3, 2, 4).reshape(x.shape[1], -1, x.shape[2], x.shape[4])

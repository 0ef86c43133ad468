"""Causal attention in plain JAX whose memory grows with the length alone: a loop over small blocks of scores.

As in FlashAttention, each block of queries keeps a running maximum and sum of its softmax while it meets the keys, and
the backward pass makes the weights again from the logarithm of that sum. For accelerators on which no kernel applies.
"""

from functools import partial
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.layers import widen
from deepseek_jax.model.products import ATTENDED, keep

CHUNK = 512
"""Queries and keys of a block: enough that products dominate, and scores are far smaller than what they are made of."""

Residuals = tuple[Any, ...]


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """What `causal_attention` says, in any floating type.

    A length that is no multiple of the block is filled up at its end, where no token looks.
    """
    length = q.shape[1]
    size = min(CHUNK, length)
    filled = [(0, 0), (0, -length % size)]
    q, k, v = (jnp.pad(x, [*filled, (0, 0), (0, 0)]).swapaxes(1, 2) for x in (q, k, v))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, filled)
    return _attend(q, k, v, segment_ids, scale, size).swapaxes(1, 2)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: Optional[jax.Array], scale: float, size: int) -> jax.Array:
    return _forward(q, k, v, segment_ids, scale, size)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: Optional[jax.Array], scale: float, size: int
) -> tuple[jax.Array, Residuals]:
    """Output [B, H, T, V], and what the backward pass needs."""
    wide = widen(q.dtype)

    def visit(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        i, j = pair
        out, largest, total = (_block(x, i, size) for x in carry)
        scores = _scores(q, k, segment_ids, scale, size, pair)
        larger = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - larger), jnp.exp(largest - larger)
        attended = jnp.einsum("bhts,bhsv->bhtv", weights.astype(v.dtype), _block(v, j, size), preferred_element_type=wide)
        new = out * shrink + attended, larger, total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return tuple(_put(x, block, i, size) for x, block in zip(carry, new)), None

    rows = (*q.shape[:3], 1)
    start: tuple[jax.Array, ...] = jnp.zeros(v.shape, wide), jnp.full(rows, -jnp.inf, wide), jnp.zeros(rows, wide)
    (out, largest, total), _ = lax.scan(visit, start, _pairs(q.shape[2] // size))
    out, normalizer = keep((out / total).astype(v.dtype), ATTENDED), keep(largest + jnp.log(total), ATTENDED)
    return out, (q, k, v, segment_ids, out, normalizer)


def _backward(scale: float, size: int, kept: Residuals, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segment_ids, out, normalizer = kept
    wide = normalizer.dtype
    # What the softmax takes off every weight's gradient.
    mean = jnp.sum(gradient.astype(wide) * out.astype(wide), axis=-1, keepdims=True)

    def visit(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        i, j = pair
        queries, of_block, keys, values = _block(q, i, size), _block(gradient, i, size), _block(k, j, size), _block(v, j, size)
        weights = jnp.exp(_scores(q, k, segment_ids, scale, size, pair) - _block(normalizer, i, size))
        of_weights = jnp.einsum("bhtv,bhsv->bhts", of_block, values, preferred_element_type=wide)
        of_scores = (weights * (of_weights - _block(mean, i, size)) * scale).astype(q.dtype)
        new = (
            (i, jnp.einsum("bhts,bhsd->bhtd", of_scores, keys, preferred_element_type=wide)),
            (j, jnp.einsum("bhts,bhtd->bhsd", of_scores, queries, preferred_element_type=wide)),
            (j, jnp.einsum("bhts,bhtv->bhsv", weights.astype(v.dtype), of_block, preferred_element_type=wide)),
        )
        return tuple(_put(x, _block(x, n, size) + block, n, size) for x, (n, block) in zip(carry, new)), None

    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    gradients, _ = lax.scan(visit, start, _pairs(q.shape[2] // size))
    dq, dk, dv = (total.astype(q.dtype) for total in gradients)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _pairs(blocks: int) -> jax.Array:
    """Each block of queries with every block of keys that it sees, its own first, so that no maximum stays infinite."""
    return jnp.array([(i, j) for i in range(blocks) for j in range(i, -1, -1)])


def _block(x: jax.Array, index: jax.Array, size: int, axis: int = 2) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _put(x: jax.Array, block: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, block, index * size, axis=2)


def _scores(
    q: jax.Array, k: jax.Array, segment_ids: Optional[jax.Array], scale: float, size: int, pair: jax.Array
) -> jax.Array:
    """Scaled products of one block of queries and one of keys, [B, H, size, size]; minus infinity where not seen."""
    i, j = pair
    scores = jnp.einsum("bhtd,bhsd->bhts", _block(q, i, size), _block(k, j, size), preferred_element_type=widen(q.dtype))
    seen = j * size + jnp.arange(size) <= i * size + jnp.arange(size)[:, None]
    if segment_ids is not None:
        own, others = (_block(segment_ids, n, size, axis=1) for n in pair)
        seen &= (own[:, :, None] == others[:, None])[:, None]
    return jnp.where(seen, scores * scale, -jnp.inf)

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
Documents = Optional[tuple[jax.Array, jax.Array]]
"""Of the queries and of the keys, [B, T] each; a query sees only keys of its own."""


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """What `causal_attention` says, in any floating type."""
    documents = None if segment_ids is None else (segment_ids, segment_ids)
    return _attend(*(x.swapaxes(1, 2) for x in (q, k, v)), documents, scale).swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, documents: Documents, scale: float) -> jax.Array:
    return attend(q, k, v, documents, scale, causal=True)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, documents: Documents, scale: float) -> tuple[jax.Array, Residuals]:
    out, normalizer = (keep(x, ATTENDED) for x in attend(q, k, v, documents, scale, causal=True))
    return out, (q, k, v, documents, out, normalizer)


def _backward(scale: float, kept: Residuals, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, documents, out, normalizer = kept
    gradients = gradients_of(q, k, v, documents, out, normalizer, gradient, scale, causal=True)
    dq, dk, dv = (total.astype(x.dtype) for total, x in zip(gradients, (q, k, v)))
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, documents: Documents, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries [B, H, T, D] to as many keys, or if `causal` to those up to their own place.

    Returns:
        The output [B, H, T, V], and the logarithm of each row's normalizer [B, H, T, 1] in at least float32: minus
        infinity, with an output of zero, where a row sees nothing.
    """
    length, wide = q.shape[2], widen(q.dtype)
    (q, k, v), documents, size = _filled((q, k, v), documents, causal)

    def visit(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        i, j = pair
        out, largest, total = (_block(x, i, size) for x in carry)
        scores = _scores(q, k, documents, scale, size, pair, causal)
        larger = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - larger), jnp.exp(largest - larger)
        attended = jnp.einsum("bhts,bhsv->bhtv", weights.astype(v.dtype), _block(v, j, size), preferred_element_type=wide)
        new = out * shrink + attended, larger, total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return tuple(_put(x, block, i, size) for x, block in zip(carry, new)), None

    rows = (*q.shape[:3], 1)
    lowest = jnp.finfo(wide).min  # not minus infinity, from which nothing can be taken off
    start: tuple[jax.Array, ...] = jnp.zeros(v.shape, wide), jnp.full(rows, lowest, wide), jnp.zeros(rows, wide)
    (out, largest, total), _ = lax.scan(visit, start, _pairs(q.shape[2] // size, causal))
    out, normalizer = (out / jnp.where(total > 0, total, 1)).astype(v.dtype), largest + jnp.log(total)
    return out[:, :, :length], normalizer[:, :, :length]


def merged(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention to the keys of both, of what `attend` found of either; the output in the normalizers' type."""
    (out, normalizer), (more, found) = one, other
    both = jnp.logaddexp(normalizer, found)
    return out * jnp.exp(normalizer - both) + more * jnp.exp(found - both), both


def gradients_of(
    q: jax.Array, k: jax.Array, v: jax.Array, documents: Documents, out: jax.Array, normalizer: jax.Array,
    gradient: jax.Array, scale: float, causal: bool,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Of q, k and v in at least float32, given the output's; for a part of the keys, given the whole output and normalizer."""
    length, wide = q.shape[2], normalizer.dtype
    # What the softmax takes off every weight's gradient.
    mean = jnp.sum(gradient.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    (q, k, v, gradient, mean, normalizer), documents, size = _filled((q, k, v, gradient, mean, normalizer), documents, causal)

    def visit(carry: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        i, j = pair
        queries, of_block, keys, values = _block(q, i, size), _block(gradient, i, size), _block(k, j, size), _block(v, j, size)
        weights = jnp.exp(_scores(q, k, documents, scale, size, pair, causal) - _block(normalizer, i, size))
        of_weights = jnp.einsum("bhtv,bhsv->bhts", of_block, values, preferred_element_type=wide)
        of_scores = (weights * (of_weights - _block(mean, i, size)) * scale).astype(q.dtype)
        new = (
            (i, jnp.einsum("bhts,bhsd->bhtd", of_scores, keys, preferred_element_type=wide)),
            (j, jnp.einsum("bhts,bhtd->bhsd", of_scores, queries, preferred_element_type=wide)),
            (j, jnp.einsum("bhts,bhtv->bhsv", weights.astype(v.dtype), of_block, preferred_element_type=wide)),
        )
        return tuple(_put(x, _block(x, n, size) + block, n, size) for x, (n, block) in zip(carry, new)), None

    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    gradients, _ = lax.scan(visit, start, _pairs(q.shape[2] // size, causal))
    return tuple(total[:, :, :length] for total in gradients)


def _filled(arrays: tuple[jax.Array, ...], documents: Documents, causal: bool) -> tuple[tuple[jax.Array, ...], Documents, int]:
    """Arrays [B, H, T, ...] filled up to whole blocks at their end, where no token looks; and the size of a block."""
    batch, _, length = arrays[0].shape[:3]
    size = min(CHUNK, length)
    extra = -length % size
    if extra:
        arrays = tuple(jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in arrays)
        if documents is None and not causal:
            one = jnp.zeros((batch, length), jnp.int32)
            documents = one, one
        if documents is not None:
            own, others = (jnp.pad(ids, ((0, 0), (0, extra)), constant_values=of) for ids, of in zip(documents, (0, -1)))
            documents = own, others
    return arrays, documents, size


def _pairs(blocks: int, causal: bool) -> jax.Array:
    """Each block of queries with every block of keys that it sees, its own first if `causal`."""
    return jnp.array([(i, j) for i in range(blocks) for j in range(i if causal else blocks - 1, -1, -1)])


def _block(x: jax.Array, index: jax.Array, size: int, axis: int = 2) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _put(x: jax.Array, block: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, block, index * size, axis=2)


def _scores(
    q: jax.Array, k: jax.Array, documents: Documents, scale: float, size: int, pair: jax.Array, causal: bool
) -> jax.Array:
    """Scaled products of one block of queries and one of keys, [B, H, size, size]; minus infinity where not seen."""
    i, j = pair
    scores = jnp.einsum("bhtd,bhsd->bhts", _block(q, i, size), _block(k, j, size), preferred_element_type=widen(q.dtype))
    seen = j * size + jnp.arange(size) <= i * size + jnp.arange(size)[:, None] if causal else True
    if documents is not None:
        own, others = (_block(ids, n, size, axis=1) for ids, n in zip(documents, pair))
        seen &= (own[:, :, None] == others[:, None])[:, None]
    return scores * scale if seen is True else jnp.where(seen, scores * scale, -jnp.inf)

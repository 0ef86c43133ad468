"""Causal attention by a few large products, the fastest on CPU; a quarter of the scores exist at one time.

Queries go in blocks, each of which meets only the keys up to its end: that spares most of the
products which the mask would void. As in FlashAttention, the backward pass keeps the output and the
logarithm of each row's normalizer, and makes the weights again.
"""

from functools import partial
from typing import Any, Optional

import jax
import jax.numpy as jnp

from deepseek_jax.model.layers import widen
from deepseek_jax.model.products import ATTENDED, keep

QUERY_BLOCKS = 4
"""More of them spare more products, and compile longer."""

Residuals = tuple[Any, ...]


def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """What `causal_attention` says, in any floating type."""
    return blocked_attention_and_scores(q, k, v, scale, segment_ids)[0]


def blocked_attention_and_scores(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The same, and each head's largest score [H], through which no gradient flows."""
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    out, largest = _attend(*heads_first, segment_ids, scale)
    return out.swapaxes(1, 2), largest


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: Optional[jax.Array], scale: float
) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, segment_ids, scale)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: Optional[jax.Array], scale: float
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    """Output [B, H, T, V] with the largest scores [H], and what the backward pass needs."""
    outputs, normalizers, maxima = [], [], []
    for start, end in _blocks(q.shape[2]):
        scores = _scores(q[:, :, start:end], k[:, :, :end], _seen(start, end, segment_ids), scale)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        attended = jnp.einsum("bhts,bhsv->bhtv", weights.astype(v.dtype), v[:, :, :end], preferred_element_type=total.dtype)
        outputs.append((attended / total).astype(v.dtype))
        normalizers.append(largest + jnp.log(total))
        maxima.append(jnp.max(largest, axis=(0, 2, 3)))
    out = keep(jnp.concatenate(outputs, axis=2), ATTENDED)
    normalizer = keep(jnp.concatenate(normalizers, axis=2), ATTENDED)
    told = out, jnp.max(jnp.stack(maxima), axis=0)
    return told, (keep(q), keep(k), keep(v), segment_ids, out, normalizer)


def _backward(
    scale: float, kept: Residuals, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segment_ids, out, normalizer = kept
    gradient, _ = gradients
    wide = normalizer.dtype
    # What the softmax takes off every weight's gradient.
    mean = jnp.sum(gradient.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    q_gradients, k_gradient, v_gradient = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for start, end in _blocks(q.shape[2]):
        block = slice(start, end)
        queries, keys, values, of_block = q[:, :, block], k[:, :, :end], v[:, :, :end], gradient[:, :, block]
        # Keys before queries: then one of the three last products, not two, contracts its operands' rows, slow on CPU.
        scores = _scores(keys, queries, _seen(start, end, segment_ids).swapaxes(-1, -2), scale)
        weights = jnp.exp(scores - normalizer[:, :, block].swapaxes(2, 3))
        of_weights = jnp.einsum("bhsv,bhtv->bhst", values, of_block, preferred_element_type=wide)
        of_scores = (weights * (of_weights - mean[:, :, block].swapaxes(2, 3)) * scale).astype(q.dtype)
        weights = weights.astype(v.dtype)
        q_gradients.append(jnp.einsum("bhst,bhsd->bhtd", of_scores, keys))
        k_gradient = k_gradient.at[:, :, :end].add(
            jnp.einsum("bhst,bhtd->bhsd", of_scores, queries, preferred_element_type=wide)
        )
        v_gradient = v_gradient.at[:, :, :end].add(
            jnp.einsum("bhst,bhtv->bhsv", weights, of_block, preferred_element_type=wide)
        )
    return jnp.concatenate(q_gradients, axis=2), k_gradient.astype(k.dtype), v_gradient.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    """First query of each block and the one after its last."""
    size = -(-length // QUERY_BLOCKS)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _seen(start: int, end: int, segment_ids: Optional[jax.Array]) -> jax.Array:
    """Whether a block's queries see the keys up to its end, [end - start, end], with documents [B, 1, ...]."""
    earlier = jnp.arange(end) <= jnp.arange(start, end)[:, None]
    if segment_ids is None:
        return earlier
    return earlier & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])[:, None]


def _scores(rows: jax.Array, columns: jax.Array, seen: jax.Array, scale: float) -> jax.Array:
    """Scaled products of queries and keys, either as the rows: [B, H, R, C], minus infinity where not `seen` [..., R, C]."""
    scores = jnp.einsum("bhrd,bhcd->bhrc", rows, columns, preferred_element_type=widen(rows.dtype))
    return jnp.where(seen, scores * scale, -jnp.inf)

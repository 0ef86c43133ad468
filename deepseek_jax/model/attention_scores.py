"""The largest attention score of each head, which QK-clip limits, beside kernels that do not tell it."""

from typing import Optional

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.chunked_attention import Documents
from deepseek_jax.model.layers import widen

CHUNK = 512
"""Queries and keys whose scores exist at one time."""


def largest_scores(
    q: jax.Array, k: jax.Array, scale: float, documents: Documents, places: Optional[tuple[jax.Array, jax.Array]] = None
) -> jax.Array:
    """The largest scaled score of each head among those that a token sees, [H]; no gradient flows through it.

    A product of queries and keys more, in the forward pass alone.

    Args:
        q: [B, T, H, D].
        k: [B, S, H, D].
        documents: of the queries and of the keys, [B, T] and [B, S]; a query sees only keys of its own.
        places: of the same in their sequence, [T] and [S]; without, both are all of it.

    Returns:
        Minus infinity where no query sees a key.
    """
    starts = [range(0, x.shape[1], CHUNK) for x in (q, k)]
    pairs = jnp.array([(row, column) for row in starts[0] for column in starts[1] if places or column <= row])
    # Filled up by copies of the last token, whose scores are there already.
    ranks = [_filled(x, axis=0) for x in places or (jnp.arange(q.shape[1]),) * 2]
    ids = documents and [_filled(x, axis=1) for x in documents]
    q, k = (_filled(lax.stop_gradient(x), axis=1) for x in (q, k))

    def visit(largest: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        queries, keys = (_chunk(x, start, axis=1) for x, start in zip((q, k), first))
        scores = jnp.einsum("bthd,bshd->bhts", queries, keys, preferred_element_type=largest.dtype) * scale
        rows, columns = (_chunk(x, start, axis=0) for x, start in zip(ranks, first))
        seen = columns <= rows[:, None]
        if ids is not None:
            own, others = (_chunk(x, start, axis=1) for x, start in zip(ids, first))
            seen = seen & (own[:, :, None] == others[:, None])[:, None]
        return jnp.maximum(largest, jnp.max(jnp.where(seen, scores, -jnp.inf), axis=(0, 2, 3))), None

    return lax.scan(visit, jnp.full(q.shape[2], -jnp.inf, widen(q.dtype)), pairs)[0]


def _filled(x: jax.Array, axis: int) -> jax.Array:
    """To a whole number of chunks, or to one that is smaller."""
    more = -x.shape[axis] % min(CHUNK, x.shape[axis])
    return jnp.pad(x, [(0, more if each == axis else 0) for each in range(x.ndim)], "edge")


def _chunk(x: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, min(CHUNK, x.shape[axis]), axis)

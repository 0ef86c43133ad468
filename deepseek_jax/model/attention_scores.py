"""The largest attention score of each head, which QK-clip limits, beside kernels that do not tell it."""

from typing import Optional

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.layers import widen

CHUNK = 512
"""Queries and keys whose scores exist at one time."""


def largest_scores(q: jax.Array, k: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """The largest scaled score of each head among those that a token sees, [H]; no gradient flows through it.

    A product of queries and keys more, in the forward pass alone. Arguments are those of `causal_attention`.
    """
    size = min(CHUNK, q.shape[1])
    filled = [(0, 0), (0, -q.shape[1] % size)]  # by copies of the last token, whose scores are there already
    q, k = (lax.stop_gradient(jnp.pad(x, [*filled, (0, 0), (0, 0)], "edge")) for x in (q, k))
    documents = None if segment_ids is None else jnp.pad(segment_ids, filled, "edge")

    def visit(largest: jax.Array, first: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        queries, keys = (lax.dynamic_slice_in_dim(x, start, size, axis=1) for x, start in zip((q, k), first))
        scores = jnp.einsum("bthd,bshd->bhts", queries, keys, preferred_element_type=largest.dtype) * scale
        rows, columns = (start + jnp.arange(size) for start in first)
        seen = columns <= rows[:, None]
        if documents is not None:
            own, others = (lax.dynamic_slice_in_dim(documents, start, size, axis=1) for start in first)
            seen = seen & (own[:, :, None] == others[:, None])[:, None]
        return jnp.maximum(largest, jnp.max(jnp.where(seen, scores, -jnp.inf), axis=(0, 2, 3))), None

    starts = range(0, q.shape[1], size)
    pairs = jnp.array([(row, column) for row in starts for column in starts if column <= row]).T
    return lax.scan(visit, jnp.full(q.shape[2], -jnp.inf, widen(q.dtype)), tuple(pairs))[0]

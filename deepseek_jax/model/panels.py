"""Weights cut into narrow panels, so that products of few rows read them at the speed of memory on CPU.

Such a product does little more than read its weight once. From a matrix stored by rows XLA's CPU kernels take a
stripe of columns at a time, a short stretch of every row; a panel is that stripe, stored as one stretch.
"""

from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp

PANELS = "panels"
"""Collection of weights that decoding has cut."""
COLUMNS = 32
"""In a panel; a weight whose columns are no multiple of it stays whole."""
LEAST, PIECES = 2**17, 16
"""Numbers that make a piece worth a thread, about; and the most pieces, each a product to compile."""


class Panels(NamedTuple):
    """A weight [K, M] as pieces that lie side by side, each [panels, K, COLUMNS]; XLA multiplies a piece on one thread."""

    pieces: list[jax.Array]


def cut(weight: jax.Array) -> Panels:
    """Cut a weight [K, M], or several that are to lie side by side, [E, K, M]."""
    *_, k, m = weight.shape
    panels = weight.reshape(-1, k, m // COLUMNS, COLUMNS).swapaxes(1, 2).reshape(-1, k, COLUMNS)
    pieces = min(PIECES, -(-weight.size // LEAST))
    at_once = -(-len(panels) // pieces)
    return Panels([panels[start : start + at_once] for start in range(0, len(panels), at_once)])


def whole(panels: Panels, several: Optional[int] = None) -> jax.Array:
    """The weight [K, M], or as many as `several` says, [E, K, M]."""
    joined = jnp.concatenate(panels.pieces)
    weights = joined.reshape(several or 1, -1, *joined.shape[1:]).swapaxes(1, 2).reshape(several or 1, joined.shape[1], -1)
    return weights if several else weights[0]


def times(x: jax.Array, weight: jax.Array | Panels, dtype: Optional[jnp.dtype] = None) -> jax.Array:
    """x [..., K] times a weight, cut or whole: [..., M], or [..., E M] of several; in the type given or x's own."""
    if not isinstance(weight, Panels):
        return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=dtype)
    rows = x.reshape(-1, x.shape[-1])

    def multiply(piece: jax.Array) -> jax.Array:
        repeated = jnp.broadcast_to(rows, (len(piece), *rows.shape))
        y = jnp.matmul(repeated, piece.astype(x.dtype), preferred_element_type=dtype)
        return y.swapaxes(0, 1).reshape(len(rows), -1)

    return jnp.concatenate([multiply(piece) for piece in weight.pieces], axis=-1).reshape(*x.shape[:-1], -1)

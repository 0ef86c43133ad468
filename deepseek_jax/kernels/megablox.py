"""Grouped products on TPU by JAX's megablox, in tiles that follow from the shapes."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

ROWS, FEWER_ROWS = 512, 256
"""Multiplied at once, in groups of at least two such tiles on average and in smaller ones.

A group's weights are read again for each tile, so that an operand of bfloat16 gives as many operations a byte as a tile has
rows: v5p wants 166, v5e 240, v6e 560. But a tile in which one group ends and the next begins is multiplied twice, about one
for every group. Tiles of 256 are the faster by this count for groups of 128 rows (fsdp) on all but v6e, and those of 512
for groups of 1024 and more on all but v5p, where they lose a sixth at first and nothing at 8192."""
WIDEST_BYTES = 2048
"""Of a tile's row: 1024 of bfloat16 or 512 of float32. Two tiles of each operand and the sums then fit a core's 16 MiB."""


def rows_by_weight(x: jax.Array, weight: jax.Array, group_sizes: jax.Array, transpose: bool = False) -> jax.Array:
    """Each row times its group's matrix.

    Args:
        x: [N, K], sorted by group.
        weight: [E, K, M], or with `transpose` [E, M, K].
        group_sizes: [E], together at most N.

    Returns:
        [N, M] in x's type, summed in float32; anything in rows that belong to no group.
    """
    rows, width = x.shape[0], weight.shape[1 if transpose else 2]
    tiling = tiles(rows, weight.shape[0], x.shape[1], width, x.dtype)
    return gmm(_whole_tiles(x, tiling[0]), weight, group_sizes, x.dtype, tiling, transpose_rhs=transpose)[:rows]


def rows_by_rows(x: jax.Array, gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """For every group the product of its columns of xᵀ [K, N] and its rows of the gradient [N, M]: [E, K, M]."""
    tiling = tiles(x.shape[0], group_sizes.shape[0], x.shape[1], gradient.shape[1], x.dtype)
    left, right = (_whole_tiles(rows, tiling[0]) for rows in (x, gradient))
    return tgmm(left.T, right, group_sizes, x.dtype, tiling)


def tiles(rows: int, groups: int, width_in: int, width_out: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    """Of rows, of the inner width and of the other, for any of the three products."""
    height = ROWS if rows >= 2 * ROWS * groups else FEWER_ROWS
    return min(height, -(-rows // 128) * 128), _tile(width_in, dtype), _tile(width_out, dtype)


def _tile(width: int, dtype: jnp.dtype) -> int:
    """The whole width, or the least multiple of 128 that makes as many parts as the widest tile does."""
    widest = WIDEST_BYTES // jnp.dtype(dtype).itemsize
    if width <= widest:
        return width
    parts = -(-width // widest)
    return -(-width // (128 * parts)) * 128


def _whole_tiles(x: jax.Array, tile: int) -> jax.Array:
    """Zero rows added up to whole tiles."""
    return jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0)))

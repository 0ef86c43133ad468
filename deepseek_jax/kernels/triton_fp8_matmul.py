"""Block-scaled products of float8 on GPUs as Pallas Triton kernels (report 3.3): plain ones are those of a single group.

The tensor cores add 128 products of codes at a time; that sum, times its two scales, goes to a float32 sum in registers. They
read float8 only where the contracted axis is the one that lies contiguous in memory, so both operands come that way.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_jax.kernels.tiles import Shape, call, load, load_column, load_row, make_tiles, span, store
from deepseek_jax.kernels.triton_primitives import float8_dot

TILE = 128
LARGEST = Shape(TILE, TILE, TILE)
"""Two sums of that many rows and columns, the tensor cores' and the float32 one, fill two groups of four warps' registers,
64 numbers each a thread; columns lie within one block of weights."""
PARAMETERS = plgpu.CompilerParams(num_warps=8, num_stages=4)
"""Four steps' codes are 128 of 227 KB of shared memory."""
LARGEST_OF_ROWS, PARAMETERS_OF_ROWS = Shape(64, TILE, TILE), plgpu.CompilerParams(num_warps=4, num_stages=3)
"""Where columns have scales of their own as well, three smaller programs side by side take 0.79 of the time (an H100)."""
Scaled = tuple[jax.Array, jax.Array]


def rows_by_weights(rows: Sequence[Scaled], weights: Sequence[Scaled], group_sizes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sum of products of rows and their groups' weights.

    Args:
        rows: each codes [N, K], sorted by group, and float32 scales [N, ceil(K/128)]; K may differ.
        weights: for each of them codes [E, M, K] and float32 scales [E, ceil(M/128), ceil(K/128)].
        group_sizes: [E], together at most N.

    Returns:
        [N, M]; zero for rows of no group.
    """
    count, groups, width = rows[0][0].shape[0], *weights[0][0].shape[:2]
    shape = LARGEST.cut(pl.cdiv(count, groups), width, max(codes.shape[1] for codes, _ in rows))
    tiles = make_tiles(group_sizes, count, shape.rows)
    return call(
        partial(_rows_by_weights_kernel, shape, groups),
        f"{matmul_name(groups)}_fp8",
        (pl.cdiv(width, shape.columns), tiles.group.size),
        jax.ShapeDtypeStruct((count, width), dtype),
        PARAMETERS,
        tiles,
        tuple(rows),
        tuple(weights),
    )


def _rows_by_weights_kernel(
    shape: Shape, groups: int, tiles: Any, rows: Sequence[Any], weights: Sequence[Any], y: Any
) -> None:
    """Columns are the grid's fast axis: programs that run together share rows, and weights that the cache still holds."""
    tile, column = pl.program_id(1), pl.program_id(0) * shape.columns
    group, first, end = (each[tile] for each in tiles)
    these, those = span(first, shape.rows, end), span(column, shape.columns, y.shape[1])
    is_needed = ((group < groups) & (first < end)).astype(jnp.int32)
    total = jnp.zeros((shape.rows, shape.columns), jnp.float32)
    for (x, x_scales), (weight, weight_scales) in zip(rows, weights):

        def add(
            step: jax.Array,
            total: jax.Array,
            x: Any = x,
            x_scales: Any = x_scales,
            w: Any = weight,
            w_scales: Any = weight_scales,
        ) -> jax.Array:
            inner = span(step * shape.depth, shape.depth, x.shape[1])
            scales = load_column(x_scales, these, step) * w_scales[group, column // TILE, step]
            product = float8_dot(load(x, these, inner), load(w, those, inner, group))
            return total + product * scales[:, None]

        total = lax.fori_loop(0, is_needed * pl.cdiv(x.shape[1], shape.depth), add, total)
    store(y, total, these, those)


def rows_by_rows(x: Scaled, dy: Scaled, tile_ends: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """For every group the product xᵀ dy of its rows, both in tiles of 128 rows, the last of a group filled with zeros.

    Args:
        x: codes [T, K, 128] of tiles sorted by group, and float32 scales [T, K].
        dy: codes [T, M, 128] and scales [T, M].
        tile_ends: [E] the tile after each group's last.

    Returns:
        [E, K, M]; zero for a group without tiles.
    """
    height, width, groups = x[0].shape[1], dy[0].shape[1], tile_ends.size
    shape = LARGEST_OF_ROWS.cut(height, width, TILE)
    return call(
        partial(_rows_by_rows_kernel, shape),
        f"{matmul_name(groups)}_of_rows_fp8",
        (pl.cdiv(width, shape.columns), pl.cdiv(height, shape.rows), groups),
        jax.ShapeDtypeStruct((groups, height, width), dtype),
        PARAMETERS_OF_ROWS,
        jnp.diff(tile_ends, prepend=0),
        tile_ends,
        x,
        dy,
    )


def _rows_by_rows_kernel(shape: Shape, counts: Any, ends: Any, x: Any, dy: Any, dw: Any) -> None:
    group = pl.program_id(2)
    these = span(pl.program_id(1) * shape.rows, shape.rows, dw.shape[1])
    those = span(pl.program_id(0) * shape.columns, shape.columns, dw.shape[2])
    inner = span(0, TILE, TILE)
    (left, left_scales), (right, right_scales) = x, dy
    end = ends[group]

    def add(tile: jax.Array, total: jax.Array) -> jax.Array:
        scales = load_row(left_scales, tile, these), load_row(right_scales, tile, those)
        product = float8_dot(load(left, these, inner, tile), load(right, those, inner, tile))
        return total + product * (scales[0][:, None] * scales[1][None, :])

    total = jnp.zeros((shape.rows, shape.columns), jnp.float32)
    total = lax.fori_loop(end - counts[group], end, add, total)
    store(dw, total, these, those, group)


def matmul_name(groups: int) -> str:
    """In a kernel's name, by which a plan knows what even routing means for it."""
    return "grouped_matmul" if groups > 1 else "matmul"

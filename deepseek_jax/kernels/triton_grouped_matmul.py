"""Grouped products on GPUs as Pallas Triton kernels: rows sorted by group, each group with its own weight.

Every program makes one tile of the result. Which group and rows it works on stands in a table that a few small operations
make on the device, so that nothing waits for the host and no loop outside a kernel has a length that depends on data.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_jax.kernels.tiles import Shape, call, load, make_tiles, span, store

LARGEST = {2: Shape(128, 256, 64), 4: Shape(64, 64, 32)}
"""Bytes of a number -> tile. On tensor cores 128 x 256 sums fill half of a Hopper multiprocessor's registers, take 85
multiply-adds a number read, and three steps of 64 numbers (128 bytes, the width of shared memory's swizzle) fill 144 of its
227 KB of shared memory. float32, which is not multiplied there, takes less. A group of fewer rows takes lower tiles, for what
lies beyond its last row is computed for nothing."""


def rows_by_weights(
    rows: Sequence[jax.Array], weights: Sequence[jax.Array], group_sizes: jax.Array, transpose: bool = False
) -> jax.Array:
    """Sum of products of rows and their groups' weights.

    Args:
        rows: each [N, K], sorted by group.
        weights: for each of them [E, K, M], or with `transpose` [E, M, K].
        group_sizes: [E], together at most N.

    Returns:
        [N, M], summed in float32; zero for rows of no group.
    """
    count, depth = rows[0].shape
    groups, width = weights[0].shape[0], weights[0].shape[1 if transpose else 2]
    shape = _shape(rows[0].dtype, pl.cdiv(count, groups), width, depth)
    tiles = make_tiles(group_sizes, count, shape.rows)
    return call(
        partial(_rows_by_weights_kernel, shape, groups, transpose),
        "grouped_matmul_transposed" if transpose else "grouped_matmul",
        (pl.cdiv(width, shape.columns), tiles.group.size),
        jax.ShapeDtypeStruct((count, width), rows[0].dtype),
        _parameters(shape),
        tiles,
        tuple(rows),
        tuple(weights),
    )


def _rows_by_weights_kernel(
    shape: Shape, groups: int, transpose: bool, tiles: Any, rows: Sequence[Any], weights: Sequence[Any], y: Any
) -> None:
    """Columns are the grid's fast axis: programs that run together share rows, and weights that the cache still holds."""
    tile, column = pl.program_id(1), pl.program_id(0) * shape.columns
    group, first, end = (each[tile] for each in tiles)
    these, those = span(first, shape.rows, end), span(column, shape.columns, y.shape[1])
    depth = rows[0].shape[1]
    is_needed = (group < groups) & (first < end)
    steps = pl.cdiv(depth, shape.depth) * is_needed.astype(jnp.int32)
    total = jnp.zeros((shape.rows, shape.columns), jnp.float32)
    for x, weight in zip(rows, weights):

        def add(step: jax.Array, total: jax.Array, x: Any = x, weight: Any = weight) -> jax.Array:
            inner = span(step * shape.depth, shape.depth, depth)
            right = load(weight, *((those, inner) if transpose else (inner, those)), group)
            return total + _dot(load(x, these, inner), right, trans_b=transpose)

        total = lax.fori_loop(0, steps, add, total)
    store(y, total, these, those)


def rows_by_rows(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """For every group the product xᵀ dy of its rows.

    Args:
        x: [N, K], sorted by group.
        dy: [N, M].
        group_sizes: [E], together at most N.

    Returns:
        [E, K, M], summed in float32; zero for a group without rows.
    """
    (count, height), width, groups = x.shape, dy.shape[1], group_sizes.size
    shape = _shape(x.dtype, height, width, pl.cdiv(count, groups))
    return call(
        partial(_rows_by_rows_kernel, shape),
        "grouped_matmul_of_rows",
        (pl.cdiv(width, shape.columns), pl.cdiv(height, shape.rows), groups),
        jax.ShapeDtypeStruct((groups, height, width), x.dtype),
        _parameters(shape),
        group_sizes,
        jnp.cumsum(group_sizes),
        x,
        dy,
    )


def _rows_by_rows_kernel(shape: Shape, sizes: Any, ends: Any, x: Any, dy: Any, dw: Any) -> None:
    group = pl.program_id(2)
    these = span(pl.program_id(1) * shape.rows, shape.rows, dw.shape[1])
    those = span(pl.program_id(0) * shape.columns, shape.columns, dw.shape[2])
    size, end = sizes[group], ends[group]

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        inner = span(end - size + step * shape.depth, shape.depth, end)
        return total + _dot(load(x, inner, these), load(dy, inner, those), trans_a=True)

    total = jnp.zeros((shape.rows, shape.columns), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(size, shape.depth), add, total)
    store(dw, total, these, those, group)


def _shape(dtype: jnp.dtype, rows: int, columns: int, depth: int) -> Shape:
    return LARGEST[jnp.dtype(dtype).itemsize].cut(rows, columns, depth)


def _parameters(shape: Shape) -> plgpu.CompilerParams:
    """Large tiles are shared by two groups of four warps, or their sums would not fit a thread's 255 registers."""
    return plgpu.CompilerParams(num_warps=8 if shape.rows * shape.columns > 128 * 128 else 4, num_stages=3)


def _dot(left: jax.Array, right: jax.Array, **transposed: bool) -> jax.Array:
    """In float32; of float32 as well, not in the tensor cores' tf32."""
    return plgpu.dot(left, right, precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None, **transposed)

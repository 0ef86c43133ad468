"""Numbers quantised for float8 products in one reading; XLA reads twice, and keeps float32 in memory in between.

Divisions are IEEE's, so that the bits are those of `precision.fp8` on a CPU; XLA divides float32 on GPUs with an error in the
last bits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_jax.kernels.tiles import Shape, Tiles, call, load, load_column, span, store
from deepseek_jax.kernels.triton_primitives import quotient

TILE = 128
E4M3_MAX = 448.0
PARAMETERS = plgpu.CompilerParams(num_warps=8)


def quantize_along_rows(
    source: tuple[jax.Array, ...], tiles: Tiles, groups: int, smallest_amax: float
) -> tuple[jax.Array, jax.Array]:
    """Numbers in tiles of 128 rows of a group, as `precision.fp8.quantize_tiles` makes each; rows beyond are zeros.

    Args:
        source: numbers [N, K], or codes [N, K] and their float32 scales [N, ceil(K/128)].
        tiles: of the N rows, 128 high; those of group `groups` are all zeros.
        smallest_amax: floor under a tile's largest magnitude.

    Returns:
        codes [T, K, 128] and float32 scales [T, K].
    """
    width, count = source[0].shape[1], tiles.group.size
    columns = Shape(TILE, TILE, TILE).cut(TILE, width, TILE).columns
    shapes = (
        jax.ShapeDtypeStruct((count, width, TILE), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((count, width), jnp.float32),
    )
    kernel = partial(_kernel, columns, groups, smallest_amax)
    return call(kernel, "quantize_along_rows", (pl.cdiv(width, columns), count), shapes, PARAMETERS, tiles, source)


def _kernel(columns: int, groups: int, smallest_amax: float, tiles: Any, source: Any, codes: Any, scales: Any) -> None:
    column, tile = pl.program_id(0), pl.program_id(1)
    group, first, end = (each[tile] for each in tiles)
    rows = span(first, TILE, jnp.where(group < groups, end, first))
    those = span(column * columns, columns, codes.shape[1])
    values = load(source[0], rows, those).astype(jnp.float32)
    if len(source) > 1:
        values = values * load_column(source[1], rows, column)[:, None]
    scale = _scale(jnp.max(_magnitudes(values), axis=0), smallest_amax)
    store(codes, _codes(values, scale[None, :]).T, those, span(0, TILE, TILE), tile)
    plgpu.store(scales.at[tile, those.slice], scale, mask=those.mask)


def quantize(x: jax.Array, smallest_amax: float, in_blocks: bool = False) -> tuple[jax.Array, jax.Array]:
    """Matrices [E, N, K] in tiles of 1 x 128, as `precision.fp8.quantize_tiles` makes them, or in blocks of 128 x 128.

    Returns:
        codes [E, N, K] and float32 scales [E, N, ceil(K/128)] or [E, ceil(N/128), ceil(K/128)].
    """
    groups, count, width = x.shape
    shape = Shape(TILE, TILE, TILE).cut(count, width, TILE)
    grid = pl.cdiv(width, TILE), pl.cdiv(count, shape.rows), groups
    shapes = (
        jax.ShapeDtypeStruct(x.shape, jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((groups, grid[1] if in_blocks else count, grid[0]), jnp.float32),
    )
    return call(partial(_quantize_kernel, shape, smallest_amax, in_blocks), "quantize", grid, shapes, PARAMETERS, x)


def _quantize_kernel(shape: Shape, smallest_amax: float, in_blocks: bool, x: Any, codes: Any, scales: Any) -> None:
    column, row, group = (pl.program_id(axis) for axis in range(3))
    these = span(row * shape.rows, shape.rows, x.shape[1])
    those = span(column * shape.columns, shape.columns, x.shape[2])
    values = load(x, these, those, group).astype(jnp.float32)
    largest = jnp.max(_magnitudes(values), axis=1)
    if in_blocks:
        scale = _scale(jnp.max(largest, axis=0), smallest_amax)
        store(codes, _codes(values, scale), these, those, group)
        plgpu.store(scales.at[group, row, column], scale)
    else:
        scale = _scale(largest, smallest_amax)
        store(codes, _codes(values, scale[:, None]), these, those, group)
        plgpu.store(scales.at[group, these.slice, column], scale, mask=these.mask)


def _magnitudes(values: jax.Array) -> jax.Array:
    """As integers, whose order is that of the numbers, then infinity, then NaN, which a maximum of numbers drops."""
    return lax.bitcast_convert_type(values, jnp.int32) & 0x7FFFFFFF


def _scale(largest: jax.Array, smallest_amax: float) -> jax.Array:
    amax = lax.bitcast_convert_type(largest, jnp.float32)
    return quotient(jnp.where(amax < smallest_amax, smallest_amax, amax), jnp.float32(E4M3_MAX))


def _codes(values: jax.Array, scale: jax.Array) -> jax.Array:
    scaled = quotient(values, scale)
    return jnp.where(jnp.isnan(scaled), jnp.nan, jnp.clip(scaled, -E4M3_MAX, E4M3_MAX)).astype(jnp.float8_e4m3fn)

"""Activations and gradients quantised along their rows, for the gradient of weights: one reading, nothing wide in between.

XLA reads twice, turns every number, and keeps float32 in memory meanwhile.
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
    """Numbers in tiles of 128 rows of a group, as `precision.fp8.quantize_tiles` makes each of them; rows beyond are zeros.

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
    # As integers, whose order is that of the numbers, then infinity, then NaN, which a maximum of numbers drops.
    magnitudes = lax.bitcast_convert_type(values, jnp.int32) & 0x7FFFFFFF
    amax = lax.bitcast_convert_type(jnp.max(magnitudes, axis=0), jnp.float32)
    scale = quotient(jnp.where(amax < smallest_amax, smallest_amax, amax), jnp.float32(E4M3_MAX))
    scaled = quotient(values, scale[None, :])
    clipped = jnp.where(scaled != scaled, jnp.nan, jnp.clip(scaled, -E4M3_MAX, E4M3_MAX))
    store(codes, clipped.astype(codes.dtype).T, those, span(0, TILE, TILE), tile)
    plgpu.store(scales.at[tile, those.slice], scale, mask=those.mask)

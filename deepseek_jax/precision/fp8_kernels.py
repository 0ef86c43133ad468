"""The float8 products by kernels for GPUs: what `fp8_matmul` and `fp8_grouped_matmul` have, in the layout that these want.

Codes are read along the contracted axis: weights are turned for y, and both operands of the weight gradient stand in whole
tiles of 128 rows of one expert, a tile's rows side by side. Turning costs one pass over numbers of one byte.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from deepseek_jax.precision.fp8 import SMALLEST_AMAX, TILE

Scaled = tuple[jax.Array, jax.Array]
"""Codes and scales, as in `fp8_matmul.Quantized`."""


def multiply(pairs: Sequence[tuple[Scaled, Scaled]], contracted: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Sum over pairs of matrices of their products over one axis of each; see `fp8_matmul.Multiply`.

    Scales are one for 1 x 128 of the left codes and for 128 x 128 of the right; over axis 0 of both, one for 128 x 1.
    """
    from deepseek_jax.kernels.triton_fp8_matmul import rows_by_rows

    if contracted == (0, 0):
        ((x, dy),) = pairs
        tiles = [_whole_tiles(each) for each in (x, dy)]
        return rows_by_rows(*tiles, jnp.array([tiles[0][0].shape[0]], jnp.int32))[0].astype(dtype)
    stacks = [(rows, tuple(each[None] for each in weights)) for rows, weights in pairs]
    everything = jnp.array([pairs[0][0][0].shape[0]], jnp.int32)
    return rows_times_weights(stacks, contracted, everything, dtype)


def rows_times_weights(
    pairs: Sequence[tuple[Scaled, Scaled]], contracted: tuple[int, int], group_sizes: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Sum over pairs ([N, C] rows, [E, ...] weights) of each row times its expert's weight: [N, M]."""
    from deepseek_jax.kernels.triton_fp8_matmul import rows_by_weights

    weights = [of if contracted[1] == 1 else tuple(jnp.swapaxes(each, 1, 2) for each in of) for _, of in pairs]
    return rows_by_weights([rows for rows, _ in pairs], weights, group_sizes, dtype)


def weight_gradients(
    x: Scaled, gradients: Sequence[jax.Array], group_sizes: jax.Array, smallest_amax: float
) -> list[jax.Array]:
    """float32 [E, K, M] for each of the gradients [N, M], quantised in tiles of 128 x 1 from each expert's first row on.

    Args:
        x: codes [N, K] in tiles of 1 x 128, which are dequantised and quantised again.
        smallest_amax: floor under a tile's largest magnitude in the gradients.
    """
    from deepseek_jax.kernels.tiles import make_tiles
    from deepseek_jax.kernels.triton_fp8_matmul import rows_by_rows
    from deepseek_jax.kernels.triton_quantize import quantize_along_rows

    tiles, groups = make_tiles(group_sizes, x[0].shape[0], TILE), group_sizes.size
    x_tiles = quantize_along_rows(x, tiles, groups, SMALLEST_AMAX)
    tile_ends = jnp.cumsum(-(-group_sizes // TILE))
    return [rows_by_rows(x_tiles, quantize_along_rows((dy,), tiles, groups, smallest_amax), tile_ends) for dy in gradients]


def _whole_tiles(matrix: Scaled) -> Scaled:
    """Codes [N, K] with a scale for 128 x 1, as [N/128, K, 128]."""
    codes, scales = matrix
    padded = jnp.pad(codes, ((0, -codes.shape[0] % TILE), (0, 0)))
    return jnp.swapaxes(padded.reshape(-1, TILE, codes.shape[1]), 1, 2), scales

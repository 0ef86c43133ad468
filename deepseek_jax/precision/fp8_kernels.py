"""The three float8 products by kernels for GPUs (report 3.3); a plain product is that of a single group.

The kernels read codes along the contracted axis. So weights are turned for y, and both operands of the weight gradient stand
in tiles of 128 rows of one expert, a tile's rows side by side.
"""

from functools import partial
from importlib import import_module
from types import ModuleType

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import slabs
from deepseek_jax.precision.fp8 import SMALLEST_AMAX, SMALLEST_GRADIENT_AMAX, TILE
from deepseek_jax.precision.fp8_operands import Prepared, Quantized, gradient_of, like

Kept = tuple[Quantized, list[Quantized], list[jax.Array], jax.Array]
"""x, the weights, arrays of the types of their gradients, and the groups' sizes."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: Prepared, weights: list[Prepared], group_sizes: jax.Array, kernels: str) -> list[jax.Array]:
    """Rows x [N, K] sorted by group times each of the weights [E, K, M]: [N, M]; see `fp8_grouped_matmul`."""
    return _forward(x, weights, group_sizes, kernels)[0]


def kernels_of(name: str) -> ModuleType:
    """The products by an implementation of KERNELS, imported late: only GPUs should load Pallas."""
    return import_module(f"deepseek_jax.kernels.{name}_fp8_matmul")


def _forward(x: Prepared, weights: list[Prepared], group_sizes: jax.Array, kernels: str) -> tuple[list[jax.Array], Kept]:
    multiply = kernels_of(kernels).rows_by_weights
    blocks = [weight.quantized for weight in weights]
    turned = ((jnp.swapaxes(codes, 1, 2), jnp.swapaxes(scales, 1, 2)) for codes, scales in blocks)
    outputs = [multiply([x.quantized], [weight], group_sizes, x.dtype) for weight in turned]
    return outputs, (x.quantized, blocks, like(weights), group_sizes)


def _backward(kernels: str, kept: Kept, gradients: list[jax.Array]) -> tuple[Prepared, list[Prepared], None]:
    from deepseek_jax.kernels.tiles import make_tiles
    from deepseek_jax.kernels.triton_quantize import quantize, quantize_along_rows

    products = kernels_of(kernels)
    x_tiles, blocks, types, group_sizes = kept
    rows = [_of_one(quantize(dy[None], SMALLEST_GRADIENT_AMAX)) for dy in gradients]
    dx = products.rows_by_weights(rows, blocks, group_sizes, gradients[0].dtype)

    tiles, groups = make_tiles(group_sizes, x_tiles.codes.shape[0], TILE), group_sizes.size
    tile_ends = jnp.cumsum(-(-group_sizes // TILE))
    x = quantize_along_rows(x_tiles, tiles, groups, SMALLEST_AMAX)
    along_rows = (quantize_along_rows((dy,), tiles, groups, SMALLEST_GRADIENT_AMAX) for dy in gradients)
    dw = (
        slabs.make(partial(products.rows_by_rows, tile_ends=tile_ends, dtype=own.dtype), x, dy, groups)
        for dy, own in zip(along_rows, types)
    )
    return gradient_of(dx), [gradient_of(each) for each in dw], None


grouped_matmul.defvjp(_forward, _backward)


def _of_one(stack: tuple[jax.Array, jax.Array]) -> Quantized:
    codes, scales = stack
    return Quantized(codes[0], scales[0])

"""The float8 kernels for GPUs, interpreted, against the plain forms to the bit; `test_fp8.py` has them beside all forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import mosaic_fp8_matmul, triton_fp8_matmul
from deepseek_jax.kernels.tiles import make_tiles
from deepseek_jax.kernels.triton_quantize import quantize, quantize_along_rows
from deepseek_jax.precision.fp8 import quantize_blocks, quantize_tiles
from parity_tests.test_fp8_matmul import GROUPED, compiled_vjp, jax_vjp


def bits(quantized):
    """Codes and scales as integers."""
    codes, scales = quantized
    return np.asarray(codes).view(np.uint8), np.asarray(scales).view(np.uint32)


@pytest.fixture(scope="module")
def numbers():
    """Over many magnitudes, with a tile of zeros, a NaN and an infinity; no side is a multiple of 128."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 140)) * np.exp(4 * rng.standard_normal((300, 140)))
    values[:, 130:], values[3, 5], values[7, 9] = 0, np.nan, np.inf
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_are_the_same_bits(numbers, dtype):
    x = numbers.astype(dtype)
    ours = jax.jit(partial(quantize, smallest_amax=1e-30))(x[None])
    for one, other in zip(bits(ours), bits(quantize_tiles(x, 1, smallest_amax=1e-30)), strict=True):
        np.testing.assert_array_equal(one[0], other)


def test_blocks_are_the_same_bits(numbers):
    weights = jnp.stack([numbers, 3 * numbers])
    ours = jax.jit(partial(quantize, smallest_amax=1e-4, in_blocks=True))(weights)
    for one, other in zip(bits(ours), bits(quantize_blocks(weights)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_tiles_along_rows_are_the_same_bits(numbers):
    """From each group's first row on; a tile's end beyond its group is zeros."""
    sizes = jnp.array([100, 0, 180], jnp.int32)
    codes, scales = bits(jax.jit(lambda x: quantize_along_rows((x,), make_tiles(sizes, 300, 128), 3, 1e-30))(numbers))
    for tile, (first, end) in enumerate([(0, 100), (100, 228), (228, 280)]):
        expected_codes, expected_scales = bits(quantize_tiles(numbers[first:end], 0, smallest_amax=1e-30))
        np.testing.assert_array_equal(codes[tile, :, : end - first].T, expected_codes)
        np.testing.assert_array_equal(scales[tile], expected_scales[0])


def test_forms_agree_to_the_bit_where_every_sum_is_exact():
    """Codes that are multiples of 64 and reach 448 in every tile, so that all scales are 1: small multiples of 4096 add up."""
    rng = np.random.default_rng(0)

    def numbers(*shape):
        values = rng.choice(np.float32([-128, -64, 0, 64, 128]), shape)
        largest = 448 * rng.choice(np.float32([-1, 1]), shape)
        every_fifth = (np.arange(shape[-2]) % 5 == 0)[:, None] | (np.arange(shape[-1]) % 5 == 0)
        return np.where(every_fifth, largest, values)

    x, w, dy, sizes = numbers(257, 140), numbers(4, 140, 150), numbers(257, 150), np.array([60, 0, 190, 7], np.int32)
    plain = compiled_vjp(GROUPED["reference"])(x, w, dy, sizes)
    expert = np.repeat(np.arange(4), sizes)
    np.testing.assert_array_equal(plain[0], np.einsum("nk,nkm->nm", x, w[expert]))
    for product in GROUPED.values():
        for one, other in zip(jax_vjp(product, x, w, dy, sizes), plain, strict=True):
            np.testing.assert_array_equal(one, other)


def test_stacks_that_cannot_be_addressed_are_refused():
    experts = jax.ShapeDtypeStruct((256, 7168, 2048), jnp.float32)
    with pytest.raises(UserError, match=r"fp8: 3758096384 numbers .* larger parallel.expert"):
        jax.eval_shape(partial(quantize, smallest_amax=1e-4, in_blocks=True), experts)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="before, the emulation of Mosaic-GPU has no transposed operands")
@pytest.mark.parametrize("sizes", [[130, 0, 50], [0, 0, 0]])
def test_mosaic_is_triton_to_the_bit(sizes):
    """Emulated, all three products: sides that no tile divides, groups of several blocks and of none, rows of no group."""
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    rng = np.random.default_rng(0)
    shapes = (190, 270), (3, 270, 140), (190, 140)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    group_sizes = jnp.array(sizes, jnp.int32)
    tiles, tile_ends = make_tiles(group_sizes, 190, 128), jnp.cumsum(-(-group_sizes // 128))
    rows = [tuple(each[0] for each in quantize(one[None], 1e-4)) for one in (x, dy)]
    blocks = [quantize(one, 1e-4, in_blocks=True) for one in (jnp.swapaxes(w, 1, 2), w)]
    x_tiles, dy_tiles = (quantize_along_rows((one,), tiles, 3, 1e-30) for one in (x, dy))

    def results(kernels):
        y = kernels.rows_by_weights(rows[:1], blocks[:1], group_sizes, jnp.bfloat16)
        dx = kernels.rows_by_weights(rows[1:] * 2, blocks[1:] * 2, group_sizes, jnp.float32)
        return y, dx, kernels.rows_by_rows(x_tiles, dy_tiles, tile_ends, jnp.float32)

    with force_gpu_interpret_mode():
        ours = results(mosaic_fp8_matmul)
    for one, other in zip(ours, results(triton_fp8_matmul), strict=True):
        np.testing.assert_array_equal(one, other)

"""Fine-grained quantisation to float8_e4m3fn (report 3.3.2), and whether this machine can multiply float8.

One scale for 128 numbers keeps an outlier from pushing its whole tensor into the subnormals, which is
what one scale a tensor does. Codes and scales are the same bits as the PyTorch sibling's, which takes care
in two places where XLA is free: it divides by multiplying with a reciprocal, and its maximum drops NaN.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.config import ConfigError

TILE = 128
"""Numbers under one scale along a tile, and along each side of a block."""
E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn."""
SMALLEST_AMAX = 1e-4
"""Floor under a tile's or block's largest magnitude, so that zeros have a scale."""
SMALLEST_GRADIENT_AMAX = 1e-30
"""The same for gradients of activations, which a mean over many tokens makes small: with 8192 tokens a step most of
their tiles lie below 1e-4, and a floor there would replace the tile's scale by one number for all."""


def quantize_tiles(
    x: jax.Array, axis: int, power_of_two: bool = False, smallest_amax: float = SMALLEST_AMAX
) -> tuple[jax.Array, jax.Array]:
    """Quantise in tiles of 1 x 128 along `axis`; the last may be shorter.

    A NaN or an infinity turns its tile's scale into NaN or infinity, and the tile dequantises to NaN.

    Args:
        x: any shape, at least one axis.
        axis: the axis the tiles lie along, the one that the product will contract.
        power_of_two: round scales up to a power of two, so that scaling is exact.
        smallest_amax: floor under a tile's largest magnitude.

    Returns:
        codes, float8_e4m3fn of x's shape; scales, float32 with ceil(size / 128) entries along `axis`.
    """
    x = x.astype(jnp.float32)
    scales = _scales(_largest(_magnitudes(x), axis), power_of_two, smallest_amax)
    return _codes(x, expand_scales(scales, axis, x.shape[axis])), scales


def dequantize_tiles(codes: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
    """Inverse of `quantize_tiles` up to rounding: float32 of codes' shape."""
    return codes.astype(jnp.float32) * expand_scales(scales, axis, codes.shape[axis])


def quantize_blocks(w: jax.Array, power_of_two: bool = False) -> tuple[jax.Array, jax.Array]:
    """Quantise in blocks of 128 x 128 over the last two axes; edge blocks may be smaller.

    Args:
        w: [..., K, M].
        power_of_two: see `quantize_tiles`.

    Returns:
        codes, float8_e4m3fn [..., K, M]; scales, float32 [..., ceil(K/128), ceil(M/128)].
    """
    w = w.astype(jnp.float32)
    scales = _scales(_largest(_largest(_magnitudes(w), -1), -2), power_of_two, SMALLEST_AMAX)
    return _codes(w, _expand_blocks(scales, w.shape)), scales


def dequantize_blocks(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Inverse of `quantize_blocks` up to rounding: float32 of codes' shape."""
    return codes.astype(jnp.float32) * _expand_blocks(scales, codes.shape)


def expand_scales(scales: jax.Array, axis: int, size: int) -> jax.Array:
    """Repeat every scale over its tile: `axis` grows from ceil(size / 128) to `size`."""
    return jax.lax.slice_in_dim(jnp.repeat(scales, TILE, axis), 0, size, axis=axis)


def require_fp8(platform: str | None = None) -> None:
    """Try one small float8 product as `fp8_matmul` compiles it.

    Args:
        platform: `cpu`, `gpu` or `tpu`; null is the default platform.

    Raises:
        ConfigError: float8 products do not compile, do not run or come out wrong here.
    """
    where = platform or jax.default_backend()
    fault = ""
    try:
        if not _float8_product_is_right(jax.devices(where)[0]):
            fault = "they come out wrong"
    # Backends refuse in exceptions of many kinds; whichever it is, float8 cannot be used.
    except Exception as error:
        fault = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    if fault:
        raise ConfigError(
            f"model.precision=fp8: no float8 products on {where} with jax {jax.__version__} ({fault}); "
            "use model.precision=bfloat16"
        )


def _float8_product_is_right(device: jax.Device) -> bool:
    def product(a: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, a, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    ones = jax.device_put(jnp.ones((16, TILE), jnp.float8_e4m3fn), device)
    return bool((jax.jit(product)(ones) == TILE).all())


def _magnitudes(x: jax.Array) -> jax.Array:
    """|x| as integers, whose order is that of the numbers, then infinity, then NaN: XLA's float maximum drops NaN."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFFFF


def _largest(magnitudes: jax.Array, axis: int) -> jax.Array:
    """Maximum over each run of 128 along `axis`."""
    axis %= magnitudes.ndim
    before, size, after = magnitudes.shape[:axis], magnitudes.shape[axis], magnitudes.shape[axis + 1 :]
    count = -(-size // TILE)
    padding = [(0, count * TILE - size if i == axis else 0) for i in range(magnitudes.ndim)]
    return jnp.max(jnp.pad(magnitudes, padding).reshape(*before, count, TILE, *after), axis=axis + 1)


def _scales(largest: jax.Array, power_of_two: bool, smallest_amax: float) -> jax.Array:
    """Scales of tiles from their largest magnitudes, given as integers."""
    amax = jax.lax.bitcast_convert_type(largest, jnp.float32)
    scales = _divide(jnp.where(amax < smallest_amax, jnp.float32(smallest_amax), amax), E4M3_MAX)
    if power_of_two:
        bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
        # A mantissa that is not zero carries into the exponent; then the mantissa is dropped.
        scales = jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(jnp.isnan(amax), jnp.nan, scales)


def _codes(x: jax.Array, scales: jax.Array) -> jax.Array:
    scaled = _divide(x, scales)
    return jnp.where(jnp.isnan(scaled), jnp.nan, jnp.clip(scaled, -E4M3_MAX, E4M3_MAX)).astype(jnp.float8_e4m3fn)


def _divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """The IEEE quotient.

    XLA rewrites a division by a constant or a broadcast into x * (1 / by), which rounds twice; a
    divisor that also depends on x keeps the division.
    """
    return x / jnp.where(jnp.isnan(x), jnp.nan, by)


def _expand_blocks(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return expand_scales(expand_scales(scales, -2, shape[-2]), -1, shape[-1])

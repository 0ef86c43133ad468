"""Fine-grained quantisation to float8_e4m3fn (report 3.3.2), in the plainest form.

Codes and scales are the same bits as the JAX sibling's.
"""

import torch
import torch.nn.functional as F

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
    x: torch.Tensor, axis: int, power_of_two: bool = False, smallest_amax: float = SMALLEST_AMAX
) -> tuple[torch.Tensor, torch.Tensor]:
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
    x = x.float()
    scales = _scales(_largest(x.abs(), axis), power_of_two, smallest_amax)
    return _codes(x, expand_scales(scales, axis, x.shape[axis])), scales


def dequantize_tiles(codes: torch.Tensor, scales: torch.Tensor, axis: int) -> torch.Tensor:
    """Inverse of `quantize_tiles` up to rounding: float32 of codes' shape."""
    return codes.float() * expand_scales(scales, axis, codes.shape[axis])


def quantize_blocks(w: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise in blocks of 128 x 128 over the last two axes; edge blocks may be smaller.

    Args:
        w: [..., K, M].
        power_of_two: see `quantize_tiles`.

    Returns:
        codes, float8_e4m3fn [..., K, M]; scales, float32 [..., ceil(K/128), ceil(M/128)].
    """
    w = w.float()
    scales = _scales(_largest(_largest(w.abs(), -1), -2), power_of_two, SMALLEST_AMAX)
    return _codes(w, _expand_blocks(scales, w.shape)), scales


def dequantize_blocks(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Inverse of `quantize_blocks` up to rounding: float32 of codes' shape."""
    return codes.float() * _expand_blocks(scales, codes.shape)


def expand_scales(scales: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Repeat every scale over its tile: `axis` grows from ceil(size / 128) to `size`."""
    return scales.repeat_interleave(TILE, dim=axis).narrow(axis, 0, size)


def _largest(magnitudes: torch.Tensor, axis: int) -> torch.Tensor:
    """Maximum over each run of 128 along `axis`."""
    last = magnitudes.movedim(axis, -1)
    count = -(-last.shape[-1] // TILE)
    tiles = F.pad(last, (0, count * TILE - last.shape[-1])).unflatten(-1, (count, TILE))
    return tiles.amax(-1).movedim(-1, axis)


def _scales(amax: torch.Tensor, power_of_two: bool, smallest_amax: float) -> torch.Tensor:
    # A tensor as divisor: CUDA multiplies by the reciprocal of a number.
    scales = amax.clamp(min=smallest_amax) / torch.full_like(amax, E4M3_MAX)
    if power_of_two:
        # A mantissa that is not zero carries into the exponent; then the mantissa is dropped.
        rounded = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scales = torch.where(scales.isfinite(), rounded, scales)
    return torch.where(scales.isnan(), torch.nan, scales)


def _codes(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    scaled = (x / scales).clamp(-E4M3_MAX, E4M3_MAX)
    return torch.where(scaled.isnan(), torch.nan, scaled).to(torch.float8_e4m3fn)


def _expand_blocks(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return expand_scales(expand_scales(scales, -2, shape[-2]), -1, shape[-1])

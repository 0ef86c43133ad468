"""The FP8 form in which DeepSeek released V3: float8 codes with one scale for 128 x 128 of them.

`X.weight` holds F8_E4M3 codes [out, in], `X.weight_scale_inv` F32 scales [ceil(out/128), ceil(in/128)],
and a weight is its code times its block's scale, in float32; blocks at the edges are smaller. The
arithmetic is that of `precision/fp8.py`, bit for bit, in numpy and in pieces that the processor's cache holds.

Codes do not determine the scales they came with: a block whose largest code is not 448 (all small,
or scaled by a power of two) gives another scale when quantised afresh. Who wants the same bytes back
keeps the scales and asks `requantize_blocks` whether they still explain the weights.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from deepseek_jax.checkpoint.tensors import CheckpointError

BLOCK = 128
"""Rows, and columns, under one scale."""
E4M3_MAX = np.float32(448)
"""Largest finite float8_e4m3fn."""
SMALLEST_AMAX = np.float32(1e-4)
"""Floor under a block's largest magnitude, so that a block of zeros has a scale."""
SMALLEST_SCALE = np.float32(2.0**-117)
"""With the smallest code, 2^-9, it makes the smallest normal float32: below, weights would lose bits."""
LARGEST_SCALE = np.finfo(np.float32).max / E4M3_MAX
BLOCKS = 8
"""Side by side, that are worked on at once."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight [out, in]."""
    return tuple(-(-size // BLOCK) for size in shape)


def check_scales(scales: np.ndarray, shape: tuple[int, ...], where: str, allow_non_finite: bool = False) -> None:
    """Check that `scales` can be those of a weight of `shape` and lose no bit of it.

    Args:
        allow_non_finite: of a broken model that is to be rescued, whose block is then lost.

    Raises:
        CheckpointError: one line that begins with `where`, for NaN and infinity among others.
    """
    if len(shape) != 2 or scales.dtype != np.float32 or scales.shape != scale_shape(shape):
        raise CheckpointError(
            f"{where}: scales {scales.dtype} {list(scales.shape)} do not fit a weight of {list(shape)}, "
            f"which takes float32 {list(scale_shape(shape))}"
        )
    right = (scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE)
    wrong = np.argwhere(~(right | ~np.isfinite(scales)) if allow_non_finite else ~right)
    if len(wrong):
        row, column = wrong[0].tolist()
        raise CheckpointError(
            f"{where}: scale [{row}, {column}] is {scales[row, column]}; it must be between {SMALLEST_SCALE:.1e} "
            f"and {LARGEST_SCALE:.1e}"
        )


def dequantize_blocks(codes: np.ndarray, scales: np.ndarray, where: str, allow_non_finite: bool = False) -> np.ndarray:
    """Weights, float32 [out, in], from float8_e4m3fn codes [out, in] and their scales.

    Every weight is the one float32 nearest to code times scale; a code that is NaN stays NaN.

    Raises:
        CheckpointError: one line that begins with `where`, from `check_scales`.
    """
    check_scales(scales, codes.shape, where, allow_non_finite)
    weights = np.empty_like(codes, np.float32)
    for piece, _, scale in _pieces(scales, codes.shape):
        np.multiply(_FLOAT_OF_CODE.take(codes[piece].view(np.uint8)), scale, out=weights[piece])
    return weights


def quantize_blocks(weights: np.ndarray, where: str, powers_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Codes, float8_e4m3fn [out, in], and scales, float32, from the live largest magnitude of each block.

    Args:
        weights: [out, in], any floating dtype; used as float32.
        powers_of_two: round scales up to such, which E8M0 holds.

    Raises:
        CheckpointError: one line that begins with `where`, if there is NaN or infinity in `weights`.
    """
    if weights.ndim != 2:
        raise CheckpointError(f"{where}: a shape of {list(weights.shape)}; only matrices have blocks")
    codes = np.empty_like(weights, ml_dtypes.float8_e4m3fn)
    scales = np.empty(scale_shape(weights.shape), np.float32)
    for piece, blocks, _ in _pieces(scales, weights.shape):
        x = weights[piece].astype(np.float32)
        largest = np.abs(x).max(axis=0)
        amax = np.maximum.reduceat(largest, np.arange(0, len(largest), BLOCK))
        if not np.isfinite(amax).all():
            place = [blocks[0], blocks[1].start + int(np.argmin(np.isfinite(amax)))]
            raise CheckpointError(f"{where}: NaN or infinity in block {place}, which float8 codes cannot hold")
        scale = np.maximum(amax, SMALLEST_AMAX) / E4M3_MAX
        if powers_of_two:
            mantissa, exponent = np.frexp(scale)
            scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
        scales[blocks] = scale
        codes[piece] = _encode(x, _expand(scale, x.shape[1]))
    return codes, scales


def requantize_blocks(weights: np.ndarray, scales: np.ndarray) -> np.ndarray | None:
    """The codes that with `scales` give exactly `weights`, or None where there are none.

    For weights that came from codes and these scales, as float32 or rounded to bfloat16, these are
    the same codes; for weights that were trained since, None.

    Args:
        weights: [out, in], any floating dtype.
        scales: float32, as checked by `check_scales`.
    """
    codes = np.empty_like(weights, ml_dtypes.float8_e4m3fn)
    for piece, _, scale in _pieces(scales, weights.shape):
        codes[piece] = _encode(weights[piece].astype(np.float32), scale)
        again = _FLOAT_OF_CODE.take(codes[piece].view(np.uint8)) * scale
        again, wanted = again.astype(weights.dtype, copy=False), weights[piece]
        # NaN, where a person has let it pass, is no reason to lose its neighbours' scales.
        if not (np.array_equal(again, wanted) or np.array_equal(again, wanted, equal_nan=True)):
            return None
    return codes


def _pieces(scales: np.ndarray, shape: tuple[int, ...]) -> Iterator[tuple[tuple[slice, slice], tuple[int, slice], np.ndarray]]:
    """A weight of `shape` piece by piece: where it lies, its blocks, and each column's scale."""
    for row in range(scales.shape[0]):
        for first in range(0, scales.shape[1], BLOCKS):
            columns = slice(first * BLOCK, min((first + BLOCKS) * BLOCK, shape[1]))
            piece = slice(row * BLOCK, (row + 1) * BLOCK), columns
            blocks = row, slice(first, first + BLOCKS)
            yield piece, blocks, _expand(scales[blocks], columns.stop - columns.start)


def _expand(row_scales: np.ndarray, columns: int) -> np.ndarray:
    """The scale of each column."""
    return np.repeat(row_scales, BLOCK)[:columns]


def _encode(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes nearest to x / scale, ties to even; x, float32, is lost.

    Rounding to odd at bfloat16 keeps what is needed to round to nearest after it, and from 16 bits a
    table does that, several times faster than a cast.
    """
    with np.errstate(over="ignore"):
        np.divide(x, scale, out=x)
    bits = np.clip(x, -E4M3_MAX, E4M3_MAX, out=x).view(np.uint32)
    odd = bits & 0xFFFF
    odd += 0xFFFF
    odd |= bits
    odd >>= 16
    return _CODE_OF_BFLOAT16.take(odd.astype(np.uint16))


def _every_bfloat16() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


with np.errstate(invalid="ignore"):
    _FLOAT_OF_CODE = np.arange(2**8, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    _CODE_OF_BFLOAT16 = _every_bfloat16().astype(ml_dtypes.float8_e4m3fn)

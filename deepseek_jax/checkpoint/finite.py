"""Nothing broken passes: a tensor with NaN or infinity is refused by name.

Numbers are looked at as the bits they are stored in: without its sign, a float that is not finite is at least as
large an integer as infinity. That costs one pass over each tensor in pieces that stay in the processor's cache.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.checkpoint.tensors import DTYPES, CheckpointError

PIECE = 2**16
"""Numbers looked at in one go."""


class _Bits(NamedTuple):
    """How a dtype tells that a number is not finite."""

    integer: type[np.unsignedinteger]
    magnitude: int
    """All bits but the sign."""
    first: int
    """The smallest magnitude that is not finite."""


_NOT_FINITE = {
    DTYPES[name]: bits
    for name, bits in {
        "F8_E8M0": _Bits(np.uint8, 0xFF, 0xFF),
        "F8_E4M3": _Bits(np.uint8, 0x7F, 0x7F),
        "F8_E5M2": _Bits(np.uint8, 0x7F, 0x7C),
        "F16": _Bits(np.uint16, 0x7FFF, 0x7C00),
        "BF16": _Bits(np.uint16, 0x7FFF, 0x7F80),
        "F32": _Bits(np.uint32, 0x7FFFFFFF, 0x7F800000),
        "F64": _Bits(np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    }.items()
}


def count_not_finite(array: np.ndarray) -> int:
    """How many numbers of `array` are NaN or infinite; none, for integers."""
    known = _NOT_FINITE.get(array.dtype)
    if known is None:
        return 0
    if array.ndim > 1 and array.T.flags.c_contiguous:
        array = array.T  # in the order of memory
    bits = array.reshape(-1).view(known.integer)
    kept = np.empty(min(PIECE, bits.size), known.integer)
    magnitude, count = known.integer(known.magnitude), 0
    for start in range(0, bits.size, PIECE):
        piece = bits[start : start + PIECE]
        found = np.bitwise_and(piece, magnitude, out=kept[: piece.size])
        if found.max() >= known.first:
            count += int(np.count_nonzero(found >= known.first))
    return count


def require_finite(array: np.ndarray, where: str) -> None:
    """Refuse an array with NaN or infinity in it.

    Args:
        where: names file and tensor.

    Raises:
        CheckpointError: one line that begins with `where` and says how many there are.
    """
    count = count_not_finite(array)
    if count:
        raise CheckpointError(
            f"{where}: {count:,} of {array.size:,} numbers {'are' if count > 1 else 'is'} NaN or infinite; take another "
            "copy, or convert with --allow-non-finite"
        )

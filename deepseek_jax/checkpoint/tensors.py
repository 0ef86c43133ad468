"""What a checkpoint says of a tensor before its numbers are read: name, dtype and shape.

Planning, checking and sizing a conversion need no more than this, so a 671B checkpoint can be
laid out on paper. Dtypes go by the names that the safetensors format gives them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from deepseek_jax.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message is one line naming file and tensor."""


DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}
"""The dtypes known here, narrow to wide, in the order by which safetensors files are laid out."""

MAX_DIMENSIONS = 64
"""As many as numpy has."""
STRIPE = 32
"""Columns that are transposed at once."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint; `dtype` is a key of `DTYPES`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype as numpy (with ml_dtypes) knows it."""
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize


class TensorDirectory:
    """What is known of the tensors of a directory, by name, whatever its files are."""

    entries: Mapping[str, TensorSpec]

    @property
    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def fill(target: np.ndarray, array: np.ndarray) -> None:
    """`target[...] = array`, in stripes that stay in the cache where it transposes: a 7168 x 2048 four times as fast."""
    if array.ndim == 2 and not array.flags.c_contiguous:
        for start in range(0, array.shape[1], STRIPE):
            target[:, start : start + STRIPE] = array[:, start : start + STRIPE]
    else:
        target[...] = array


def row_major(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in that dtype, its rows one after the other in memory; itself where it is so already."""
    if array.flags.c_contiguous:
        return array.astype(dtype, copy=False)
    copy = np.empty(array.shape, dtype)
    fill(copy, array)
    return copy

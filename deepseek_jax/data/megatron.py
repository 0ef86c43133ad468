"""Megatron's indexed data sets: NAME.idx says where each sequence of token ids lies in NAME.bin.

The index: 9 bytes of magic, version u64 = 1, a code for the type of the ids u8, counts of sequences and of document marks
u64 each, lengths i32 [sequences], byte offsets i64 [sequences], document marks i64: the sequence that begins each document.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deepseek_jax.data.documents import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_megatron(index: Path) -> Iterator[np.ndarray]:
    """The token ids of each document, from a memory map.

    Raises:
        DataError: naming the file that is missing or contradicts itself.
    """
    binary = index.with_suffix(".bin")
    try:
        content, tokens = np.memmap(index, np.uint8, "r"), np.memmap(binary, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise DataError(f"{index}: cannot be read together with {binary.name}: {error}") from None
    if len(content) < HEADER.size:
        raise DataError(f"{index}: not an index of Megatron's: too short")
    magic, version, code, sequences, marks = HEADER.unpack(content[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1 or code not in TYPES:
        raise DataError(f"{index}: not an index of Megatron's, version 1, with whole numbers")
    if len(content) != HEADER.size + 12 * sequences + 8 * marks:
        raise DataError(f"{index}: has {len(content)} bytes, not what its {sequences} sequences take")
    kind = np.dtype(TYPES[code])
    starts = HEADER.size + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * marks])
    lengths, offsets, begins = (
        content[start:end].view(dtype) for start, end, dtype in zip(starts, starts[1:], ("<i4", "<i8", "<i8"))
    )
    ends = offsets + lengths.astype(np.int64) * kind.itemsize
    if sequences and (lengths.min() < 0 or offsets.min() < 0 or ends.max() > len(tokens)):
        raise DataError(f"{index}: points beyond the {len(tokens)} bytes of {binary.name}")
    if marks and (begins.min() < 0 or begins.max() > sequences or (np.diff(begins) < 0).any()):
        raise DataError(f"{index}: its documents do not follow one another")
    for first, last in zip(begins, begins[1:]):
        parts = [tokens[offsets[i] : ends[i]].tobytes() for i in range(first, last)]
        yield np.frombuffer(b"".join(parts), kind)

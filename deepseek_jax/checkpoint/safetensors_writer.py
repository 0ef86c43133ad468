"""Write a Hugging Face directory's tensors one by one, whatever their total.

All names, dtypes and shapes are known before the first number, so every header can be written
first and each tensor put straight into its place; memory holds the caller's current tensor and no
more. The bytes are those that the safetensors library writes for the same tensors.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from io import FileIO
from pathlib import Path

import numpy as np

from deepseek_jax.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE
from deepseek_jax.checkpoint.staging import disk_errors
from deepseek_jax.checkpoint.tensors import DTYPES, MAX_DIMENSIONS, CheckpointError, TensorSpec, row_major
from deepseek_jax.checkpoint.untrusted import MAX_JSON_BYTES, is_count, shown

CHUNK_BYTES = 16 * 2**20
"""How much of a tensor is brought into the file's order at one time, where it lies in another."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str) -> int:
    """Bytes meant by `5GB`, `500MB`, `2GiB` or a plain number (GB is 10^9, GiB is 2^30).

    Raises:
        CheckpointError: one line, if it is nothing of the kind or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]I?|)B?\s*", text.upper(), re.ASCII)
    size = int(Decimal(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise CheckpointError(f"size {shown(text)}: write it as 5GB, 500MB, 2GiB or a number of bytes above 0")
    return size


def plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Which file holds which tensors, in the given order; file names are Hugging Face's.

    A file holds at most `max_shard_bytes` of tensors (its header comes on top), or one tensor that
    is larger than that.

    Raises:
        CheckpointError: one line naming the tensor, for one that cannot be stored or is given twice.
    """
    _check_specs(specs)
    shards: list[list[TensorSpec]] = []
    free = -1
    for spec in specs:
        if spec.nbytes > free:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(spec)
        free -= spec.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_tensors(
    directory: Path,
    specs: Sequence[TensorSpec],
    arrays: Iterable[np.ndarray],
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write `model.safetensors`, or shards and their index, into `directory` (see `staged_directory`).

    Args:
        directory: an existing directory without a checkpoint in it.
        specs: every tensor, in the order in which `arrays` yields them.
        arrays: the numbers; each may lie in memory in any order (a transpose is not copied whole).
        max_shard_bytes: see `plan_shards`.
        progress: called with the number of bytes written since the call before.

    Raises:
        CheckpointError: one line naming file and tensor: an array that is not as planned, too few or
            too many of them, no room on the disk.
    """
    shards = plan_shards(specs, max_shard_bytes)
    total = sum(spec.nbytes for spec in specs)
    free = shutil.disk_usage(directory).free
    if total > free:
        raise CheckpointError(f"{directory}: the disk has {free:,} bytes free and {total:,} are to be written")
    supply = iter(arrays)
    for name, shard in shards.items():
        _write_shard(directory / name, shard, supply, progress)
    if next(supply, None) is not None:
        raise CheckpointError(f"{directory}: more tensors came than the {len(specs)} planned")
    if len(shards) > 1:
        _write_index(directory / INDEX_FILE, shards, total)


def _write_shard(path: Path, shard: list[TensorSpec], supply: Iterator[np.ndarray], progress: Callable[[int], None]) -> None:
    header, offsets = _header(path, shard)
    with disk_errors(path):
        file = open(path, "xb", buffering=0)  # noqa: SIM115 (entered below, where errors are not the disk's)
    with file:
        with disk_errors(path):
            _write_all(file, memoryview(header))
        for spec in shard:
            array = _next_array(supply, spec)
            with disk_errors(path):
                file.seek(len(header) + offsets[spec.name])
                for piece in _pieces(array):
                    _write_all(file, piece)
                    progress(len(piece))


def _write_all(file: FileIO, piece: memoryview) -> None:
    while len(piece):
        piece = piece[file.write(piece) :]


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    if not specs:
        raise CheckpointError("a checkpoint of no tensors was asked for")
    seen = set()
    for spec in specs:
        if spec.name in seen:
            raise CheckpointError(f"{shown(spec.name)}: planned twice")
        if not spec.name.isprintable() or spec.name == "__metadata__":
            raise CheckpointError(f"{shown(spec.name)}: cannot be the name of a tensor")
        if spec.dtype not in DTYPES:
            raise CheckpointError(f"{shown(spec.name)}: dtype {shown(spec.dtype)} is none of {', '.join(DTYPES)}")
        if len(spec.shape) > MAX_DIMENSIONS or not all(map(is_count, spec.shape)):
            raise CheckpointError(f"{shown(spec.name)}: the shape {shown(spec.shape)} cannot be stored")
        seen.add(spec.name)


def _header(path: Path, shard: list[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The file's beginning, and where after it each tensor starts.

    Wide dtypes come first, so that every tensor starts at a multiple of its item size, which some
    readers need; the header is padded to a multiple of 8.
    """
    rank = {name: i for i, name in enumerate(DTYPES)}
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    end = 0
    for spec in sorted(shard, key=lambda spec: (-rank[spec.dtype], spec.name)):
        offsets[spec.name], end = end, end + spec.nbytes
        fields[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (offsets[spec.name], end)}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {len(shard)} tensors are too many for one file; give a smaller shard size")
    return len(text).to_bytes(8, "little") + text, offsets


def _next_array(supply: Iterator[np.ndarray], spec: TensorSpec) -> np.ndarray:
    array = next(supply, None)
    if array is None:
        raise CheckpointError(f"{spec.name}: planned, but no tensor came for it")
    if array.dtype != spec.numpy_dtype or array.shape != spec.shape:
        planned, came = f"{spec.numpy_dtype} {list(spec.shape)}", f"{array.dtype} {list(array.shape)}"
        raise CheckpointError(f"{spec.name}: planned as {planned} and came as {came}")
    return array


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The array's bytes in row-major order, some rows at a time."""
    if array.size == 0:
        return
    array = np.atleast_1d(array)
    rows = max(1, CHUNK_BYTES // (array.nbytes // len(array)))
    for start in range(0, len(array), rows):
        piece = row_major(array[start : start + rows], array.dtype)
        yield piece.reshape(-1).view(np.uint8).data


def _write_index(path: Path, shards: dict[str, list[TensorSpec]], total: int) -> None:
    weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with disk_errors(path), open(path, "x", encoding="utf-8") as file:
        json.dump(index, file, indent=2, ensure_ascii=False)
        file.write("\n")

"""Read a directory of safetensors files without trusting it and without holding it in memory.

The safetensors library's numpy interface does not know float8, and ml_dtypes does; the format is a
length, a JSON header and the tensors' bytes, so it is read here. Opening a directory reads headers
only and checks all of them against one another and against the files' sizes; after that no number
in a file can make `read` allocate more than the bytes that are really there.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.hf_files import INDEX_FILE, weight_files
from deepseek_jax.checkpoint.tensors import DTYPES, MAX_DIMENSIONS, CheckpointError, TensorDirectory, TensorSpec
from deepseek_jax.checkpoint.untrusted import MAX_JSON_BYTES, is_count, parse_object, shown


@dataclass(frozen=True, slots=True)
class StoredTensor(TensorSpec):
    """A tensor and where it lies: the bytes of `file` from `start` on."""

    file: Path
    start: int


class SafetensorsDirectory(TensorDirectory):
    """A Hugging Face directory's tensors: one `model.safetensors`, or shards, with their index or all of them.

    Attributes:
        path: the directory.
        entries: every tensor by name, file by file in the order in which the files hold them.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Read and check all headers.

        Raises:
            CheckpointError: one line naming the file, and the tensor where there is one.
        """
        self.path = Path(path)
        files, weight_map = weight_files(self.path)
        self.entries: dict[str, StoredTensor] = _read_shards(self.path, files, weight_map)

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` in an array of its own, so that letting go of it frees its memory.

        Raises:
            CheckpointError: if there is no such tensor, or the file changed since it was opened.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: holds no tensor {shown(name)}")
        # Bytes are copied rather than mapped: a mapped file that is cut short while it is being
        # read kills the process, and its pages count as the process's memory.
        array = np.empty(entry.shape, entry.numpy_dtype)
        rest = array.reshape(-1).view(np.uint8).data
        try:
            with open(entry.file, "rb", buffering=0) as file:
                file.seek(entry.start)
                while len(rest):
                    count = file.readinto(rest)
                    if not count:
                        raise CheckpointError(f"{entry.file}: {shown(name)}: the file was cut short while being read")
                    rest = rest[count:]
        except OSError as error:
            raise CheckpointError(f"{entry.file}: {shown(name)}: cannot be read: {error.strerror}") from None
        return array


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Their ranges are checked to fit dtype and shape and to fill the file with neither gap nor overlap.

    Raises:
        CheckpointError: one line naming the file, and the tensor where there is one.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
            if length > size - 8:
                raise CheckpointError(f"{path}: cut short: {size} bytes, and the header is said to have {length}")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes; at most {MAX_JSON_BYTES} are allowed")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: the header is not a JSON object; is this a safetensors file?")
    fields = parse_object(header, f"{path}: header")
    _check_metadata(path, fields.pop("__metadata__", {}))
    start = 8 + length
    tensors = [_entry(path, start, name, value) for name, value in fields.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    for tensor in tensors:
        if tensor.start != start:
            fault = "overlap those of the tensor before" if tensor.start < start else "leave a gap before"
            raise CheckpointError(f"{path}: {tensor.name}: its bytes {fault}")
        start += tensor.nbytes
    if start != size:
        fault = "is cut short" if start > size else "holds bytes that belong to no tensor"
        last = f" (last tensor {tensors[-1].name})" if tensors else ""
        raise CheckpointError(f"{path}: the file {fault}: {size} bytes, and its tensors end at {start}{last}")
    return {tensor.name: tensor for tensor in tensors}


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map text to text")


def _entry(path: Path, data_start: int, name: str, value: Any) -> StoredTensor:
    """The header's entry `name`, checked on its own; `data_start` is where the tensors' bytes begin."""
    where = f"{path}: {shown(name)}"
    if not name.isprintable():
        raise CheckpointError(f"{where}: a tensor's name must be printable")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header must give dtype, shape and data_offsets, and gives {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(is_count, shape)):
        raise CheckpointError(f"{where}: the shape {shown(shape)} is not at most {MAX_DIMENSIONS} whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)} are not two whole numbers")
    begin, end = offsets
    tensor = StoredTensor(name, dtype, tuple(shape), path, data_start + begin)
    if tensor.nbytes != end - begin:
        takes = f"{dtype} {shown(shape)} takes {tensor.nbytes} bytes"
        raise CheckpointError(f"{where}: {takes}; its data_offsets span {end - begin}")
    if 0 in shape and not _addressable(tensor):
        raise CheckpointError(f"{where}: the shape {shown(shape)} is beyond any memory")
    return tensor


def _addressable(tensor: TensorSpec) -> bool:
    """Whether numpy can hold the shape; it multiplies the sizes of an empty array too, leaving out the zeros."""
    return TensorSpec("", tensor.dtype, tuple(size or 1 for size in tensor.shape)).nbytes < 2**63


def _read_shards(directory: Path, files: list[Path], weight_map: dict[str, str] | None) -> dict[str, StoredTensor]:
    """All tensors of the files, checked to be where an index has them, if there is one."""
    entries: dict[str, StoredTensor] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in entries:
                raise CheckpointError(f"{entry.file}: {name}: given twice, in {entries[name].file.name} too")
            if weight_map is not None and name not in weight_map:
                raise CheckpointError(f"{entry.file}: {name}: is not in {INDEX_FILE}")
            entries[name] = entry
    for name, where in (weight_map or {}).items():
        if name not in entries:
            raise CheckpointError(f"{directory / where}: {shown(name)}: missing, though {INDEX_FILE} says it is there")
        if entries[name].file.name != where:
            raise CheckpointError(f"{entries[name].file}: {name}: {INDEX_FILE} says it is in {where}")
    return entries

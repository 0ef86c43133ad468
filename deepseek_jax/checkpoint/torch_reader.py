"""Read the files that `torch.save` wrote, sharded or not: tensors only, mapped, and one after another.

Needs torch, the extra of that name. Nothing in such a file is run: `weights_only` takes tensors and plain containers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.hf_files import weight_files
from deepseek_jax.checkpoint.tensors import CheckpointError, TensorDirectory, TensorSpec
from deepseek_jax.checkpoint.untrusted import shown

_DTYPES = {
    "float8_e8m0fnu": "F8_E8M0", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "float64": "F64", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32",
    "int64": "I64",
}  # fmt: skip
"""torch's names of dtypes, and those of `DTYPES`."""


@dataclass(frozen=True, slots=True)
class SavedTensor(TensorSpec):
    """A tensor and the file that it is in."""

    file: Path


class TorchDirectory(TensorDirectory):
    """As `safetensors_reader.SafetensorsDirectory`, of `.bin`, `.pt` or `.pth` files.

    Attributes:
        path: the directory.
        entries: every tensor by name, file by file.
    """

    def __init__(self, path: Path):
        """Map all files.

        Raises:
            CheckpointError: one line naming the file, and the tensor where there is one; or that torch is missing.
        """
        self.path = path
        self.entries: dict[str, SavedTensor] = {}
        self._tensors: dict[str, Any] = {}
        files, weight_map = weight_files(path)
        for file in files:
            for name, tensor in load(file).items():
                if name in self.entries:
                    raise CheckpointError(f"{file}: {shown(name)}: given twice, in {self.entries[name].file.name} too")
                self.entries[name] = SavedTensor(name, _dtype(file, name, tensor), tuple(tensor.shape), file)
                self._tensors[name] = tensor
        for name, where in (weight_map or {}).items():
            if name not in self.entries:
                raise CheckpointError(f"{path / where}: {shown(name)}: missing, though the index says it is there")

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` in an array of its own."""
        import torch

        if name not in self.entries:
            raise CheckpointError(f"{self.path}: holds no tensor {shown(name)}")
        entry, array = self.entries[name], np.empty(self.entries[name].shape, self.entries[name].numpy_dtype)
        bits = torch.from_numpy(array.reshape(-1).view(np.uint8))
        bits.view(self._tensors[name].dtype).copy_(self._tensors[name].reshape(-1))
        return array.reshape(entry.shape)


def load(file: Path) -> dict[str, Any]:
    """The tensors of one file, mapped and not read.

    Raises:
        CheckpointError: one line naming the file: torch is missing, or it is no mapping of names to tensors.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(f"{file}: reading it needs torch: pip install 'deepseek-jax[torch]'") from None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, for a file that is damaged, old, or more than tensors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        raise CheckpointError(f"{file}: torch cannot load it as mapped tensors alone: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}; names and their tensors are expected")
    for name, tensor in content.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise CheckpointError(f"{file}: {shown(name)}: a {kind}; only names and their tensors are expected")
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{file}: {name}: {tensor.layout}; only plain tensors are supported")
    return content


def _dtype(file: Path, name: str, tensor: Any) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {name}: dtype {dtype} is none of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]

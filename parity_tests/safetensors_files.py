"""Safetensors files and directories for tests, right ones and wrong ones."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from deepseek_jax.checkpoint.hf_files import INDEX_FILE
from deepseek_jax.checkpoint.safetensors_writer import write_tensors
from deepseek_jax.checkpoint.staging import staged_directory
from deepseek_jax.checkpoint.tensors import DTYPES, CheckpointError, TensorSpec

F8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16


def of_every_dtype(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random bits of every dtype, with odd sizes, an empty tensor and a scalar among them."""
    tensors = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        for shape in ((3, 5 + i), (7,), (), (0, 4)):
            bits = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
            tensors[f"layer.{len(shape)}.{'x'.join(map(str, shape))}.{name}"] = bits.view(dtype).reshape(shape)
    return tensors


def specs_of(tensors: dict[str, np.ndarray]) -> list[TensorSpec]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return [TensorSpec(name, names[array.dtype], array.shape) for name, array in tensors.items()]


def write(directory: Path, tensors: dict[str, np.ndarray], **options) -> Path:
    with staged_directory(directory) as partial:
        write_tensors(partial, specs_of(tensors), tensors.values(), **options)
    return directory


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def fails(action, *fragments: str) -> str:
    """Run `action`; it must raise a `CheckpointError` of one line with all `fragments`."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2000
    for fragment in fragments:
        assert fragment in message
    return message


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2,), data_offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **more}


def sharded(directory: Path, weight_map: object, **shards: dict[str, np.ndarray]) -> Path:
    directory.mkdir()
    for name, tensors in shards.items():
        safetensors.numpy.save_file(tensors, directory / f"{name}.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory

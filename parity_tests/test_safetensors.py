"""Reading and writing Hugging Face directories, against the safetensors library."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from deepseek_jax.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.tensors import DTYPES
from parity_tests.safetensors_files import BF16, fails, of_every_dtype, same, specs_of, write

FLOAT8 = ("F8_E4M3", "F8_E5M2")
TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


def as_torch(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype)
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).reshape(array.shape)


def test_our_file_is_byte_for_byte_the_librarys(tmp_path):
    tensors = of_every_dtype(np.random.default_rng(0))
    for fields in safetensors.deserialize((write(tmp_path / "all", tensors) / SINGLE_FILE).read_bytes()):
        assert bytes(fields[1]["data"]) == tensors[fields[0]].tobytes()
    narrow = [spec for spec in specs_of(tensors) if spec.dtype in TORCH_DTYPES]
    theirs = {spec.name: as_torch(tensors[spec.name], TORCH_DTYPES[spec.dtype]) for spec in narrow}
    ours = write(tmp_path / "torch", {spec.name: tensors[spec.name] for spec in narrow}) / SINGLE_FILE
    assert ours.read_bytes() == safetensors.torch.save(theirs, metadata={"format": "pt"})
    plain = {spec.name: tensors[spec.name] for spec in specs_of(tensors) if spec.dtype not in ("BF16", *FLOAT8)}
    ours = write(tmp_path / "numpy", plain) / SINGLE_FILE
    assert ours.read_bytes() == safetensors.numpy.save(plain, metadata={"format": "pt"})


@pytest.mark.parametrize("max_shard_bytes", [10**9, 64])
def test_ours_opens_in_the_library(tmp_path, max_shard_bytes):
    tensors = of_every_dtype(np.random.default_rng(1))
    written = write(tmp_path / "out", tensors, max_shard_bytes=max_shard_bytes)
    files = sorted(written.glob("*.safetensors"))
    seen = {}
    for file in files:
        with safetensors.safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            seen |= {name: opened.get_tensor(name) for name in opened.keys()}
    assert seen.keys() == tensors.keys()
    for spec in specs_of(tensors):
        value = seen[spec.name]
        assert tuple(value.shape) == spec.shape and value.dtype == TORCH_DTYPES.get(spec.dtype, value.dtype)
        assert value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == tensors[spec.name].tobytes()
    with safetensors.safe_open(files[0], framework="np") as opened:
        names = [name for name in opened.keys() if "F8" not in name]
        assert all(same(opened.get_tensor(name), tensors[name]) for name in names)
    if max_shard_bytes == 64:
        assert len(files) > 5
        index = json.loads((written / INDEX_FILE).read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    ours = SafetensorsDirectory(written)
    assert set(ours.names) == set(tensors) and ours.nbytes == sum(array.nbytes for array in tensors.values())
    assert all(same(ours.read(name), array) for name, array in tensors.items())


def test_the_librarys_opens_in_ours(tmp_path):
    rng = np.random.default_rng(2)
    bits = {name: torch.from_numpy(rng.integers(0, 256, (6, 16), np.uint8)) for name in TORCH_DTYPES}
    theirs = {name: bits[name].view(dtype) for name, dtype in TORCH_DTYPES.items()}
    safetensors.torch.save_file(theirs, tmp_path / SINGLE_FILE, metadata={"anything": "else"})
    directory = SafetensorsDirectory(tmp_path)
    assert set(directory.names) == set(TORCH_DTYPES)
    for name in TORCH_DTYPES:
        array = directory.read(name)
        assert directory.entries[name].dtype == name and array.dtype == DTYPES[name]
        assert array.tobytes() == bits[name].numpy().tobytes() and array.flags.writeable
    fails(lambda: directory.read("absent"), str(tmp_path), "absent")


def test_transposed_and_scattered_arrays_are_written_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_jax.checkpoint.safetensors_writer.CHUNK_BYTES", 100)
    stacked = np.random.default_rng(3).standard_normal((2, 31, 17)).astype(BF16)
    tensors = {"t": stacked[1].T, "s": stacked[:, ::3, 2], "r": stacked[0, ::-1], "0": stacked[0, 0, 0].reshape(())}
    counted = []
    ours = SafetensorsDirectory(write(tmp_path / "out", tensors, progress=counted.append))
    assert all(same(ours.read(name), array) for name, array in tensors.items())
    assert sum(counted) == ours.nbytes and max(counted) <= 100


def test_no_framework_is_imported():
    code = "import sys, deepseek_jax.checkpoint.{}; assert not {{'jax', 'torch'}} & set(sys.modules)"
    for module in ("safetensors_writer", "safetensors_reader", "fp8_blocks"):
        assert subprocess.run([sys.executable, "-c", code.format(module)]).returncode == 0

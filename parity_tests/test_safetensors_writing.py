"""Writing Hugging Face directories: shards, plans, and what stops a writer midway."""

import resource
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.checkpoint.hf_files import SINGLE_FILE
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.safetensors_writer import parse_size, plan_shards, write_tensors
from deepseek_jax.checkpoint.staging import staged_directory
from deepseek_jax.checkpoint.tensors import CheckpointError, TensorSpec
from parity_tests.safetensors_files import BF16, fails, same, write


def test_sizes():
    good = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "123": 123, "2gib": 2**31, "1.5 KB": 1500, "7B": 7, "3T": 3 * 10**12}
    assert {text: parse_size(text) for text in good} == good
    for text in ("", "GB", "5XB", "-5GB", "0", "0.1", "1e9", "5 G B", "٣GB", "nan", "9" * 40, "5GB\n5GB"):
        fails(lambda: parse_size(text), "5GB")


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=30), limit=st.integers(1, 60))
def test_shards_are_full_but_not_over(sizes, limit):
    specs = [TensorSpec(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    shards = list(plan_shards(specs, limit).values())
    assert [spec for shard in shards for spec in shard] == specs
    filled = [sum(spec.nbytes for spec in shard) for shard in shards]
    assert all(total <= limit or len(shard) == 1 for total, shard in zip(filled, shards))
    assert all(total + after[0].nbytes > limit for total, after in zip(filled, shards[1:]))


def test_shard_names():
    specs = [TensorSpec(name, "F32", (2,)) for name in "abc"]
    assert list(plan_shards(specs, 24)) == [SINGLE_FILE]
    assert list(plan_shards(specs, 16)) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("spec, fragment", [
    (TensorSpec("a", "F32", (1,)), "a: planned twice"), (TensorSpec("b", "F33", (1,)), "b: dtype F33"),
    (TensorSpec("b", "F32", (-1,)), "b: the shape"), (TensorSpec("__metadata__", "F32", (1,)), "__metadata__"),
    (TensorSpec("b\n", "F32", (1,)), "cannot be the name"),
])  # fmt: skip
def test_a_plan_that_cannot_be_stored(spec, fragment):
    fails(lambda: plan_shards([TensorSpec("a", "F32", (1,)), spec], 100), fragment)


@pytest.mark.parametrize("second, fragment", [
    ([], "b: planned, but no tensor came"), ([np.ones((3, 2), np.float32)], "b: planned as float32 [2, 3]"),
    ([np.ones((2, 3), np.float64)], "b: planned as float32"), ([np.ones((2, 3), np.int32)], "b: planned as float32"),
    ([np.ones((2, 3), ">f4")], "b: planned as float32"), ([np.ones((2, 3), np.float32)] * 2, "more tensors"),
])  # fmt: skip
def test_arrays_not_as_planned_leave_nothing(tmp_path, second, fragment):
    specs = [TensorSpec("a", "BF16", (4,)), TensorSpec("b", "F32", (2, 3))]

    def convert():
        with staged_directory(tmp_path / "out") as partial:
            write_tensors(partial, specs, [np.ones(4, BF16), *second], max_shard_bytes=8)

    fails(convert, fragment)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted_and_run_again(tmp_path, stop):
    def arrays():
        yield np.zeros(4, np.float32)
        raise stop

    specs = [TensorSpec(name, "F32", (4,)) for name in "ab"]
    with pytest.raises(stop), staged_directory(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        write_tensors(partial, specs, arrays(), max_shard_bytes=16)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "out", {"a": np.zeros(4, np.float32)})
    assert SafetensorsDirectory(tmp_path / "out").names == ["a"] and len(list(tmp_path.iterdir())) == 1


def test_killed_and_run_again(tmp_path):
    """A killed process cannot tidy up: what is left looks like no checkpoint, and the next run clears it."""
    code = f"""
import os, signal, numpy as np
from deepseek_jax.checkpoint.staging import staged_directory
from deepseek_jax.checkpoint.safetensors_writer import write_tensors, TensorSpec
with staged_directory({str(tmp_path / "out")!r}) as partial:
    (partial / "folder").mkdir()
    (partial / "folder" / "file").touch()
    write_tensors(partial, [TensorSpec("a", "F32", (4,))], [np.zeros(4, np.float32)])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.deepseek-jax-partial" and (left / SINGLE_FILE).exists()
    write(tmp_path / "out", {"b": np.zeros(4, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [SINGLE_FILE]


def test_a_place_that_is_taken(tmp_path):
    array = {"a": np.zeros(4, np.float32)}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", array)
    write(tmp_path / "new" / "deep", array)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("absent")
    for name in ("empty", "file", "link"):
        fails(lambda: write(tmp_path / name, array), name, "is there already")
    fails(lambda: write(tmp_path / "file" / "below", array), "file")
    with staged_directory(tmp_path / "two"):
        fails(lambda: write(tmp_path / "two", array), "another process is writing")
    with pytest.raises(CheckpointError, match="cannot be written"), staged_directory(tmp_path / "late") as partial:
        (partial / "file").touch()
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "other").touch()
    assert (tmp_path / "file").read_text() == "mine" and [p.name for p in (tmp_path / "late").iterdir()] == ["other"]
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    (tmp_path / ".trap.deepseek-jax-partial").symlink_to(victim)
    fails(lambda: write(tmp_path / "trap", array), "cannot be written")
    assert (victim / "precious").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    array = {"a": np.zeros(100_000, np.float32)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        fails(lambda: write(tmp_path / "out", array), SINGLE_FILE, "the disk is full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 399_999}))
    fails(lambda: write(tmp_path / "out", array), "399,999 bytes free", "400,000")
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Copying forty tensors holds at most two at once: the one being written and the one being read."""
    one = np.zeros((1024, 256), np.float32)
    source = write(tmp_path / "in", {f"t{i}": one for i in range(40)}, max_shard_bytes=5 * one.nbytes)
    tracemalloc.start()
    try:
        directory = SafetensorsDirectory(source)
        with staged_directory(tmp_path / "out") as partial:
            write_tensors(partial, list(directory.entries.values()), map(directory.read, directory.names))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * one.nbytes
    assert all(same(read, one) for read in map(SafetensorsDirectory(tmp_path / "out").read, directory.names))

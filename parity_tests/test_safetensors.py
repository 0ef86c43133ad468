"""Reading and writing Hugging Face directories, against the safetensors library and against malice."""

import json
import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepseek_jax.checkpoint.fp8_blocks import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    check_scales,
    dequantize_blocks,
    quantize_blocks,
    requantize_blocks,
    scale_shape,
)
from deepseek_jax.checkpoint.safetensors_reader import INDEX_FILE, SINGLE_FILE, SafetensorsDirectory, read_header
from deepseek_jax.checkpoint.safetensors_writer import parse_size, plan_shards, write_tensors
from deepseek_jax.checkpoint.staging import staged_directory
from deepseek_jax.checkpoint.tensors import DTYPES, CheckpointError, TensorSpec

F8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
FLOAT8 = ("F8_E4M3", "F8_E5M2")
TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


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


# The library as oracle.


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


# Files that lie.


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(2,), data_offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **more}


LIES = {
    "empty": (b"", "too short"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "too short"),
    "header beyond the file": (file_of({}, length=3), "cut short"),
    "header of exabytes": (file_of({}, length=2**64 - 1), "cut short"),
    "no header": (file_of(b""), "not a JSON object"),
    "a list": (file_of([]), "not a JSON object"),
    "space first": (file_of(b" {}"), "not a JSON object"),
    "not JSON": (file_of(b"{nonsense"), "not JSON"),
    "NaN": (file_of(b'{"a": NaN}'), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not UTF-8"),
    "nested": (file_of(b'{"a":' * 200_000), "too deep"),
    "long number": (file_of(b'{"a":' + b"9" * 9999 + b"}"), "too long"),
    "key twice": (file_of(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "dtype is given twice"),
    "tensor twice": (file_of(b'{"a":{},"a":{}}'), "a is given twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (file_of({"__metadata__": []}), "__metadata__"),
    "entry not an object": (file_of({"w": 3}), "w:"),
    "no dtype": (file_of({"w": {"shape": [], "data_offsets": [0, 0]}}), "w:"),
    "field too many": (file_of({"w": tensor(stride=[1])}, bytes(8)), "w:"),
    "unknown dtype": (file_of({"w": tensor("F4")}, bytes(8)), "w: unknown dtype F4"),
    "dtype a list": (file_of({"w": tensor(["F32"])}, bytes(8)), "w: unknown dtype"),
    "negative": (file_of({"w": tensor(shape=[-2])}, bytes(8)), "w: the shape"),
    "two negatives": (file_of({"w": tensor(shape=[-2, -1])}, bytes(8)), "w: the shape"),
    "bool": (file_of({"w": tensor(shape=[True, 2])}, bytes(8)), "w: the shape"),
    "float": (file_of({"w": tensor(shape=[2.0])}, bytes(8)), "w: the shape"),
    "huge": (file_of({"w": tensor(shape=[2**62, 2**62])}, bytes(8)), "w: F32"),
    "beyond 63 bits": (file_of({"w": tensor(shape=[2**63])}, bytes(8)), "w: the shape"),
    "huge and empty": (file_of({"w": tensor(shape=[2**62, 2**62, 0], data_offsets=[0, 0])}), "beyond any memory"),
    "many dimensions": (file_of({"w": tensor(shape=[1] * 65, data_offsets=[0, 4])}, bytes(4)), "w: the shape"),
    "many huge dimensions": (file_of({"w": tensor(shape=[10**4000] * 2000)}, bytes(8)), "w: the shape"),
    "size and range differ": (file_of({"w": tensor(shape=[3])}, bytes(8)), "w: F32 [3] takes 12 bytes"),
    "range backwards": (file_of({"w": tensor(shape=[0], data_offsets=[8, 0])}, bytes(8)), "w: F32 [0]"),
    "one offset": (file_of({"w": tensor(data_offsets=[8])}, bytes(8)), "data_offsets"),
    "negative offset": (file_of({"w": tensor(data_offsets=[-8, 0])}, bytes(8)), "data_offsets"),
    "data cut short": (file_of({"w": tensor()}, bytes(7)), "cut short"),
    "data left over": (file_of({"w": tensor()}, bytes(9)), "belong to no tensor"),
    "gap": (file_of({"v": tensor(), "w": tensor(data_offsets=[9, 17])}, bytes(17)), "w: its bytes leave a gap"),
    "gap at the start": (file_of({"w": tensor(data_offsets=[8, 16])}, bytes(16)), "w: its bytes leave a gap"),
    "overlap": (file_of({"v": tensor(), "w": tensor(data_offsets=[4, 12])}, bytes(12)), "w: its bytes overlap"),
    "same range": (file_of({"v": tensor(), "w": tensor()}, bytes(8)), "its bytes overlap"),
    "line feed in a name": (file_of({"a\nb": tensor()}, bytes(8)), "printable"),
    "half a surrogate": (file_of(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "printable"),
    "a name without end": (file_of({"n" * 100_000: 1}), "nnn"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_named_in_one_line(tmp_path, lie):
    content, fragment = LIES[lie]
    (tmp_path / SINGLE_FILE).write_bytes(content)
    fails(lambda: SafetensorsDirectory(tmp_path), str(tmp_path / SINGLE_FILE), fragment)


def test_a_file_cut_short_after_opening(tmp_path):
    write(tmp_path / "out", {"w": np.ones(5000, np.float32)})
    directory = SafetensorsDirectory(tmp_path / "out")
    os.truncate(tmp_path / "out" / SINGLE_FILE, 9000)
    fails(lambda: directory.read("w"), SINGLE_FILE, "w: the file was cut short")
    os.remove(tmp_path / "out" / SINGLE_FILE)
    fails(lambda: directory.read("w"), SINGLE_FILE, "w: cannot be read")


def open_measured(directory: Path, nbytes: int) -> SafetensorsDirectory | None:
    """Open within memory that follows the size of the files; None after a refusal of one line."""
    tracemalloc.start()
    try:
        return SafetensorsDirectory(directory)
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000 + 50 * nbytes


def open_untrusted(file: Path, content: bytes) -> None:
    """Write, open and read everything; only a refusal or the library's own view may come out."""
    file.write_bytes(content)
    directory = open_measured(file.parent, len(content))
    if directory is None:
        return
    theirs = dict(safetensors.deserialize(content))
    assert set(theirs) == set(directory.names)
    for name, entry in directory.entries.items():
        array = directory.read(name)
        assert array.nbytes <= len(content)
        assert array.tobytes() == bytes(theirs[name]["data"])
        assert list(array.shape) == theirs[name]["shape"] and entry.dtype == theirs[name]["dtype"]


fuzzing = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
sizes = st.integers(0, 5) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, True, 1.0, None, "2"])


@st.composite
def nearly_right_headers(draw):
    """A header whose tensors lie one behind the other, with perhaps one thing replaced."""
    header, end = {}, 0
    for name in draw(st.lists(st.text(max_size=4), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        begin, end = end, end + TensorSpec(name, dtype, tuple(shape)).nbytes
        header[name] = tensor(dtype, shape, [begin, end])
    data = bytes(range(256)) * (end // 256 + 1)
    if header and draw(st.booleans()):
        entry = header[draw(st.sampled_from(sorted(header)))]
        field = draw(st.sampled_from(sorted(entry)))
        if isinstance(entry[field], list) and entry[field] and draw(st.booleans()):
            entry[field][draw(st.integers(0, len(entry[field]) - 1))] = draw(sizes)
        else:
            entry[field] = draw(json_values)
    return header, data[: end + draw(st.sampled_from([0, 0, 0, -1, 1]))]


@fuzzing
@given(content=st.binary(max_size=200))
@example(content=b"\xff" * 8)
def test_fuzz_any_bytes(tmp_path, content):
    open_untrusted(tmp_path / SINGLE_FILE, content)


@fuzzing
@given(header=json_values, data=st.binary(max_size=20), stretch=st.sampled_from([0, 0, -1, 1, 2**40]))
def test_fuzz_any_json(tmp_path, header, data, stretch):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    open_untrusted(tmp_path / SINGLE_FILE, file_of(text, data, max(0, len(text) + stretch)))


@fuzzing
@given(pair=nearly_right_headers())
def test_fuzz_nearly_right(tmp_path, pair):
    open_untrusted(tmp_path / SINGLE_FILE, file_of(*pair))


@fuzzing
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3))
def test_fuzz_edited_file(tmp_path, edits):
    tensors = {"a": tensor(), "b": tensor("BF16", (2, 3), (8, 20)), "c": tensor("F8_E4M3", (), (20, 21))}
    content = file_of(tensors, bytes(21))
    for place, inserted, removed in edits:
        content = content[:place] + inserted + content[place + removed :]
    open_untrusted(tmp_path / SINGLE_FILE, content)


@fuzzing
@given(
    index=json_values,
    weight_map=st.none() | st.dictionaries(st.sampled_from("abc"), st.sampled_from(["1", "2", ""]) | json_values),
)
@example(index=None, weight_map={"a": "1", "b": "2", "c": "2"})
def test_fuzz_index(tmp_path, index, weight_map):
    if weight_map is not None:
        index = {"weight_map": weight_map}
    (tmp_path / "1").write_bytes(file_of({"a": tensor()}, bytes(8)))
    (tmp_path / "2").write_bytes(file_of({"b": tensor(), "c": tensor("U8", [1], [8, 9])}, bytes(9)))
    content = json.dumps(index).encode()
    (tmp_path / INDEX_FILE).write_bytes(content)
    directory = open_measured(tmp_path, len(content))
    if directory is not None:
        assert {name: entry.file.name for name, entry in directory.entries.items()} == weight_map


# Directories that lie.


def sharded(directory: Path, weight_map: object, **shards: dict[str, np.ndarray]) -> Path:
    directory.mkdir()
    for name, tensors in shards.items():
        safetensors.numpy.save_file(tensors, directory / f"{name}.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_an_index_that_is_wrong(tmp_path):
    one = np.ones(3, np.float32)
    both = {"a": "x.safetensors", "b": "y.safetensors"}
    cases = iter(range(1000))

    def refused(weight_map, *fragments, **shards):
        directory = sharded(tmp_path / str(next(cases)), weight_map, **shards)
        fails(lambda: SafetensorsDirectory(directory), str(directory), *fragments)

    assert SafetensorsDirectory(sharded(tmp_path / "good", both, x={"a": one}, y={"b": one})).names == ["a", "b"]
    refused(both, "y.safetensors", "no such file", x={"a": one})
    refused(both, "y.safetensors", "b: missing", x={"a": one}, y={})
    refused(both, "x.safetensors", "c: is not in", x={"a": one, "c": one}, y={"b": one})
    refused(both, "y.safetensors", "a: given twice", "x.safetensors", x={"a": one}, y={"a": one, "b": one})
    refused(both, "b: model.safetensors.index.json says it is in y", x={"a": one, "b": one}, y={})
    for outside in ("../good/x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "a\nb"):
        refused({"a": outside}, INDEX_FILE, "is not the name of a file")
    refused({"a": 3}, "a: 3 is not the name of a file")
    refused({"a": "n" * 5000}, "cannot be read")
    refused({}, "weight_map")
    refused([], "weight_map")


def test_links_and_odd_files(tmp_path):
    one = {"a": np.ones(3, np.float32)}
    secret = sharded(tmp_path / "elsewhere", {}, x=one) / "x.safetensors"
    for number, make in enumerate([
        lambda path: path.symlink_to(secret), lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("absent"), os.mkfifo, Path.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
    ]):  # fmt: skip
        directory = sharded(tmp_path / str(number), {"a": "x.safetensors"})
        make(directory / "x.safetensors")
        fails(lambda: SafetensorsDirectory(directory), str(directory), "x.safetensors")
        (directory / INDEX_FILE).unlink()
        os.rename(directory / "x.safetensors", directory / SINGLE_FILE)
        fails(lambda: SafetensorsDirectory(directory), SINGLE_FILE)
    inner = sharded(tmp_path / "inner", {"a": "x.safetensors"}, z=one)
    (inner / "x.safetensors").symlink_to("z.safetensors")
    assert SafetensorsDirectory(inner).names == ["a"]


def test_the_hub_cache_opens(tmp_path):
    """There every file of a snapshot is a link to a blob of the repository, or through it to one of the whole cache."""
    repository = tmp_path / "models--who--what"
    snapshot, blobs, store = repository / "snapshots" / "0ab1", repository / "blobs", tmp_path / "blobs" / "77"
    for folder in (snapshot, blobs, store):
        folder.mkdir(parents=True)
    safetensors.numpy.save_file({"a": np.ones(3)}, store / "777")
    (blobs / "5555").symlink_to("../../blobs/77/777")
    (snapshot / SINGLE_FILE).symlink_to("../../blobs/5555")
    assert SafetensorsDirectory(snapshot).read("a").sum() == 3
    (snapshot / SINGLE_FILE).unlink()
    (snapshot / SINGLE_FILE).symlink_to("../../refs")
    (repository / "refs").write_bytes((store / "777").read_bytes())
    fails(lambda: SafetensorsDirectory(snapshot), "leads out of its directory")


def test_no_checkpoint_there(tmp_path):
    fails(lambda: SafetensorsDirectory(tmp_path), str(tmp_path), "neither")
    fails(lambda: SafetensorsDirectory(tmp_path / "absent"), "not a directory")
    (tmp_path / SINGLE_FILE).touch()
    (tmp_path / INDEX_FILE).touch()
    fails(lambda: SafetensorsDirectory(tmp_path), "both")


# Writing.


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


# FP8 blocks.

RAGGED = [(256, 384), (130, 257), (127, 1), (1, 129), (300, 128), (0, 5), (5, 0)]


def reference_quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one block at a time, with ml_dtypes' own cast."""
    codes, scales = np.zeros(w.shape, F8), np.zeros(scale_shape(w.shape), np.float32)
    for i, j in np.ndindex(scales.shape):
        block = np.s_[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
        scales[i, j] = np.maximum(np.abs(w[block]).max(), np.float32(1e-4)) / np.float32(448)
        codes[block] = np.clip(w[block] / scales[i, j], -448, 448).astype(F8)
    return codes, scales


def awkward_weights(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Blocks of many magnitudes with zeros of both signs, tiny blocks and outliers."""
    rng = np.random.default_rng(seed)
    w = (
        rng.standard_normal(shape)
        * 10.0 ** rng.integers(-12, 8, scale_shape(shape)).repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
    )
    w[rng.random(shape) < 0.02] *= 300
    w[rng.random(shape) < 0.02] = 0.0
    w[rng.random(shape) < 0.02] = -0.0
    return w.astype(np.float32)


@pytest.mark.parametrize("shape", RAGGED)
def test_quantiser_is_its_definition_bit_for_bit(shape):
    w = awkward_weights(shape, seed=sum(shape))
    for weights in (w, w.astype(BF16), np.asfortranarray(w)):
        codes, scales = quantize_blocks(weights, "w")
        expected_codes, expected_scales = reference_quantize(weights.astype(np.float32))
        assert same(codes, expected_codes) and same(scales, expected_scales)
        expanded = scales.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
        assert same(dequantize_blocks(codes, scales, "w"), codes.astype(np.float32) * expanded)


def test_rounding_is_the_casts_for_every_bfloat16_and_its_neighbours():
    """Every tie and every code's edge is within one bit of a bfloat16."""
    bits = (np.arange(2**16, dtype=np.uint32) << 16)[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF], np.uint32)
    x = bits.view(np.float32)
    x = np.append(x[np.abs(x) <= 448], np.float32(448)).reshape(1, -1)
    x = np.pad(x, ((0, 0), (0, -x.size % 127))).reshape(-1, 127)
    x = np.concatenate([np.full((len(x), 1), 448, np.float32), x], axis=1)
    codes, scales = quantize_blocks(x, "x")
    assert (scales == 1).all() and same(codes, x.astype(F8))


def every_code(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    return codes.view(F8)


@pytest.mark.parametrize("kind", [np.float32, np.float64, BF16])
@pytest.mark.parametrize("shape", RAGGED)
def test_kept_scales_give_the_same_bytes_back(shape, kind):
    """Whatever the codes, and for scales over float32's whole range."""
    rng = np.random.default_rng(5)
    codes = every_code(rng, shape)
    exponents = rng.uniform(-116, 60, scale_shape(shape))
    scales = (2.0**exponents).astype(np.float32)
    weights = dequantize_blocks(codes, scales, "w").astype(kind)
    assert same(requantize_blocks(weights, scales), codes)
    extremes = np.full_like(scales, SMALLEST_SCALE), np.full_like(scales, LARGEST_SCALE)
    for scales in extremes if kind != BF16 else extremes[:1]:
        assert same(requantize_blocks(dequantize_blocks(codes, scales, "w").astype(kind), scales), codes)


def test_recomputed_scales_need_not_be_the_ones_that_came():
    """They are for what `quantize_blocks` wrote from magnitudes above its floor, and not in general."""
    codes, scales = quantize_blocks(awkward_weights((512, 640), seed=9), "w")
    weights = dequantize_blocks(codes, scales, "w")
    again_codes, again = quantize_blocks(weights, "w")
    floored = scales == np.float32(1e-4) / np.float32(448)
    assert 0 < floored.mean() < 1 and same(again, scales) and same(again_codes, codes)
    powers = np.exp2(np.ceil(np.log2(scales)))
    codes = requantize_blocks(np.zeros_like(weights), powers)
    codes = (weights / powers.repeat(128, 0).repeat(128, 1)).astype(F8)
    weights = dequantize_blocks(codes, powers, "w")
    assert not same(quantize_blocks(weights, "w")[1], powers)
    assert same(requantize_blocks(weights, powers), codes)


def test_trained_weights_are_not_explained_by_old_scales():
    codes, scales = quantize_blocks(awkward_weights((200, 200), seed=4), "w")
    weights = dequantize_blocks(codes, scales, "w")
    assert requantize_blocks(weights, scales) is not None
    weights[150, 190] = np.nextafter(weights[150, 190], np.float32(np.inf))
    assert requantize_blocks(weights, scales) is None
    weights[150, 190] = np.nan
    assert requantize_blocks(weights, scales) is None
    weights[150, 190] = 3e38
    assert requantize_blocks(weights, scales) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-37, 1e37])
def test_scales_that_cannot_be(bad):
    codes, scales = quantize_blocks(np.ones((200, 300), np.float32), "w")
    scales[1, 2] = bad
    fails(lambda: dequantize_blocks(codes, scales, "f.safetensors: X"), "f.safetensors: X: scale [1, 2] is")


def test_scales_of_another_shape():
    codes, scales = quantize_blocks(np.ones((200, 300), np.float32), "w")
    for wrong in (scales[:1], scales.T, scales.astype(np.float64), scales.reshape(-1)):
        fails(lambda: dequantize_blocks(codes, wrong, "X"), "X: scales", "do not fit", "[2, 3]")
    fails(lambda: check_scales(scales, (6,), "X"), "X: scales")
    fails(lambda: quantize_blocks(np.ones(3), "X"), "X:", "only matrices")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_float8_cannot_hold(bad):
    weights = np.ones((200, 300), np.float32)
    weights[140, 299] = bad
    fails(lambda: quantize_blocks(weights, "X"), "X: NaN or infinity in block [1, 2]")


def test_a_code_that_is_nan_stays_visible():
    codes, scales = quantize_blocks(np.ones((3, 3), np.float32), "w")
    codes.view(np.uint8)[1, 1] = 0xFF
    assert np.argwhere(np.isnan(dequantize_blocks(codes, scales, "w"))).tolist() == [[1, 1]]


def test_blocks_through_a_file(tmp_path):
    codes, scales = quantize_blocks(awkward_weights((200, 300), seed=6), "w")
    ours = SafetensorsDirectory(write(tmp_path / "out", {"x.weight": codes, "x.weight_scale_inv": scales}))
    assert [entry.dtype for entry in read_header(tmp_path / "out" / SINGLE_FILE).values()] == ["F32", "F8_E4M3"]
    assert same(ours.read("x.weight"), codes) and same(ours.read("x.weight_scale_inv"), scales)
    with safetensors.safe_open(tmp_path / "out" / SINGLE_FILE, framework="pt") as opened:
        weight, scale = opened.get_tensor("x.weight").float(), opened.get_tensor("x.weight_scale_inv")
    theirs = weight * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert same(theirs.numpy(), dequantize_blocks(codes, scales, "w"))


def test_no_framework_is_imported():
    code = "import sys, deepseek_jax.checkpoint.{}; assert not {{'jax', 'torch'}} & set(sys.modules)"
    for module in ("safetensors_writer", "safetensors_reader", "fp8_blocks"):
        assert subprocess.run([sys.executable, "-c", code.format(module)]).returncode == 0

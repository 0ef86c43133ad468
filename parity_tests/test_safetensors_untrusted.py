"""Files and directories that lie: a refusal of one line, or what the safetensors library reads in them."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_jax.checkpoint.hf_files import INDEX_FILE, SINGLE_FILE
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.tensors import DTYPES, CheckpointError, TensorSpec
from parity_tests.safetensors_files import fails, file_of, sharded, tensor, write

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


fuzzing = settings(max_examples=400)
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

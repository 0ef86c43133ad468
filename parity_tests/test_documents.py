"""Text files to documents, and the part that is held out."""

import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.documents import DataError, Texts, find_files, read_documents, split_documents
from deepseek_jax.data.shuffle import permute
from parity_tests.texts import SMALL, one_line


def test_every_kind_of_file_gives_its_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufefföne\r\ntwo\n".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "three", "other": 1}\n\n{"text": "f\\u00f6ur", "other": {"x": []}}\n')
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["five", "six"]}), tmp_path / "c.parquet")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "d.md").write_text("seven")
    (tmp_path / "deep" / "empty.py").write_text("")
    (tmp_path / "deep" / "picture.png").write_bytes(b"\0\1")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "e.txt").write_text("never")
    expected = ["öne\r\ntwo\n", "three", "föur", "five", "six", "seven"]
    assert list(read_documents([str(tmp_path)])["text"]) == expected
    assert list(read_documents([str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])["text"]) == expected[:1]
    assert [path.name for path in find_files([str(tmp_path / "**" / "*.md")])] == ["d.md"]


def test_reading_leaves_the_home_directory_and_the_settings_alone(tmp_path, text_file, monkeypatch):
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    program = (
        "import socket, sys; socket.socket.connect = None\n"
        "from deepseek_jax.data.documents import read_documents\n"
        "assert len(read_documents(sys.argv[1:])) == 1\n"
        "assert not {'jax', 'torch'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(scratch)}
    done = subprocess.run([sys.executable, "-c", program, text_file], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(home.iterdir()) and not list(scratch.iterdir())


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n", "nothing but blanks"),
    "binary.txt": (b"text\0text", "is binary (a zero at byte 4)"),
    "latin1.txt": ("née".encode("latin-1"), "not UTF-8 (byte 1)"),
    "broken.jsonl": (b'{"text": "x"}\n{"text": \n', "broken.jsonl:2: not JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: not JSON"),
    "list.jsonl": (b"[1]", "list.jsonl:1: has no text"),
    "number.jsonl": (b'{"text": 5}', "number.jsonl:1: has no text"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', "surrogate.jsonl:1: has half a surrogate pair"),
    "binary.jsonl": (b'{"text": "x"}\n\xff\n', "binary.jsonl:2: is not UTF-8"),
    "broken.parquet": (b"PAR1 and no more", "not a sound parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_that_names_it(tmp_path, name):
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_documents([str(tmp_path / name)])
    one_line(error, str(tmp_path / name), reason)


def test_bad_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    for column, values, reason in (("body", ["x"], "no column `text` among body"), ("text", ["x", None], "row 2"),
                                   ("text", [1], "row 1 holds int")):  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table({column: values}), path)
        with pytest.raises(DataError) as error:
            read_documents([str(path)])
        one_line(error, str(path), reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.txt", "no such file"),
        ("*.none", "matches no file"),
        ("/dev/null", "no ordinary file"),
        ("", "holds no text file"),
    ],
)
def test_input_that_is_no_text(tmp_path, name, reason):
    with pytest.raises(DataError) as error:
        read_documents([str(tmp_path / name)])
    one_line(error, reason)


def dataset_of(texts: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts})


@SMALL
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12), st.floats(0.01, 0.9), st.integers(0, 9))
def test_split_loses_nothing(texts, fraction, seed):
    total = sum(len(text.encode()) for text in texts)
    try:
        train, held_out = (list(part) for part in split_documents(dataset_of(texts), fraction, seed))
    except DataError:
        assert total < 8 or fraction > 0.5  # One character too wide to be cut.
        return
    assert train and held_out and all(train) and all(held_out)
    joined = "".join(train) + "".join(held_out)
    assert joined == "".join(texts[i] for i in permute(np.arange(len(texts)), len(texts), seed))
    held_out_bytes = len("".join(held_out).encode())
    assert abs(held_out_bytes - total * fraction) <= total * fraction + 4
    assert [list(part) for part in split_documents(dataset_of(texts), fraction, seed)] == [train, held_out]


def test_one_long_document_is_cut_at_a_line():
    text = "".join(f"line {i}, ünd more\n" for i in range(1000))
    train, held_out = split_documents(dataset_of([text]), 0.1, seed=0)
    ((head,), (tail,)) = list(train), list(held_out)
    assert head + tail == text and head.endswith("\n")
    assert abs(len(tail) / len(text) - 0.1) < 0.002


def test_texts_iterate_again(tokenizer):
    texts = Texts(dataset_of(["b"]), before=("a",), after=("c",))
    assert len(texts) == 3 and list(texts) == list(texts) == ["a", "b", "c"]

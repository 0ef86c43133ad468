"""Text to tokens and batches: nothing lost, nothing twice, the same every time, and bad input told in one line."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from deepseek_jax.config import Config, load_config
from deepseek_jax.data import packing
from deepseek_jax.data.documents import DataError, Texts, find_files, read_documents, split_documents
from deepseek_jax.data.loader import Windows, window_length
from deepseek_jax.data.packing import is_prepared, prepare, write_tokens
from deepseek_jax.data.shuffle import permute
from deepseek_jax.data.tokenizer import (
    END_OF_DOCUMENT,
    PIECE_CHARACTERS,
    end_of_document_id,
    load_tokenizer,
    pieces,
    token_byte_lengths,
    train_tokenizer,
)

TEXT = Path(packing.__file__).read_text() * 2
VOCAB_SIZE = 320
SMALL = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], VOCAB_SIZE)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def tiny(*inputs: Path | str, **data) -> Config:
    config = load_config("tiny")
    fields = {"input": [str(name) for name in inputs], "held_out_fraction": 0.05, **data}
    return replace(config, data=replace(config.data, **fields))


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


# Documents.


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


# Tokenizer.


@SMALL
@given(st.text(max_size=80) | st.text("\n\r\t \u00a0_a1.é{END", max_size=80))
def test_any_text_comes_back(tokenizer, text):
    text += END_OF_DOCUMENT  # It stands in the text, so it is text.
    ids = tokenizer.encode(text).ids
    assert end_of_document_id(tokenizer) not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert token_byte_lengths(tokenizer, VOCAB_SIZE)[ids].sum() == len(text.encode())


def test_tokenizer_is_the_same_in_every_process(tokenizer, text_file):
    program = (
        "import sys, pathlib; from deepseek_jax.data.tokenizer import train_tokenizer\n"
        f"print(train_tokenizer([pathlib.Path(sys.argv[1]).read_text()], {VOCAB_SIZE}).to_str())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", program, text_file], env=environment, capture_output=True, text=True)
    assert other.stdout.strip() == tokenizer.to_str()


def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tokenizer):
    text = TEXT.replace("\n", "\n  ") * (3 * PIECE_CHARACTERS // len(TEXT) + 1)
    parts = list(pieces(text))
    assert len(parts) > 3 and "".join(parts) == text and max(map(len, parts)) <= PIECE_CHARACTERS
    assert [i for part in parts for i in tokenizer.encode(part).ids] == tokenizer.encode(text).ids
    wall = "x" * (2 * PIECE_CHARACTERS) + "\n" + " " * PIECE_CHARACTERS + "y"
    parts = list(pieces(wall))
    assert "".join(parts) == wall and max(map(len, parts)) <= PIECE_CHARACTERS
    assert tokenizer.decode([i for part in parts for i in tokenizer.encode(part).ids]) == wall


def test_loading_gives_back_the_tokenizer_without_truncation(tokenizer, tmp_path):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=9)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXT).ids == tokenizer.encode(TEXT).ids
    assert loaded.encode(END_OF_DOCUMENT).ids == tokenizer.encode(END_OF_DOCUMENT).ids


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"model": {"type": "BPE", "vocab": 1}}'])
def test_bad_tokenizer_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_tokenizer(path)
    one_line(error, str(path))


@pytest.mark.parametrize("name", ["<｜end▁of▁sentence｜>", "</s>", "<|endoftext|>"])
def test_end_of_document_of_known_tokenizers(name):
    other = Tokenizer(models.BPE())
    with pytest.raises(DataError):
        end_of_document_id(other)
    other.add_special_tokens(["<other>", name])
    assert end_of_document_id(other) == 1


def test_byte_lengths_of_added_and_byte_fallback_tokens(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens([AddedToken("ünd", special=False)])
    lengths = token_byte_lengths(other, VOCAB_SIZE + 5)
    assert lengths.dtype == np.int32 and lengths.shape == (VOCAB_SIZE + 5,)
    assert lengths[other.token_to_id("ünd")] == 4 and lengths[0] == 0 and not lengths[VOCAB_SIZE + 1 :].any()
    with pytest.raises(DataError, match=r"model\.vocab_size=320: .* at least 321"):
        token_byte_lengths(other, VOCAB_SIZE)

    spiece = Tokenizer(models.BPE({"▁né": 0, "<0x0A>": 1, "e": 2}, [], byte_fallback=True))
    spiece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert list(token_byte_lengths(spiece, 3)) == [4, 1, 1]


def test_vocabulary_without_room_for_every_byte():
    with pytest.raises(DataError, match=r"model\.vocab_size=256: .* at least 257"):
        train_tokenizer([TEXT], 256)


# Packing.


def test_tokens_are_the_documents_each_with_its_end(tokenizer, tmp_path):
    texts = ["one\n", "", TEXT, "  two"]
    count = write_tokens(texts, tokenizer, tmp_path / "tokens.npy")
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r", allow_pickle=False)
    expected = [i for text in texts for i in [*tokenizer.encode(text).ids, 0]]
    assert tokens.dtype == np.uint16 and len(tokens) == count and tokens.tolist() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


def test_large_vocabulary_takes_uint32(tmp_path):
    words = {"a": 0, "b": 70_000, "</s>": 70_001}
    write_tokens(["ab"], Tokenizer(models.BPE(words, [])), tmp_path / "tokens.npy")
    tokens = np.load(tmp_path / "tokens.npy")
    assert tokens.dtype == np.uint32 and tokens.tolist() == [0, 70_000, 70_001]


def test_failure_while_writing_leaves_the_old_file(tokenizer, tmp_path):
    path = tmp_path / "tokens.npy"
    write_tokens(["old"], tokenizer, path)
    before = path.read_bytes()

    class Breaks(list):
        def __iter__(self):
            yield "new" * 10**6
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(Breaks([0, 0]), tokenizer, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(DataError) as error:
        write_tokens(["x"], tokenizer, tmp_path / "none" / "tokens.npy")
    one_line(error, "none/tokens.npy: cannot be written")


def test_prepared_data_accounts_for_every_byte(tmp_path, text_file):
    config = tiny(text_file)
    data = prepare(config, tmp_path / "run")
    total = sum(int(data.token_bytes[tokens].sum()) for tokens in (data.train, data.held_out))
    assert total == text_file.stat().st_size
    assert 0.04 < len(data.held_out) / (len(data.held_out) + len(data.train)) < 0.06
    assert data.end_of_document == data.train[-1] == data.held_out[-1] == 0
    assert isinstance(data.train, np.memmap) and max(data.train.max(), data.held_out.max()) < config.model.vocab_size
    decoded = [data.tokenizer.decode(tokens[:-1].tolist()) for tokens in (data.train, data.held_out)]
    assert "".join(decoded) == TEXT
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == {"tokenizer.json", "data/train.npy", "data/held_out.npy", "data/fingerprint.json"}


def test_prepared_data_is_reused_until_something_changes(tmp_path, text_file, monkeypatch):
    run, made = tmp_path / "run", []
    make = packing._make
    monkeypatch.setattr(packing, "_make", lambda *args: (made.append(args), make(*args)))

    def times_made(config: Config) -> int:
        before = len(made)
        agreed = is_prepared(config, run)
        prepare(config, run)
        assert is_prepared(config, run) and agreed == (len(made) == before)
        return len(made) - before

    config = tiny(text_file)
    assert [times_made(config), times_made(config)] == [1, 0]
    assert times_made(replace(config, train=replace(config.train, steps=7))) == 0
    assert times_made(tiny(text_file, seed=1)) == 1
    larger = replace(config, model=replace(config.model, vocab_size=330))
    assert [times_made(larger), times_made(config)] == [1, 1]
    text_file.write_text(TEXT + "more")
    assert [times_made(config), times_made(config)] == [1, 0]
    (run / "data" / "train.npy").write_bytes((run / "data" / "train.npy").read_bytes()[:-1])
    assert [times_made(config), times_made(config)] == [1, 0]
    (run / "data" / "fingerprint.json").write_text("{")
    assert times_made(config) == 1


def test_same_text_gives_the_same_files(tmp_path, text_file):
    files = []
    for name in ("a", "b"):
        prepare(tiny(text_file), tmp_path / name)
        names = (packing.TOKENIZER, packing.TRAIN, packing.HELD_OUT)
        files.append([(tmp_path / name / file).read_bytes() for file in names])
    assert files[0] == files[1]


def test_failed_change_leaves_the_data_that_was_there(tmp_path, text_file):
    run = tmp_path / "run"
    prepare(tiny(text_file), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    short = tmp_path / "short.txt"
    short.write_text("too short to train on")
    with pytest.raises(DataError):
        prepare(tiny(short), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert len(list((run / "data").iterdir())) == 3


def test_text_shorter_than_a_sequence(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Not much to read here.\n")
    with pytest.raises(DataError) as error:
        prepare(tiny(path), tmp_path / "run")
    one_line(error, str(path), "tokens found to train on and one sequence needs 34")
    path.write_text("Not much to hold out here.\n" * 20)
    with pytest.raises(DataError) as error:
        prepare(tiny(path, held_out_fraction=0.01), tmp_path / "run")
    one_line(error, str(path), "tokens held out and one sequence needs 34", "data.held_out_fraction=0.01")


def test_config_without_text_or_with_a_wrong_tokenizer(tmp_path, text_file, tokenizer):
    with pytest.raises(DataError, match=r"data\.input=FILE"):
        prepare(tiny(), tmp_path / "run")
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        prepare(tiny(text_file, tokenizer=str(tmp_path / "none.json")), tmp_path / "run")
    large = tmp_path / "large.json"
    train_tokenizer([TEXT], VOCAB_SIZE + 1).save(str(large))
    with pytest.raises(DataError, match=r"set model\.vocab_size to at least 321"):
        prepare(tiny(text_file, tokenizer=str(large)), tmp_path / "run")
    tokenizer.save(str(large))
    data = prepare(tiny(text_file, tokenizer=str(large)), tmp_path / "run")
    assert data.tokenizer.get_vocab() == tokenizer.get_vocab()


# Loader.


@SMALL
@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 2**40))
def test_permutation_has_every_number_once(size, seed, epoch):
    order = permute(np.arange(size), size, seed, epoch)
    assert sorted(order) == list(range(size))
    assert permute(np.array([size - 1]), size, seed, epoch) == order[-1]


def test_permutation_is_even_and_stays_the_same():
    assert permute(np.arange(10), 10, seed=0).tolist() == [9, 4, 5, 3, 0, 8, 2, 6, 1, 7]
    for size in (3, 50):
        epochs = np.arange(20_000)
        places = permute(np.full_like(epochs, size // 2), size, seed=5, epochs=epochs)
        expected = len(epochs) / size
        chi_square = ((np.bincount(places, minlength=size) - expected) ** 2 / expected).sum()
        assert chi_square < size + 5 * (2 * size) ** 0.5
    order = permute(np.arange(2**16 + 1), 2**16 + 1, seed=5)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert (np.diff(order) == 1).mean() < 0.001


def test_epochs_hold_every_window_once_in_another_order():
    tokens, window, stride = np.arange(1000, dtype=np.uint16), 13, 10
    windows = Windows(tokens, window, stride, seed=3)
    assert len(windows) == 99
    epochs = [windows.take(epoch * 99, 99) for epoch in range(3)]
    for epoch in epochs:
        assert epoch.dtype == np.int32 and (np.diff(epoch, axis=1) == 1).all()
        assert sorted(epoch[:, 0]) == list(range(0, 990, 10))
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
    assert (Windows(tokens, window, stride, seed=4).take(0, 99) != epochs[0]).any()


def test_any_stretch_is_the_stretch_of_the_whole():
    windows = Windows(np.arange(100, dtype=np.uint32), 7, 4, seed=1)
    whole = windows.take(0, 200)
    for start, count in ((0, 1), (13, 30), (23, 2), (150, 50), (5, 0)):
        assert (windows.take(start, count) == whole[start : start + count]).all()
    assert windows.take(10**15, 3).shape == (3, 7)


def test_without_seed_windows_are_in_order():
    windows = Windows(np.arange(24), 6, 5, seed=None)
    assert windows.take(0, 5)[:, 0].tolist() == [0, 5, 10, 15, 0]


def test_windows_need_one_window_of_tokens():
    assert len(Windows(np.arange(6), 6, 5, seed=0)) == 1
    with pytest.raises(DataError, match="has 5 tokens and one sequence needs 6"):
        Windows(np.arange(5), 6, 5, seed=0)


def test_window_has_the_targets_of_every_depth():
    assert window_length(tiny("x")) == 32 + 1 + 1


def test_texts_iterate_again(tokenizer):
    texts = Texts(dataset_of(["b"]), before=("a",), after=("c",))
    assert len(texts) == 3 and list(texts) == list(texts) == ["a", "b", "c"]


def test_fingerprint_is_readable(tmp_path, text_file):
    prepare(tiny(text_file), tmp_path / "run")
    content = json.loads((tmp_path / "run" / packing.FINGERPRINT).read_text())
    assert content["files"][0][:2] == [str(text_file), text_file.stat().st_size]

"""Documents to files of tokens, which are made once."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from deepseek_jax.config import Config
from deepseek_jax.data import packing, shards
from deepseek_jax.data import tokenizer as tokenizing
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.packing import changed_files, is_prepared, open_prepared, prepare, write_tokens
from deepseek_jax.data.tokenizer import END_OF_DOCUMENT, train_tokenizer
from parity_tests.texts import TEXT, VOCAB_SIZE, one_line, tiny


def test_tokens_are_the_documents_each_with_its_end(tokenizer, tmp_path):
    """And nothing that the tokenizer puts before a text."""
    texts = ["one\n", "", TEXT, "  two"]
    plain, tokenizer = tokenizer, Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_DOCUMENT} $A", special_tokens=[(END_OF_DOCUMENT, 0)])
    count = write_tokens(texts, tokenizer, tmp_path / "tokens.npy")
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r", allow_pickle=False)
    expected = [i for text in texts for i in [*plain.encode(text).ids, 0]]
    assert tokens.dtype == np.uint16 and len(tokens) == count and tokens.tolist() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


def test_a_text_in_pieces_has_one_end(tokenizer, tmp_path, monkeypatch):
    """Pieces that one batch takes, and a text whose pieces are in several."""
    monkeypatch.setattr(tokenizing, "PIECE_CHARACTERS", 500)
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 1200)
    long = "\n".join(line for line in TEXT.splitlines() if line[-1:].isalnum())  # where a piece may end
    assert len(list(tokenizing.pieces(long))) > 10
    write_tokens([long, "short", long[:1000]], tokenizer, tmp_path / "tokens.npy")
    expected = [i for text in (long, "short", long[:1000]) for i in [*tokenizer.encode(text).ids, 0]]
    assert np.load(tmp_path / "tokens.npy").tolist() == expected


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
    (held_out,) = data.held_out
    total = sum(int(data.token_bytes[tokens].sum()) for tokens in (data.train, held_out))
    assert total == text_file.stat().st_size
    assert 0.04 < len(held_out) / (len(held_out) + len(data.train)) < 0.06
    assert data.end_of_document == data.train[-1] == held_out[-1] == 0
    assert isinstance(data.train, np.memmap) and max(data.train.max(), held_out.max()) < config.model.vocab_size
    decoded = [data.tokenizer.decode(tokens[:-1].tolist()) for tokens in (data.train, held_out)]
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


def test_files_that_changed_are_named(tmp_path, text_file):
    others = [tmp_path / name for name in ("gone.txt", "touched.txt")]
    for other in others:
        other.write_text(TEXT)
    prepare(tiny(text_file, *others), tmp_path / "run")
    assert changed_files(tiny(text_file, *others), tmp_path / "run") == []
    size, new = text_file.stat().st_size, tmp_path / "new.txt"
    text_file.write_text("Less.")
    new.write_text(TEXT)
    os.utime(others[1], (1, 1))
    assert changed_files(tiny(text_file, others[1], new), tmp_path / "run") == [
        f"{others[0]} is gone", f"{new} is new", f"{text_file} has 5 bytes and had {size:,}", f"{others[1]} has changed",
    ]  # fmt: skip
    assert changed_files(tiny(text_file), tmp_path / "none") == []


def test_sets_with_another_tokenizer_are_refused(tmp_path, tokenizer):
    """Each against the first; nothing is left behind."""
    sets = [tmp_path / name for name in ("one", "same", "other")]
    for place, vocab_size in zip(sets, (VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE - 1)):
        place.mkdir()
        train_tokenizer([TEXT], vocab_size).save(str(place / packing.TOKENIZER))
        (place / shards.MANIFEST).write_text(json.dumps({"format": shards.FORMAT, "fingerprint": {}}))
    with pytest.raises(DataError) as error:
        prepare(tiny(path=list(map(str, sets))), tmp_path / "run")
    one_line(error, f"{sets[2]}: has another tokenizer than {sets[0]}; prepare it with prepare.tokenizer={sets[0]}")
    assert not (tmp_path / "run").exists()


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


def test_one_sequence_is_enough(tmp_path, text_file):
    run = tmp_path / "run"
    prepare(tiny(text_file), run)
    for name in (packing.TRAIN, packing.HELD_OUT):
        np.save(run / name, np.zeros(34, np.uint16))
        open_prepared(tiny(text_file), run)
        np.save(run / name, np.zeros(33, np.uint16))
        with pytest.raises(DataError, match=r"33 tokens .* and one sequence needs 34"):
            open_prepared(tiny(text_file), run)
        np.save(run / name, np.zeros(34, np.uint16))


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


def test_fingerprint_is_readable(tmp_path, text_file):
    prepare(tiny(text_file), tmp_path / "run")
    content = json.loads((tmp_path / "run" / packing.FINGERPRINT).read_text())
    assert content["files"][0][:2] == [str(text_file), text_file.stat().st_size]

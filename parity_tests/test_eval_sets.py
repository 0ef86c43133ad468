"""Named texts to evaluate on: made once, made again when they change, refused in one line."""

import os

import pytest

from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.eval_sets import check_sets, make_sets, open_sets
from deepseek_jax.data.tokenizer import end_of_document_id
from parity_tests.texts import TEXT


@pytest.fixture
def run_dir(tmp_path, tokenizer):
    (tmp_path / "run" / "data").mkdir(parents=True)
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    return tmp_path / "run"


def config(*fields):
    return load_config("tiny", ["train.sequence_length=16", *fields])


def test_they_are_tokenized_once_and_again_when_a_file_changes(run_dir, tmp_path, tokenizer):
    code = tmp_path / "code.py"
    code.write_text(TEXT)
    of = config(f"data.eval.code={code}", f"data.eval.both=[{code},{code}]")
    make_sets(of, run_dir)
    ids = [*tokenizer.encode(TEXT).ids, end_of_document_id(tokenizer)]
    sets = open_sets(of, run_dir)
    assert list(sets) == ["code", "both"] and sets["code"][:].tolist() == sets["both"][:].tolist() == ids
    place = run_dir / "data/eval/code.npy"
    before = place.stat().st_mtime_ns
    make_sets(of, run_dir)
    assert place.stat().st_mtime_ns == before
    code.write_text(TEXT[:500])
    os.utime(code, (1, 1))
    make_sets(of, run_dir)
    assert open_sets(of, run_dir)["code"][:].tolist() == [*tokenizer.encode(TEXT[:500]).ids, ids[-1]]


def test_what_cannot_be_evaluated_on_is_refused(run_dir, tmp_path):
    with pytest.raises(DataError, match=r"^nowhere.txt: no such file or directory; check data.eval.wiki$"):
        check_sets(config("data.eval.wiki=nowhere.txt"))
    (tmp_path / "short.txt").write_text("short")
    of = config(f"data.eval.short={tmp_path}/short.txt")
    make_sets(of, run_dir)
    with pytest.raises(DataError, match=r"^data.eval.short=.*short.txt: \d+ tokens, and one sequence needs 17; give more"):
        open_sets(of, run_dir)
    with pytest.raises(ConfigError, match=r"data.eval is 'wiki.txt'; write it as data.eval.NAME=VALUE$"):
        config("data.eval=wiki.txt")
    for name in ("held_out", "a b", ""):
        with pytest.raises(ConfigError, match=r"^data.eval.*: name it by letters, digits, _ and -, and not held_out$"):
            load_config("tiny", [f"data.eval={{'{name}': 'x.txt'}}"])

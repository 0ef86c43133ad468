"""A hub's name where a directory does: from a cache laid out by hand, with no network."""

import os
import shutil

import pytest
from huggingface_hub import constants

from deepseek_jax import api
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.convert import convert
from parity_tests.checkpoints import contents, write_huggingface_directory
from parity_tests.conversions import fails
from parity_tests.test_stored_forms import SMALL

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Holds `someone/tiny` in two revisions, as links to blobs."""
    folder = tmp_path / "cache"
    model = folder / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    for revision, commit in COMMITS.items():
        plain = write_huggingface_directory(tmp_path / revision, SMALL, "bfloat16" if revision == "v2" else "float32")
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (model / "blobs").mkdir(exist_ok=True)
        for file in plain.iterdir():
            blob = model / "blobs" / f"{revision}-{file.name}"
            shutil.copyfile(file, blob)
            os.symlink(f"../../blobs/{blob.name}", snapshot / file.name)
        (model / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def test_from_the_cache_alone(cache, tmp_path):
    convert("someone/tiny", tmp_path / "run", verify=True)
    convert(tmp_path / "run", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "main")
    assert local_directory("someone/tiny@v2").name == COMMITS["v2"]
    assert api.DeepSeekModel.from_pretrained("someone/tiny@v2").config.precision == "bfloat16"


def test_what_is_nowhere_is_said_in_one_line(cache, tmp_path):
    for name in ("someone/other", "someone/tiny@v3"):
        with fails(f"{name}: there is no such directory", "not in the cache either"):
            convert(name, tmp_path / "run")
    (cache / "models--someone--tiny" / "snapshots" / COMMITS["main"] / "model.safetensors").unlink()
    with fails("someone/tiny: ", "has no weights"):
        convert("someone/tiny", tmp_path / "run")
    (tmp_path / "runs").mkdir()
    assert str(local_directory("runs/mine")) == "runs/mine"  # what is meant is a directory, and is missed as such
    with fails("runs/mine: there is no checkpoint"):
        convert("runs/mine", tmp_path / "run")

"""A checkpoint layer by layer in three frameworks, and two checkpoints tensor by tensor."""

import dataclasses

import numpy as np
import pytest

import parity_tests.layerwise as layerwise
from deepseek_jax.convert import convert
from deepseek_jax.data.tokenizer import train_tokenizer
from parity_tests.checkpoint_report import Parted, report_against, report_frameworks
from parity_tests.checkpoints import write_huggingface_directory
from parity_tests.conversions import TEXT, fails, rewritten
from parity_tests.test_stored_forms import SMALL
from parity_tests.variants import V2

MODEL = dataclasses.replace(V2, first_k_dense_replace=1, num_hidden_layers=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A dense layer and two with V2's routers, in bfloat16, and a tokenizer."""
    folder = tmp_path_factory.mktemp("layerwise")
    (folder / "tokenizer").mkdir()
    train_tokenizer([TEXT], MODEL.vocab_size).save(str(folder / "tokenizer" / "tokenizer.json"))
    return write_huggingface_directory(folder / "model", MODEL, "bfloat16", tokenizer=folder / "tokenizer")


def test_three_frameworks_agree_in_float64(directory, capsys):
    report_frameworks(str(directory), None, 20, "float64")
    out = capsys.readouterr().out
    assert "JAX: rel." in out and "transformers: rel." in out and out.count("e-1") > 12 and "20 tokens at random" in out


@pytest.mark.parametrize(
    ("kind", "name"), [("InJax", "JAX"), pytest.param("InTransformers", "transformers", marks=pytest.mark.slow)]
)
def test_the_first_layer_that_parts_is_named(kind, name, directory, tmp_path, monkeypatch, capsys):
    framework = getattr(layerwise, kind)
    sound = framework.layer

    def broken(self, number, tensors, hidden):
        if number == 1:
            tensors = tensors | {"self_attn.o_proj.weight": tensors["self_attn.o_proj.weight"] * np.float32(1.5)}
        return sound(self, number, tensors, hidden)

    monkeypatch.setattr(framework, "layer", broken)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(Parted, match=f"{name} parts from the PyTorch sibling at layer 1"):
        report_frameworks(str(directory), tmp_path / "text.txt", 16, "float32")
    assert "16 tokens of" in capsys.readouterr().out


@pytest.mark.slow
def test_other_experts_alone_part_frameworks(directory, monkeypatch):
    sound = layerwise.InJax.layer

    def broken(self, number, tensors, hidden):
        step = sound(self, number, tensors, hidden)
        return step if number < 2 else step._replace(choices=(step.choices + 1) % MODEL.n_routed_experts)

    monkeypatch.setattr(layerwise.InJax, "layer", broken)
    with pytest.raises(Parted, match="JAX parts from the PyTorch sibling at layer 2"):
        report_frameworks(str(directory), None, 8, "float32")


def test_what_cannot_be_read(directory, tmp_path):
    with fails("--length 999999"):
        report_frameworks(str(directory), None, 999999, "float32")
    (tmp_path / "text.txt").write_text("")
    with fails("text.txt: 0 tokens"):
        report_frameworks(str(directory), tmp_path / "text.txt", 8, "float32")


def test_two_checkpoints(directory, tmp_path, capsys):
    convert(directory, tmp_path / "run", dtype="float32")
    convert(tmp_path / "run", tmp_path / "wide")
    report_against(str(directory), str(tmp_path / "wide"))
    report_against(str(directory), str(directory))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("0 identical, ") and line.endswith(" equal after dtype") for line in lines)
    assert lines[-1].endswith(" identical") and "," not in lines[-1]

    def change(arrays):
        arrays["model.norm.weight"][3] += 1

    other = rewritten(directory, tmp_path / "other", change)
    with pytest.raises(Parted, match="1 tensors differ and 0 are in one alone"):
        report_against(str(directory), str(other))
    assert "model.norm.weight: 1.0e+00" in capsys.readouterr().out
    with pytest.raises(Parted):
        report_against(str(directory), str(write_huggingface_directory(tmp_path / "small", SMALL)))
    assert "of other shapes" in capsys.readouterr().out

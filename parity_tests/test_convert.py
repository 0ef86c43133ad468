"""Conversion between runs and Hugging Face directories: nothing is lost either way."""

import dataclasses

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deepseek_jax.checkpoint.fp8_blocks import requantize_blocks
from deepseek_jax.checkpoint.orbax_source import OrbaxSource
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.config import load_config
from deepseek_jax.convert import convert
from deepseek_jax.training.checkpoint import Checkpoints
from parity_tests.checkpoints import CONFIGS, WIDE, contents, random_variables, write_huggingface_directory
from parity_tests.conversions import assert_same_tree, make_run, rewritten

FORMS_OF_CONFIGS = [(name, dtype) for name in CONFIGS for dtype in ("float32", "fp8")]


@pytest.mark.parametrize(("name", "dtype"), [*FORMS_OF_CONFIGS, ("wide", "bfloat16"), ("tied", "bfloat16")])
def test_there_and_back_gives_the_same_files(name, dtype, tmp_path):
    source = write_huggingface_directory(tmp_path / "source", CONFIGS[name], dtype)
    convert(source, tmp_path / "run", verify=True)
    convert(tmp_path / "run", tmp_path / "back", verify=True)
    assert contents(tmp_path / "back") == contents(source)
    config = load_config(tmp_path / "run" / "config.yaml")
    stored = {"fp8": "bfloat16"}.get(dtype, dtype)
    assert config.model == dataclasses.replace(CONFIGS[name], precision=stored)


def test_a_run_comes_back_equal(run, exported, tmp_path):
    convert(exported, tmp_path / "back", verify=True)
    config = load_config(tmp_path / "back" / "config.yaml")
    assert config.model == WIDE
    restored = Checkpoints(tmp_path / "back", config).restore(0)
    expected = random_variables(WIDE)
    assert_same_tree(restored.params, expected["params"])
    assert_same_tree(restored.router_state, expected["router_state"])
    assert len(list(exported.glob("model-*.safetensors"))) > 3
    assert_same_tree(load_pretrained(exported), (WIDE, expected))


def test_a_step_alone(run, exported, tmp_path):
    convert(run / "checkpoints" / "7", tmp_path / "out", max_shard_size="300KB")
    assert contents(tmp_path / "out") == contents(exported)


def test_what_bfloat16_holds_survives_it(run, tmp_path):
    convert(run, tmp_path / "out", dtype="bfloat16")
    assert_same_tree(load_pretrained(tmp_path / "out")[1], random_variables(WIDE))
    convert(tmp_path / "out", tmp_path / "run", dtype="float32")
    restored = Checkpoints(tmp_path / "run", load_config(tmp_path / "run" / "config.yaml")).restore(0)
    assert_same_tree(load_pretrained(tmp_path / "out")[1]["params"], restored.params)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_codes_and_scales_come_back_to_the_byte(dtype, tmp_path):
    """Scales that recomputing would not find, and a matrix that DeepSeek's form leaves alone."""
    rng = np.random.default_rng(3)
    source = write_huggingface_directory(tmp_path / "source", WIDE, "fp8")

    def other_scales(arrays):
        projection = f"model.layers.{WIDE.num_hidden_layers}.eh_proj.weight"
        weights = arrays[projection].astype(np.float32)
        scales = np.full([-(-n // 128) for n in weights.shape], 2.0**-9, np.float32)
        arrays[projection] = requantize_blocks(np.zeros_like(weights), scales)
        arrays[projection].view(np.uint8)[:] = rng.integers(0, 0x7F, weights.shape, np.uint8)
        arrays[f"{projection}_scale_inv"] = scales
        for name, array in arrays.items():
            if name.endswith("scale_inv"):
                array *= rng.uniform(0.1, 10, array.shape).astype(np.float32)

    changed = rewritten(source, tmp_path / "changed", other_scales)
    convert(changed, tmp_path / "run", dtype=dtype, verify=True)
    convert(tmp_path / "run", tmp_path / "back", verify=True)
    for name in (tensors := SafetensorsDirectory(changed)).names:
        assert tensors.read(name).tobytes() == SafetensorsDirectory(tmp_path / "back").read(name).tobytes(), name
    convert(tmp_path / "run", tmp_path / "float32", dtype="float32")
    if dtype is None:
        assert_same_tree(load_pretrained(tmp_path / "float32")[1], load_pretrained(changed)[1])


@pytest.mark.parametrize("piece", [None, 2**40, 2**20])
def test_pieces_of_any_size_are_read(piece, tmp_path, monkeypatch):
    """Training saves matrix by matrix; others save an array whole, or cut through its matrices."""
    if piece is not None:
        args = ocp.SaveArgs(chunk_byte_size=piece)
        piecewise = "deepseek_jax.training.checkpoint._piecewise"
        monkeypatch.setattr(piecewise, lambda config, variables: jax.tree.map(lambda leaf: args, variables))
    variables = random_variables(WIDE)
    gate = ("params", "moe_layers", "mlp", "experts", "gate_proj")
    shape = variables["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"].shape
    source = OrbaxSource(make_run(tmp_path / "run", WIDE) / "checkpoints" / "7")
    expected = {None: (1, 1, *shape[2:]), 2**40: shape, 2**20: (*shape[:2], shape[2] // 2, shape[3])}[piece]
    assert source._stores[gate].chunk_layout.read_chunk.shape == expected
    convert(tmp_path / "run", tmp_path / "out")
    assert_same_tree(load_pretrained(tmp_path / "out")[1], variables)

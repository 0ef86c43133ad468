"""NaN and infinity, wherever they stand, stop a conversion and are named; on request they pass."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch

from deepseek_jax.checkpoint.finite import PIECE, count_not_finite
from deepseek_jax.checkpoint.pretrained import load_pretrained, save_pretrained
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.tensors import DTYPES, CheckpointError
from deepseek_jax.convert import convert, main
from deepseek_torch.pretrained import load_pretrained as load_torch
from deepseek_torch.pretrained import save_pretrained as save_torch
from parity_tests.checkpoints import TINY, random_variables, write_huggingface_directory
from parity_tests.conversions import fails, make_run, rewritten

SMALL = dataclasses.replace(TINY, num_hidden_layers=2, num_nextn_predict_layers=0)
LAYER = "model.layers.1."


@pytest.mark.parametrize("name", [name for name in DTYPES if "F" in name])
def test_every_code_of_a_dtype_is_known(name):
    dtype = DTYPES[name]
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (3, PIECE, dtype.itemsize), np.uint8)
    if dtype.itemsize > 1:  # most often NaN where all exponents are tried: every fourth here
        bits[:, ::4, -1] |= 0x7F
        bits[:, ::4, -2] |= 0xF0
    values = bits.view(dtype)[..., 0]
    with np.errstate(invalid="ignore"):
        expected = int((~np.isfinite(values.astype(np.float64))).sum())
    assert expected > 3
    assert count_not_finite(values) == count_not_finite(values.T) == count_not_finite(values[:, ::1]) == expected
    assert count_not_finite(np.zeros((2, 0, 3), dtype)) == count_not_finite(np.ones(5, dtype)) == 0
    assert count_not_finite(np.full(5, -1, np.int32)) == 0


SPOILT = [
    ("float32", "mlp.gate.e_score_correction_bias", np.nan),
    ("float32", "input_layernorm.weight", -np.inf),
    ("bfloat16", "mlp.experts.2.up_proj.weight", np.inf),
    ("fp8", "self_attn.o_proj.weight", 0x7F),
    ("fp8", "mlp.experts.2.up_proj.weight", 0xFF),
    ("fp8", "self_attn.o_proj.weight_scale_inv", np.nan),
]


@pytest.mark.parametrize(("dtype", "name", "value"), SPOILT)
def test_from_hugging_face(dtype, name, value, tmp_path):
    """Both readers refuse; the rescue goes there, is verified, and comes back the same."""

    def spoil(arrays):
        array = arrays[LAYER + name]
        (array.view(np.uint8) if isinstance(value, int) else array).reshape(-1)[:3] = value

    whole = write_huggingface_directory(tmp_path / "whole", SMALL, dtype)
    broken = rewritten(whole, tmp_path / "broken", spoil)
    count = SafetensorsDirectory(broken).read(LAYER + name).size
    words = [LAYER + name, f"{min(count, 3)} of {count:,} numbers"]
    with fails("model.safetensors", "--allow-non-finite", *words):
        convert(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with fails(*words):
        load_pretrained(broken)
    with fails(*words):
        load_torch(broken)
    convert(broken, tmp_path / "run", allow_non_finite=True, verify=True)
    with fails(str(tmp_path / "run"), name.removesuffix("_scale_inv")):
        convert(tmp_path / "run", tmp_path / "back")
    convert(tmp_path / "run", tmp_path / "back", allow_non_finite=True, verify=True)
    ours, theirs = SafetensorsDirectory(tmp_path / "back"), SafetensorsDirectory(broken)
    for tensor in theirs.names:
        if not name.endswith("_scale_inv") or LAYER + name.removesuffix("_scale_inv") != tensor:
            np.testing.assert_array_equal(*(t.read(tensor).astype(np.float32) for t in (ours, theirs)))


def test_from_a_run_by_the_command(tmp_path, monkeypatch, capsys):
    variables = random_variables(SMALL)
    run = make_run(tmp_path / "run", SMALL, variables=variables | {"router_state": {
        "moe_layers": {"mlp": {"gate": {"e_score_correction_bias": np.full((1, SMALL.n_routed_experts), np.nan, np.float32)}}}
    }})  # fmt: skip
    words = ["convert", str(run), str(tmp_path / "out"), "--verify"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="1"):
        main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoints/7: model.layers.1.mlp.gate.e_score_correction_bias: 8 of 8" in error
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("sys.argv", [*words, "--allow-non-finite"])
    main()
    assert np.isnan(SafetensorsDirectory(tmp_path / "out").read(f"{LAYER}mlp.gate.e_score_correction_bias")).all()


def test_what_a_dtype_cannot_hold_is_not_made_infinite(tmp_path):
    variables = random_variables(SMALL)
    variables["params"]["norm"]["weight"][0] = np.finfo(np.float32).max
    run = make_run(tmp_path / "run", SMALL, variables=variables)
    with fails("model.norm.weight", "beyond BF16's range"):
        convert(run, tmp_path / "out", dtype="bfloat16")
    assert np.finfo(np.float32).max > float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_what_a_program_holds_is_not_saved_broken(dtype, tmp_path):
    """Neither sibling writes a directory that the other would refuse."""
    variables, name = random_variables(SMALL), "model.layers.1.self_attn.o_proj.weight"
    model = load_torch(write_huggingface_directory(tmp_path / "whole", SMALL))
    variables["params"]["moe_layers"]["self_attn"]["o_proj"]["weight"][0, 0, 1] = np.nan
    with torch.no_grad():
        model.state_dict()[name][0, 0] = torch.inf
    for save in (
        lambda: save_pretrained(tmp_path / "jax", SMALL, variables, dtype),
        lambda: save_torch(tmp_path / "torch", model, dtype),
    ):
        with pytest.raises(CheckpointError, match=rf"{name}: 1 of [\d,]+ numbers are NaN or infinite$"):
            save()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]

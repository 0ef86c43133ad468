"""Checkpoints that are wrong end in one line that names what is."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.checkpoint.hf_config import read_config_json, to_config_json
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.convert import convert
from deepseek_jax.errors import UserError
from deepseek_jax.training.loading import load_model
from parity_tests.checkpoints import TINY, WIDE, write_huggingface_directory
from parity_tests.conversions import fails, rewritten, with_config


def test_every_tensor_at_fault_is_named(exported, tmp_path):
    def spoil(arrays):
        del arrays["model.layers.1.mlp.experts.3.up_proj.weight"], arrays["model.norm.weight"]
        arrays["model.layers.0.rotary.frequencies"] = np.zeros(4, np.float32)
        arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
        arrays["model.layers.2.input_layernorm.weight"] = arrays["model.layers.2.input_layernorm.weight"].astype("i4")

    source = rewritten(exported, tmp_path / "source", spoil)
    with fails(
        str(source), "2 missing: model.layers.1.mlp.experts.3.up_proj.weight, model.norm.weight",
        "1 left over: model.layers.0.rotary.frequencies", "wrong shape: lm_head.weight [319, 136] for [320, 136]",
        "wrong dtype: model.layers.2.input_layernorm.weight I32 for F32",
    ):  # fmt: skip
        convert(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_float8_needs_its_scales_and_scales_need_float8(tmp_path):
    source = write_huggingface_directory(tmp_path / "source", TINY, "fp8")
    weight = "model.layers.1.self_attn.o_proj.weight"

    def spoil(change):
        spoil.count += 1
        return rewritten(source, tmp_path / f"{spoil.count}", change)

    spoil.count = 0
    with fails(f"1 missing: {weight}_scale_inv"):
        load_pretrained(spoil(lambda arrays: arrays.pop(f"{weight}_scale_inv")))
    with fails(f"1 left over: {weight}_scale_inv"):
        load_pretrained(spoil(lambda arrays: arrays.update({weight: arrays[weight].astype("bfloat16")})))
    with fails("model.norm.weight F8_E4M3 for BF16"):
        norm = "model.norm.weight"
        load_pretrained(spoil(lambda arrays: arrays.update({norm: arrays[norm].astype("float8_e4m3fn")})))
    with fails(f"model.safetensors: {weight}: scale [0, 0] is 0.0"):
        convert(spoil(lambda arrays: arrays[f"{weight}_scale_inv"].fill(0)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with fails("--dtype fp8", "Hugging Face"):
        convert(write_huggingface_directory(tmp_path / "float32"), tmp_path / "run", dtype="fp8")


def test_copies_must_be_copies(exported, tmp_path):
    copy = f"model.layers.{WIDE.num_hidden_layers + 1}.shared_head.head.weight"

    def change_one(arrays):
        arrays[copy][3, 4] += 1

    with fails(copy, "is not equal to lm_head.weight"):
        convert(rewritten(exported, tmp_path / "source", change_one), tmp_path / "run")


QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["model_type is llama"]),
        ({"model_type": "deepseek_v32"}, ["model_type is deepseek_v32"]),
        ({"index_topk": 2048}, ["index_topk is 2048", "indexer"]),
        ({"attention_bias": True}, ["missing: model.layers.0.self_attn.kv_a_proj_with_mqa.bias"]),
        ({"scoring_func": "softmax"}, ["scoring_func is softmax"]),
        ({"topk_method": "greedy"}, ["topk_method is greedy"]),
        ({"hidden_act": "gelu"}, ["hidden_act is gelu"]),
        ({"model_type": "deepseek_v2"}, ["scoring_func is sigmoid"]),
        ({"moe_layer_freq": 2}, ["missing: model.layers.1.mlp.gate_proj.weight"]),
        ({"moe_layer_freq": [0, 1]}, ["model.moe_layer_freq is [0, 1]"]),
        ({"num_key_value_heads": 1}, ["num_key_value_heads is 1"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters.rope_type is longrope"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, ["rope_parameters.mscale is 1.0"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["rope_scaling is"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "attention_factor": 1.5}}, ["attention_factor is 1.5"]),
        ({"rope_parameters": [], "rope_scaling": None}, ["rope_parameters is []"]),
        ({"rope_theta": 5.0}, ["rope_parameters.rope_theta is 10000.0", "rope_theta is 5.0"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_scaling is"]),
        ({"num_mtp_layers": 3}, ["num_mtp_layers is 3", "num_nextn_predict_layers is 2"]),
        ({"hidden_size": "wide"}, ["model.hidden_size is 'wide'"]),
        ({"n_group": 3}, ["model.n_group=3"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config.quant_method is awq"]),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, ["size is [64, 64]"]),
        ({"hidden_size": 128}, ["wrong shape", "model.norm.weight [136] for [128]"]),
        ({"quantization_config": QUANTIZATION | {"scale_fmt": "x"}}, ["scale_fmt is x"]),
        ({"num_hidden_layers": 3}, ["missing: model.layers.3.embed_tokens.weight"]),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_other_mathematics(changes, words, exported, tmp_path):
    source = with_config(exported, tmp_path / "source", **changes)
    with fails(str(source), *words):
        convert(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 300)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["${x:y}", "${", "???", "1e12", 10**12]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(to_config_json(WIDE, "fp8", {}))
ROPE_KEYS = [*dataclasses.asdict(WIDE.rope_scaling), "type", "rope_type", "rope_theta"]


@settings(max_examples=150)
@given(st.sampled_from(KEYS), VALUES | st.dictionaries(st.sampled_from(ROPE_KEYS), VALUES | st.just("yarn"), max_size=4))
def test_any_value_in_a_config_is_taken_or_refused_in_one_line(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(to_config_json(WIDE, "fp8", {}) | {key: value}))
    try:
        read_config_json(tmp_path)
    except UserError as error:
        assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)


def test_either_spelling_of_a_config_is_read(exported, tmp_path):
    for number, absent in enumerate((["rope_parameters", "dtype"], ["rope_scaling", "rope_theta", "torch_dtype"])):
        source = with_config(exported, tmp_path / str(number), **dict.fromkeys(absent, ...))
        assert load_pretrained(source)[0] == WIDE


def test_what_is_no_checkpoint(run, exported, tmp_path):
    with fails("there is no checkpoint", "config.json", "checkpoints"):
        convert(tmp_path, tmp_path / "out")
    both = shutil.copytree(exported, tmp_path / "both")
    shutil.copytree(run / "checkpoints", both / "checkpoints")
    shutil.copyfile(run / "config.yaml", both / "config.yaml")
    with fails("a Hugging Face directory and a run directory"):
        convert(both, tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for read in (convert, load_model):
        with fails("adapter: is an adapter without its model, org/base; merge it"):
            read(tmp_path / "adapter", *[tmp_path / "out"][: read is convert])
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"version": "1.0"')
    with fails("broken/tokenizer.json: not a tokenizer.json"):
        convert(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    with fails("no checkpoint is complete"):
        convert(tmp_path / "run", tmp_path / "out")
    with fails("size 0GB"):
        convert(run, tmp_path / "out", max_shard_size="0GB")


def test_a_damaged_step(exported, tmp_path):
    convert(exported, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "0"
    array = step / "variables" / "params.moe_layers.mlp.experts.gate_proj"
    lost = (array / "1.2.0.0").read_bytes()
    (array / "1.2.0.0").unlink()
    with fails("model.layers.2.mlp.experts.2.gate_proj.weight: cannot be read"):
        convert(tmp_path / "run", tmp_path / "out")
    (array / "1.2.0.0").write_bytes(lost[:-5])
    with fails("model.layers.2.mlp.experts.2.gate_proj.weight: cannot be read"):
        convert(tmp_path / "run", tmp_path / "out")
    array.rename(tmp_path / "array")
    with fails("params.moe_layers.mlp.experts.gate_proj: cannot be opened"):
        convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "array").rename(array)
    meta = json.loads((step / "meta" / "metadata").read_text())
    (step / "meta" / "metadata").write_text(json.dumps(meta | {"model": meta["model"] | {"hidden_size": 7}}))
    with fails("wrong shape: params.embed_tokens.weight [320, 136] for [320, 7]"):
        convert(step, tmp_path / "out")
    (step / "meta" / "metadata").write_text("{")
    with fails("metadata", "not JSON"):
        convert(step, tmp_path / "out")
    assert not (tmp_path / "out").exists()

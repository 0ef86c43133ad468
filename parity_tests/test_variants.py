"""Every released form of the architecture: both siblings against transformers' class of it, and there and back."""

import dataclasses
import functools
import json
from contextlib import nullcontext

import jax
import numpy as np
import pytest
import torch

from deepseek_jax.checkpoint.forms import tensor_specs
from deepseek_jax.checkpoint.hf_types import type_for
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.config import load_config
from deepseek_jax.convert import convert
from deepseek_jax.generate import Generator
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_torch.generate import generate
from deepseek_torch.pretrained import load_pretrained as load_torch
from parity_tests.checkpoints import contents, write_huggingface_directory
from parity_tests.comparison import assert_within, relative_difference
from parity_tests.conversions import fails
from parity_tests.modules import COMPILE_QUICKLY, Maker, compare
from parity_tests.siblings import Siblings
from parity_tests.transformers_oracle import float64_islands, split_experts
from parity_tests.variants import EVERY_SECOND, FORMS, RELEASED, SMALL, V2, write_variant

OTHER_MATHEMATICS = ("V2-Lite", "V2", "biases, halves turned", "no shared experts, tied")
"""Of the others the JAX sibling's parts are tested elsewhere, and here when there is time."""
HOW = dict(grouped_matmul="reference", remat="none", attention="reference")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory of a form, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("variants")
    return functools.cache(lambda name: write_variant(folder / "".join(filter(str.isalnum, name)), name))


def tokens_of(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, 19), dtype=np.int32)


def logits_of_torch(path, dtype):
    model = load_torch(path)
    config = dataclasses.replace(model.config, precision="float64" if dtype == torch.float64 else "float32")
    again = type(model)(config)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        return again.hidden_states(torch.from_numpy(tokens_of(config))) @ again.head()


def logits_of_transformers(path, dtype):
    """By the class that the directory's `model_type` names; kimi_k2's is V3's, under a name that only remote code knows."""
    import transformers

    content = json.loads((path / "config.json").read_text())
    v2 = content["model_type"] == "deepseek_v2"
    prefix = "DeepseekV2" if v2 else "DeepseekV3"
    kind, config = (getattr(transformers, prefix + end) for end in ("ForCausalLM", "Config"))
    content = {key: value for key, value in content.items() if key not in ("model_type", "auto_map")}
    if not v2:  # it has no null for them
        content |= {key: 1 for key in ("n_group", "topk_group") if content[key] is None}
    config = config(**content, attn_implementation="eager", experts_implementation="eager")
    with float64_islands() if dtype == torch.float64 else nullcontext():
        model, info = kind.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True)
        missing = [name for name in info["missing_keys"] if config.n_shared_experts or "shared_experts" not in name]
        assert not missing and not info["mismatched_keys"]
        assert all(f".layers.{config.num_hidden_layers}." in name for name in info["unexpected_keys"])
        with torch.no_grad():
            return model(torch.from_numpy(tokens_of(config)).long()).logits


@pytest.mark.parametrize("name", FORMS)
def test_the_sibling_is_transformers_class(name, directory):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        ours, theirs = (logits(directory(name), dtype) for logits in (logits_of_torch, logits_of_transformers))
        assert theirs.dtype == dtype and theirs.abs().max() > 1e-2
        assert relative_difference(ours, theirs) < tolerance, dtype


@pytest.mark.parametrize(
    "name", [name if name in OTHER_MATHEMATICS else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_jax_is_its_sibling(name, directory):
    config, variables = load_pretrained(directory(name))
    config = dataclasses.replace(config, precision="float64", **HOW)
    with jax.enable_x64(True):
        model = DeepseekV3(config)
        program = jax.jit(
            lambda v, t: model.apply(v, t, method="hidden_states") @ model.apply(v, method="head"),
            compiler_options=COMPILE_QUICKLY,
        )
        ours = np.asarray(program(jax.tree.map(np.float64, variables), tokens_of(config)))
    assert relative_difference(ours, logits_of_torch(directory(name), torch.float64)) < 1e-12


@pytest.mark.parametrize(
    "name", [name if name in ("V2", "Kimi-K2", "linear") else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_there_and_back_gives_the_same_files(name, directory, tmp_path):
    convert(directory(name), tmp_path / "run", verify=True)
    convert(tmp_path / "run", tmp_path / "back", verify=True)
    assert contents(tmp_path / "back") == contents(directory(name))
    config = load_config(tmp_path / "run" / "config.yaml").model
    assert dataclasses.replace(config, **HOW) == FORMS[name][0]


@functools.cache
def every_second():
    return Siblings(dataclasses.replace(EVERY_SECOND, precision="float64"))


def test_experts_in_every_second_layer_forward_and_backward():
    """With most other forms at once: what training needs of the whole model."""
    pair = every_second()
    assert [layer.moe for layer in pair.torch.main_layers] == [True, False, True]
    assert "router_state" not in pair.variables and any(name.endswith("o_proj.bias") for name in pair.torch.state_dict())
    forward, backward = compare(Maker(pair, 2, 11).whole_model(), pair)
    assert_within(forward, 1e-12)
    assert_within(backward, 1e-12)
    assert len(backward) == len(list(pair.torch.parameters()))


@pytest.mark.slow
def test_it_generates_the_same_tokens():
    pair = every_second()
    prompts = [[5, 9, 2, 77, 31], [8], [100, 101, 102]]
    expected = list(generate(pair.torch, prompts, 6, None))
    with jax.enable_x64(True):
        generator = Generator(pair.config, pair.variables, sequences=3)
        assert [step.tolist() for step in generator.generate(prompts, 6, None)] == expected


def test_every_second_layer_there_and_back(tmp_path):
    """DeepSeek's own code has such layers; transformers' class does not look at `moe_layer_freq`."""
    source = write_huggingface_directory(tmp_path / "source", dataclasses.replace(EVERY_SECOND, rope_interleave=True))
    names = json.loads((source / "config.json").read_text())
    assert names["model_type"] == "deepseek_v2" and names["moe_layer_freq"] == 2 and names["n_shared_experts"] == 0
    convert(source, tmp_path / "run", verify=True)
    convert(tmp_path / "run", tmp_path / "back", verify=True)
    assert contents(tmp_path / "back") == contents(source)
    tensors = load_torch(source).state_dict()
    assert "model.layers.1.mlp.gate_proj.weight" in tensors and "model.layers.2.mlp.gate.weight" in tensors
    assert type_for(EVERY_SECOND) == "deepseek_jax"


def test_a_factor_that_two_readers_take_differently_is_refused(tmp_path):
    source = write_huggingface_directory(tmp_path / "source", V2)
    content = json.loads((source / "config.json").read_text()) | {"norm_topk_prob": True}
    (source / "config.json").write_text(json.dumps(content | {"routed_scaling_factor": 16.0}))
    with fails("norm_topk_prob is True and routed_scaling_factor is not 1", "transformers"):
        load_pretrained(source)
    (source / "config.json").write_text(json.dumps(content))
    assert load_pretrained(source)[0].norm_topk_prob


@pytest.mark.parametrize(("name", "count"), [
    ("V2", 235_741_434_880), ("V2-Lite", 15_706_484_224), ("Moonlight-16B", 15_960_110_208),
    ("Kimi-K2", 1_026_408_232_448),
])  # fmt: skip
def test_released_sizes(name, count):
    """Numbers in the files, the routers' biases among them, and without MTP layers."""
    _, config = RELEASED[name]
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    assert sum(int(np.prod(spec.shape)) for spec in tensor_specs(config, "bfloat16")) == count


@pytest.mark.parametrize("name", ["V2-Lite", "Moonlight-16B"])
def test_names_and_shapes_are_those_of_transformers(name):
    import transformers

    kind, config = RELEASED[name]
    prefix = "DeepseekV2" if kind == "deepseek_v2" else "DeepseekV3"
    fields = {field: getattr(config, field) for field in (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "first_k_dense_replace", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
        "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
    )}  # fmt: skip
    with torch.device("meta"):
        theirs_config = getattr(transformers, f"{prefix}Config")(**fields, num_key_value_heads=config.num_attention_heads)
        model = getattr(transformers, f"{prefix}ForCausalLM")(theirs_config)
    theirs = {tensor: tuple(t.shape) for tensor, t in split_experts(model.state_dict()).items()}
    assert theirs == {spec.name: spec.shape for spec in tensor_specs(config, "bfloat16")}


def test_a_run_of_before_these_fields_is_read(tmp_path):
    """YaRN without a type is YaRN."""
    path = tmp_path / "config.yaml"
    path.write_text("model: {num_hidden_layers: 2, first_k_dense_replace: 1, rope_scaling: {factor: 4.0}}")
    model = load_config(path).model
    assert model.rope_scaling.rope_type == "yarn" and (model.topk_method, model.moe_layer_freq) == ("noaux_tc", 1)
    assert SMALL.rope_interleave and not SMALL.attention_bias

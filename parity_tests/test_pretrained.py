"""Weights from Hugging Face into either sibling, from one to the other, and back, to the bit."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import deepseek_jax.checkpoint.pretrained as in_jax
import deepseek_torch.pretrained as in_torch
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.training.loading import load_model
from parity_tests.checkpoints import CONFIGS, TINY, WIDE, contents, random_variables, write_huggingface_directory
from parity_tests.texts import one_line
from parity_tests.weights import from_torch, to_torch

DTYPES = ("float32", "bfloat16", "fp8")


def assert_same_tensors(ours, theirs):
    """Equal names, dtypes and bytes, whatever the order and the files."""
    ours, theirs = SafetensorsDirectory(ours), SafetensorsDirectory(theirs)
    assert set(ours.names) == set(theirs.names)
    for name in ours.names:
        assert ours.entries[name].dtype == theirs.entries[name].dtype, name
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_both_siblings_read_and_write_the_same(name, dtype, tmp_path):
    source = write_huggingface_directory(tmp_path / "source", CONFIGS[name], dtype)
    config, variables = in_jax.load_pretrained(source)
    model = in_torch.load_pretrained(source)
    assert model.config == config
    assert_same_state(model.state_dict(), to_torch(variables, config))
    in_jax.save_pretrained(tmp_path / "jax", config, variables, dtype)
    assert contents(tmp_path / "jax") == contents(source)
    in_torch.save_pretrained(tmp_path / "torch", model, dtype, max_shard_bytes=100_000)
    assert_same_tensors(tmp_path / "torch", source)
    assert (tmp_path / "torch" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_from_jax_to_torch_and_back(name, tmp_path):
    variables = random_variables(CONFIGS[name])
    in_jax.save_pretrained(tmp_path / "jax", CONFIGS[name], variables)
    model = in_torch.load_pretrained(tmp_path / "jax")
    in_torch.save_pretrained(tmp_path / "torch", model)
    config, back = in_jax.load_pretrained(tmp_path / "torch")
    assert config == CONFIGS[name]
    assert_same_state(to_torch(back, config), to_torch(variables, config))
    direct = from_torch(model.state_dict(), config)
    assert_same_state(to_torch(direct, config), to_torch(variables, config))


def test_float8_is_what_its_codes_and_scales_say(tmp_path):
    """Each weight is one product in float32, ragged blocks included, in both siblings."""
    tensors = SafetensorsDirectory(write_huggingface_directory(tmp_path / "source", WIDE, "fp8"))
    state = in_torch.load_pretrained(tmp_path / "source").state_dict()
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    codes, scales = tensors.read(name).astype(np.float32), tensors.read(f"{name}_scale_inv")
    assert codes.shape == (136, 132) and scales.shape == (2, 2)
    for row, column in np.ndindex(codes.shape):
        assert state[name][row, column] == codes[row, column] * scales[row // 128, column // 128]


def test_a_tokenizer_goes_along(tmp_path):
    train_tokenizer(["some text to learn from"], 300).save(str(tmp_path / "tokenizer.json"))
    for sibling, model in ((in_jax, (TINY, random_variables(TINY))), (in_torch, None)):
        model = model or (in_torch.load_pretrained(tmp_path / in_jax.__name__),)
        sibling.save_pretrained(tmp_path / sibling.__name__, *model, tokenizer=tmp_path)
    ours, theirs = (contents(tmp_path / sibling.__name__) for sibling in (in_jax, in_torch))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert ours[name] == theirs[name]
    assert json.loads(ours["generation_config.json"])["eos_token_id"] == 0


@pytest.mark.parametrize("sibling", [in_jax, in_torch])
def test_what_does_not_fit_is_named(sibling, tmp_path):
    source = write_huggingface_directory(tmp_path / "source", WIDE)
    content = json.loads((source / "config.json").read_text())

    def load(**changes):
        (source / "config.json").write_text(json.dumps(content | changes))
        with pytest.raises(UserError) as caught:
            sibling.load_pretrained(source)
        assert "\n" not in str(caught.value) and str(source) in str(caught.value)
        return str(caught.value)

    assert "model_type is llama" in load(model_type="llama")
    assert "model.layers.3.embed_tokens.weight" in load(num_hidden_layers=3)
    fault = load(first_k_dense_replace=2)
    assert "model.layers.1.mlp.gate_proj.weight" in fault and "model.layers.1.mlp.experts.7.up_proj.weight" in fault
    fault = load(kv_lora_rank=24)
    assert "model.layers.0.self_attn.kv_b_proj.weight [66, 16] for [66, 24]" in fault.replace("weight: ", "weight ")
    with pytest.raises(UserError, match="choose one of float32, bfloat16, float16, fp8"):
        sibling.save_pretrained(tmp_path / "out", *_model(sibling), dtype="int4")
    with pytest.raises(UserError, match="is there already"):
        sibling.save_pretrained(source, *_model(sibling))


def _model(sibling):
    return (TINY, random_variables(TINY)) if sibling is in_jax else (in_torch.DeepseekV3(TINY),)


def test_variables_of_another_config_are_refused(tmp_path):
    wider = dataclasses.replace(TINY, kv_lora_rank=24)
    with pytest.raises(UserError, match=r"kv_a_proj_with_mqa/weight: of shape .1, 48, 24.; .1, 48, 32. is expected"):
        in_jax.save_pretrained(tmp_path / "out", wider, random_variables(TINY))
    assert not list(tmp_path.iterdir())


def test_truncated_files_and_foreign_copies(tmp_path):
    source = write_huggingface_directory(tmp_path / "source", TINY)
    path = source / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    for sibling in (in_jax, in_torch):
        with pytest.raises(UserError, match=r"model\.safetensors"):
            sibling.load_pretrained(source)
    tensors = SafetensorsDirectory(write_huggingface_directory(tmp_path / "other", TINY))
    copy = tensors.entries[f"model.layers.{TINY.num_hidden_layers}.embed_tokens.weight"]
    changed = bytearray(whole)
    changed[copy.start + 2] ^= 1
    path.write_bytes(changed)
    for sibling in (in_jax, in_torch):
        with pytest.raises(UserError, match=r"embed_tokens\.weight: is not equal to model\.embed_tokens\.weight"):
            sibling.load_pretrained(source)


def test_a_directory_that_holds_no_model_is_named(tmp_path):
    """By both siblings, and where a run's config cannot be, the file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("train: {batch_size: -1}")
    for load in (load_model, in_torch.load_pretrained):
        for name, complaint in (("absent", "there is no such directory"), ("empty", "config.json")):
            with pytest.raises(UserError, match=f"^{tmp_path / name}: .*{complaint}") as caught:
                load(tmp_path / name)
            one_line(caught)
    with pytest.raises(UserError, match=r"run/config\.yaml: train\.batch_size=-1: must be at least 1"):
        load_model(tmp_path / "run")

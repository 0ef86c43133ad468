"""Training on from weights that are there: both programs begin alike, and what does not fit is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import deepseek_torch.train as in_torch
from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.config import ConfigError, TrainConfig, load_config
from deepseek_jax.config.trainable import check_trainable, learning_part, with_part
from deepseek_jax.planning.figures import checkpoint_bytes, optimizer_bytes
from deepseek_jax.train import read_config, train
from deepseek_jax.training.initial import initial_variables, with_tokenizer
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import init_state
from deepseek_torch.training.step import init_state as init_torch_state
from parity_tests.checkpoints import TINY, write_huggingface_directory

SMALL = dataclasses.replace(TINY, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("initial")
    tokenizer.save(str(path / "tokenizer.json"))
    model = write_huggingface_directory(path / "model", SMALL, tokenizer=path)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    return model


@pytest.mark.slow
def test_both_programs_train_on_alike_from_an_export(directory, text_file, tmp_path, monkeypatch):
    """Model and tokenizer are the export's, of whose two MTP modules one is left; three steps of some weights agree."""
    words = [
        f"init_from={directory}", f"data.input={text_file}", "train.sequence_length=16", "train.batch_size=2", "train.steps=3",
        "train.eval_sequences=2", "train.warmup_steps=0", "train.learning_rate=1e-3", "model.num_nextn_predict_layers=1",
        "model.remat=none", "model.grouped_matmul=reference",
        "train.trainable=['*/self_attn/*', moe_layers/mlp/experts/up_proj, lm_head/weight]",
    ]  # fmt: skip
    ours = read_config(None, False, [*words, f"run_dir={tmp_path / 'jax'}"])
    expected = dataclasses.replace(SMALL, num_nextn_predict_layers=1, remat="none", grouped_matmul="reference")
    assert ours.model == expected
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    state = train(ours)
    in_torch.train(in_torch.read_config(None, [*words, f"run_dir={tmp_path / 'torch'}"]))
    for mine, theirs in zip(*(read_metrics(tmp_path / name) for name in ("jax", "torch")), strict=True):
        for name in ("loss", "next_token_loss", "grad_norm", "bits_per_byte"):
            assert mine.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=2e-5), name
        assert mine.get("mtp_losses", []) == pytest.approx(theirs.get("mtp_losses", []), rel=2e-5)
    before, after = (flatten_dict(tree, sep="/") for tree in (load_pretrained(directory)[1]["params"], state.params))
    for name, weight in after.items():
        old = before[name][:1] if name.startswith("mtp_layers") else before[name]
        learnt = "/self_attn/" in name or name in ("moe_layers/mlp/experts/up_proj", "lm_head/weight")
        moved = np.abs(weight - old).max()
        assert 0 < moved < 4e-3 if learnt else moved == 0, name
    assert (tmp_path / "jax/tokenizer.json").read_text() == (directory / "tokenizer.json").read_text()
    assert (tmp_path / "jax/huggingface/chat_template.jinja").is_file(), "exports are to have it, too"
    assert load_config(tmp_path / "jax/config.yaml").data.tokenizer == str(directory / "tokenizer.json")
    again = initial_variables(read_config(None, False, [f"init_from={tmp_path / 'jax'}"]))
    jax.tree.map(np.testing.assert_array_equal, again, {"params": state.params, "router_state": state.router_state})


def test_only_what_is_named_learns(directory):
    """Both siblings take the same parameters, and of the others no moments are there, in memory or in what a plan counts."""
    train = TrainConfig(trainable=["*/self_attn/*", "moe_layers/mlp/experts/up_proj", "lm_head/weight"])
    config = dataclasses.replace(load_config("tiny"), model=SMALL, train=train)
    params = load_pretrained(directory)[1]["params"]
    state = jax.eval_shape(lambda: init_state(config, {"params": params, "router_state": {}}))
    adam = next(part for part in state.optimizer if hasattr(part, "mu"))
    moved = set(flatten_dict(adam.mu))
    asked = {path for path in moved if "self_attn" in path}
    assert moved - asked == {("moe_layers", "mlp", "experts", "up_proj"), ("lm_head", "weight")} and len(asked) == 14
    learning = learning_part(train.trainable, params)
    assert set(flatten_dict(learning)) == set(flatten_dict(adam.nu)) == moved
    changed = with_part(params, jax.tree.map(lambda leaf: leaf + 1, learning))
    assert {path for path, leaf in flatten_dict(changed).items() if (leaf != flatten_dict(params)[path]).any()} == moved
    numbers = sum(leaf.size for leaf in jax.tree.leaves(learning))
    everything, some = (
        checkpoint_bytes(dataclasses.replace(config, train=t))["training state"] for t in (TrainConfig(), train)
    )
    assert everything - some == 2 * 4 * (sum(leaf.size for leaf in jax.tree.leaves(params)) - numbers)
    assert optimizer_bytes(config) == numbers * (4 + 2 * (4 + 4 + 4)) + 2 * 4
    model = init_torch_state(config).model
    paths = {place.name: place.path[1:] for place in layout(SMALL)}
    assert {paths[name] for name, parameter in model.named_parameters() if parameter.requires_grad} == moved


def test_float64_is_all_of_it_or_one_line(x64):
    """From weights in float32, too; where JAX has it."""
    config = load_config("tiny", ["model.precision=float64"])
    narrow = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), jax.eval_shape(lambda: init_state(config)))
    given = {"params": narrow.params, "router_state": narrow.router_state}
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_state(config, given)))}
    assert types == {"float64", "int32"}
    with (
        jax.enable_x64(False),
        pytest.raises(ConfigError, match=r"^model.precision=float64: .* JAX_ENABLE_X64=1 is in the env"),
    ):
        train(config)


def test_what_does_not_fit_is_one_line(directory, tmp_path):
    asked = read_config(None, False, [f"init_from={directory}", "model.kv_lora_rank=24"])
    with pytest.raises(ConfigError, match=r"model.kv_lora_rank is 16, and here it is 24; leave --config out"):
        initial_variables(asked)
    with pytest.raises(ConfigError, match=r"model.kv_lora_rank is 16, and here it is 24"):
        in_torch.initial_model(asked)
    more = read_config(None, False, [f"init_from={directory}", "model.num_nextn_predict_layers=3"])
    with pytest.raises(ConfigError, match=r"num_nextn_predict_layers is 2, and here it is 3"):
        initial_variables(more)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    bare = dataclasses.replace(asked, init_from=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no tokenizer.json; name the tokenizer"):
        with_tokenizer(bare)
    with pytest.raises(ConfigError, match=r"init_from=DIR"):
        read_config(None, False, [])
    with pytest.raises(ConfigError, match=r"train.trainable=self_attn/.: no parameter has that name; some are embed_tokens/"):
        check_trainable(["lm_head/*", "self_attn/*"], flatten_dict(load_pretrained(directory)[1]["params"]))
    assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 2
    assert (
        "mtp_layers"
        not in initial_variables(read_config(None, False, [f"init_from={directory}", "model.num_nextn_predict_layers=0"]))[
            "params"
        ]
    )

"""The guide's forms beside the report's: both siblings compute them alike, and each is what its name says."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig

import deepseek_jax.model.router as jax_router
import deepseek_torch.model.router as torch_router
from deepseek_jax.checkpoint.hf_config import require_known_type
from deepseek_jax.checkpoint.pretrained import load_pretrained as load_jax
from deepseek_jax.checkpoint.pretrained import save_pretrained as save_jax
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.config import ConfigError, load_config, presets
from deepseek_jax.generation.generator import Generator
from deepseek_jax.model.router import dropless
from deepseek_jax.planning.figures import count_parameters
from deepseek_torch.generate import generate
from deepseek_torch.model.layers import FeedForward
from deepseek_torch.pretrained import load_pretrained as load_torch
from deepseek_torch.pretrained import save_pretrained as save_torch
from parity_tests.comparison import assert_within, relative_difference
from parity_tests.modules import Maker, cases, compare
from parity_tests.siblings import Siblings

TOLERANCE = 1e-12
GUIDE = dataclasses.replace(
    load_config("tiny").model, num_hidden_layers=2, precision="float64", grouped_matmul="reference", remat="none",
    scoring_func="softmax", capacity_factor=1.0, n_shared_experts=2, shared_expert_gate=True, feed_forward="gelu",
    mtp_form="parallel", num_nextn_predict_layers=2,
)  # fmt: skip
"""All of them at once."""


@cache
def siblings(**changes: object) -> Siblings:
    return Siblings(dataclasses.replace(GUIDE, **changes))


MODULES = ["feed-forward", "router", "experts", "moe layer", "mtp module"]


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    (case,) = [case for case in cases(siblings()) if case.name == name]
    forward, backward = compare(case, siblings())
    assert_within(forward, TOLERANCE)
    assert_within(backward, TOLERANCE)


@pytest.mark.parametrize("changes", [
    {"norm_topk_prob": False},
    {"scoring_func": "sigmoid", "capacity_factor": 0.5},
    {"capacity_factor": None, "n_group": 1, "topk_group": 1},
], ids=["not-normalised", "sigmoid-that-drops-half", "softmax-dropless"])  # fmt: skip
def test_routers(changes):
    pair = siblings(**changes)
    (case,) = [case for case in cases(pair, batch=3, length=5) if case.name == "router"]
    forward, backward = compare(case, pair)
    assert_within(forward, TOLERANCE)
    assert_within(backward, TOLERANCE)


@pytest.mark.parametrize("changes", [
    {},
    {"n_shared_experts": 0, "shared_expert_gate": False, "mtp_form": "sequential", "num_nextn_predict_layers": 1},
], ids=["all", "no-shared-expert-sequential"])  # fmt: skip
def test_model(changes):
    pair = siblings(**changes)
    forward, backward = compare(Maker(pair, 2, 11).whole_model(), pair)
    assert_within(forward, TOLERANCE)
    assert_within(backward, TOLERANCE)
    assert len(backward) == len(list(pair.torch.parameters()))


def test_room_is_given_in_the_order_of_tokens_and_by_sequence():
    """Room for ceil(0.75 x 4 x 2 / 3) = 2 tokens an expert and sequence."""
    config = dataclasses.replace(GUIDE, n_routed_experts=3, num_experts_per_tok=2, capacity_factor=0.75)
    indices = np.array([[[0, 1], [0, 2], [1, 0], [0, 1]], [[2, 1], [0, 2], [2, 0], [1, 2]]], np.int32)
    expected = np.array([[[1, 1], [1, 1], [1, 0], [0, 0]], [[1, 1], [1, 1], [0, 1], [1, 0]]], bool)
    assert np.array_equal(jax_router.find_room(config, indices, config.capacity_factor), expected)
    assert np.array_equal(torch_router.find_room(config, torch.from_numpy(indices), config.capacity_factor), expected)


def test_a_token_without_any_room_is_served_by_nothing_and_has_no_gradient():
    """Nor is it a NaN, which 0 / 1e-20 becomes on the way back in float32."""
    weights = np.array([[0.5, 0.25], [0.0, 0.5], [0.0, 0.0]], np.float32)
    expected = np.array([[2 / 3, 1 / 3], [0, 1], [0, 0]])
    gradients = jax.grad(lambda w: jnp.sum(jax_router.normalised(w) * jnp.array([1.0, 2.0])))(weights)
    assert np.allclose(jax_router.normalised(weights), expected) and np.isfinite(gradients).all()
    leaf = torch.from_numpy(weights).requires_grad_()
    ours = torch_router.normalised(leaf)
    (ours * torch.tensor([1.0, 2.0])).sum().backward()
    assert np.allclose(ours.detach(), expected) and relative_difference(leaf.grad, gradients) < 1e-6


def test_the_share_dropped_is_told_and_only_in_training():
    pair = siblings(capacity_factor=0.5)
    tokens = np.random.default_rng(0).integers(0, GUIDE.vocab_size, (2, 18), dtype=np.int32)
    with torch.no_grad():
        output = pair.torch.train()(torch.from_numpy(tokens))
        hidden = pair.torch.eval().hidden_states(torch.from_numpy(tokens[:, :16]))
        unlimited = siblings(capacity_factor=None).torch
        assert torch.equal(hidden, unlimited.hidden_states(torch.from_numpy(tokens[:, :16])))
        assert unlimited(torch.from_numpy(tokens)).dropped is None
    pair.torch.train()
    # An expert has room for at most half of its even share.
    assert 0.5 <= output.dropped < 1 and relative_difference(output.hidden[0], hidden) > 1e-3
    assert dropless(pair.config) == unlimited.config


def test_gated_shared_experts_are_each_a_feed_forward_of_its_own():
    """Side by side and weighed before the down projection they give what one by one and weighed after it."""
    pair = siblings()
    config, moe = pair.config, pair.torch.moe_layers[0].mlp
    x = torch.randn(5, config.hidden_size, dtype=torch.float64)
    width = config.moe_intermediate_size
    with torch.no_grad():
        shares = torch.softmax(x @ moe.shared_expert_gate.weight.T, dim=-1)
        total = 0
        for number in range(2):
            expert, part = FeedForward(config, width), slice(number * width, (number + 1) * width)
            expert.up_proj.weight.copy_(moe.shared_experts.up_proj.weight[part])
            expert.down_proj.weight.copy_(moe.shared_experts.down_proj.weight[:, part])
            total = total + shares[:, number : number + 1] * expert(x)
        assert relative_difference(moe._shared(x), total) < 1e-14


def test_parallel_heads_know_only_the_main_models_state():
    """Neither the tokens that lie between nor each other."""
    model = siblings().torch
    tokens = torch.randint(0, GUIDE.vocab_size, (1, 10))
    others = tokens.clone()
    others[:, 8:] = (others[:, 8:] + 1) % GUIDE.vocab_size
    with torch.no_grad():
        before, after = model(tokens).hidden, model(others).hidden
        assert torch.equal(before, after) and not torch.equal(before[1], before[2])
        model.mtp_layers[0].proj.weight.mul_(2)
        changed = model(tokens).hidden
        model.mtp_layers[0].proj.weight.div_(2)
    assert torch.equal(changed[2], before[2]) and not torch.equal(changed[1], before[1])


def test_greedy_tokens_are_equal():
    """Prompts are read expert by expert; three sequences choose more experts than there are, and are written side by side."""
    sizes = dict(hidden_size=64, q_lora_rank=32, v_head_dim=32, moe_intermediate_size=32)
    prompts = [[5, 9, 2, 77, 31], [8], [100, 101, 102]]
    pair = siblings(**sizes)
    expected = list(generate(pair.torch, prompts, 12, None))
    pair.torch.train()
    assert len({token for step in expected for token in step}) > 10, "a model that repeats itself proves little"
    with jax.enable_x64(True):
        generator = Generator(pair.config, pair.variables, sequences=3)
        assert [step.tolist() for step in generator.generate(prompts, 12, None)] == expected


def test_what_hugging_face_has_not_is_refused_by_name():
    named = "feed_forward=gelu, model.mtp_form=parallel, model.scoring_func=softmax, model.shared_expert_gate=true"
    with pytest.raises(CheckpointError, match=f"^here: Hugging Face's deepseek_v3 has no model.{named}; keep it as a run, or"):
        require_known_type(GUIDE, "here")
    require_known_type(dataclasses.replace(load_config("tiny").model, capacity_factor=1.0), "here")  # training alone


def test_saved_under_a_name_of_our_own(tmp_path):
    """Each sibling reads what the other wrote, and transformers takes it for no deepseek_v3."""
    config, tokens = dataclasses.replace(GUIDE, precision="float32", capacity_factor=None), torch.arange(12)[None]
    model = siblings(precision="float32", capacity_factor=None).torch
    save_torch(tmp_path / "torch", model)
    loaded, variables = load_jax(tmp_path / "torch")
    assert loaded == dataclasses.replace(config, grouped_matmul="auto", remat="products")
    save_jax(tmp_path / "jax", loaded, variables, "fp8")
    narrow = load_torch(tmp_path / "jax")
    save_torch(tmp_path / "again", narrow, "fp8")
    again = load_torch(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(narrow.parameters(), again.parameters()))
    with torch.no_grad():
        assert 0 < relative_difference(narrow(tokens).hidden, model(tokens).hidden) < 0.3
    with pytest.raises(ValueError, match="deepseek_jax"):
        AutoConfig.from_pretrained(tmp_path / "torch")


@pytest.mark.parametrize(("field", "complaint"), [
    ("scoring_func=tanh", "model.scoring_func=tanh: choose one of sigmoid, softmax"),
    ("feed_forward=relu", "model.feed_forward=relu: choose one of swiglu, gelu"),
    ("mtp_form=medusa", "model.mtp_form=medusa: choose one of sequential, parallel"),
    ("capacity_factor=0", "model.capacity_factor=0.0: must be greater than 0"),
    ("shared_expert_gate=true", "model.shared_expert_gate=true: weighs several shared experts, and n_shared_experts is 1"),
])  # fmt: skip
def test_a_form_that_there_is_not(field, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config("tiny", [f"model.{field}"])


@pytest.mark.parametrize("name", ["guide_mini", "guide_small"])
def test_the_guides_presets_come_to_what_their_headers_say(name):
    count = count_parameters(load_config(name).model)
    header = presets()[name].read_text().partition("model:")[0]
    assert f"comes to {count.total:,} parameters" in header and f"{count.active:,} of them" in header
    assert load_config(name, ["train.steps=7"]).model.capacity_factor == 1.25

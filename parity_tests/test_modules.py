"""Each module in both siblings: outputs and every gradient, in float64 and in float32."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import deepseek_jax.model.rope as jax_rope
import deepseek_jax.model.router as jax_router
import deepseek_torch.model.rope as torch_rope
import deepseek_torch.model.router as torch_router
from deepseek_jax.config import ModelConfig, RopeScaling, load_config
from deepseek_jax.model.attention import SCORES, Latents, MultiHeadLatentAttention
from deepseek_torch.model.attention import Latents as TorchLatents
from parity_tests.comparison import assert_within, relative_difference
from parity_tests.modules import COMPILE_QUICKLY, Maker, cases, compare
from parity_tests.siblings import Siblings
from parity_tests.transformers_oracle import transformers_config
from parity_tests.weights import module_variables

TOLERANCES = {"float64": 1e-12, "float32": 1e-5}

YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.1)


@cache
def siblings(precision: str, **changes: object) -> Siblings:
    """Both models of `configs/tiny.yaml` with groups, negative biases and YaRN."""
    tiny = load_config("tiny", ["model.num_hidden_layers=2"]).model
    return Siblings(dataclasses.replace(tiny, precision=precision, rope_scaling=YARN, **changes))


MODULES = ["rope", "feed-forward", "attention", "dense layer", "router", "experts", "moe layer", "mtp module"]


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", MODULES)
def test_module(name, precision):
    pair = siblings(precision)
    (case,) = [case for case in cases(pair) if case.name == name]
    forward, backward = compare(case, pair)
    assert_within(forward, TOLERANCES[precision])
    assert_within(backward, TOLERANCES[precision])


def test_every_module_of_the_config_has_a_case():
    assert [case.name for case in cases(siblings("float64"))] == [*MODULES, "whole model"]


@pytest.mark.parametrize("precision", TOLERANCES)
def test_experts_without_any_token_and_with_all(precision):
    pair = siblings(precision)
    maker = Maker(pair, batch=2, length=11)
    choices = maker.random_choices()
    others = [[expert for expert in row if expert > 1] + [5, 6, 7] for row in choices]
    indices = np.array([[0, *dict.fromkeys(row)][:3] for row in others])
    assert (indices[:, 0] == 0).all() and not (indices == 1).any()
    forward, backward = compare(maker.experts("experts", indices), pair)
    assert_within(forward, TOLERANCES[precision])
    assert_within(backward, TOLERANCES[precision])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("attention", {"q_lora_rank": None}),
        ("router", {"n_group": 1, "topk_group": 1}),
        ("router", {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 2, "topk_group": 1}),
    ],
)
def test_variants(name, changes):
    pair = siblings("float64", **changes)
    (case,) = [case for case in cases(pair, batch=3, length=5) if case.name == name]
    forward, backward = compare(case, pair)
    assert_within(forward, TOLERANCES["float64"])
    assert_within(backward, TOLERANCES["float64"])


def test_a_planted_fault_shows_where_it_is_and_nowhere_else(monkeypatch):
    """Halves instead of interleaved pairs, the classical mistake, must be seen; it must not blame the router."""

    def halves(x, cos, sin, interleave):
        cos, sin = cos[..., None, :], sin[..., None, :]
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    monkeypatch.setattr(jax_rope, "apply_rope", halves)
    pair = siblings("float32")
    by_name = {case.name: case for case in cases(pair)}
    rope, _ = compare(by_name["rope"], pair)
    router, _ = compare(by_name["router"], pair)
    assert rope["output 0"].relative > 0.1
    assert_within(router, TOLERANCES["float32"])


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_decoding_over_the_cache_equals_attention_over_the_whole_sequence(q_lora_rank):
    """JAX absorbs the expansion, PyTorch expands the cache, and neither differs from no cache at all."""
    pair = siblings("float64", q_lora_rank=q_lora_rank)
    c, length = pair.config, 7
    module = pair.torch.moe_layers[0].self_attn
    x = np.random.default_rng(3).standard_normal((2, length, c.hidden_size))
    positions = np.tile(np.arange(length), (2, 1))
    with torch.no_grad():
        whole, _ = module(torch.from_numpy(x), torch_rope.rope_angles(c, torch.from_numpy(positions)), None)

    # Rows not yet written hold nonsense, which must not be read.
    start = [np.full((2, length + 2, width), 1e3) for width in (c.kv_lora_rank, c.qk_rope_head_dim)]
    cache = TorchLatents(*map(torch.from_numpy, start))
    for i in range(length):
        at = torch.from_numpy(positions[:, i : i + 1])
        with torch.no_grad():
            out, cache = module(torch.from_numpy(x[:, i : i + 1]), torch_rope.rope_angles(c, at), at, cache)
        assert relative_difference(out, whole[:, i : i + 1]) < 1e-13

    variables = module_variables(pair.variables, "moe_layers", 0, "self_attn")

    @jax.jit
    def step(x, at, cache):
        return MultiHeadLatentAttention(c).apply(variables, x, jax_rope.rope_angles(c, at), at, cache)

    with jax.enable_x64(True):
        cache = Latents(*map(jnp.asarray, start))
        for i in range(length):
            out, cache = step(x[:, i : i + 1], positions[:, i : i + 1], cache)
            assert relative_difference(out, whole[:, i : i + 1]) < 1e-13


SCALINGS = [
    None,
    YARN,
    RopeScaling(),
    RopeScaling(factor=1.0),
    RopeScaling(mscale=0.0),
    RopeScaling(mscale=0.5, mscale_all_dim=0.0),
    RopeScaling(factor=3.0, original_max_position_embeddings=64, beta_fast=2.0, beta_slow=2.0),
    RopeScaling(original_max_position_embeddings=131072),  # the slow cut lies beyond the last pair
    RopeScaling(original_max_position_embeddings=6),  # both cuts are at the first
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dim", [8, 64])
def test_yarn_is_derived_alike(scaling, dim):
    config = ModelConfig(qk_rope_head_dim=dim, rope_scaling=scaling)
    assert relative_difference(jax_rope.inverse_frequencies(config), torch_rope.inverse_frequencies(config)) < 1e-15
    assert math.isclose(jax_rope.rope_magnitude(config), torch_rope.rope_magnitude(config), rel_tol=1e-15)
    assert math.isclose(jax_rope.softmax_scale(config), torch_rope.softmax_scale(config), rel_tol=1e-15)
    if scaling is not None:
        theirs, magnitude = ROPE_INIT_FUNCTIONS["yarn"](transformers_config(config), device="cpu")  # in float32
        assert relative_difference(jax_rope.inverse_frequencies(config), theirs) < 1e-6
        assert math.isclose(jax_rope.rope_magnitude(config), magnitude, rel_tol=1e-12)


def test_yarn_of_deepseek_v3():
    """The released model: pairs 0 to 10 as they were, from 23 on divided by 40, the scale 1.87 times larger."""
    config = ModelConfig(rope_scaling=RopeScaling())
    plain = dataclasses.replace(config, rope_scaling=None)
    ratio = np.array(torch_rope.inverse_frequencies(config)) / np.array(torch_rope.inverse_frequencies(plain))
    assert np.allclose(ratio[:11], 1) and np.allclose(ratio[23:], 1 / 40) and (np.diff(ratio[10:24]) < 0).all()
    assert torch_rope.rope_magnitude(config) == 1.0
    assert math.isclose(torch_rope.softmax_scale(config) * math.sqrt(192), (0.1 * math.log(40) + 1) ** 2)


def test_experts_of_equal_score_are_chosen_alike():
    """The first of them; scores saturate at 1, so that this does happen."""
    config = dataclasses.replace(siblings("float32").config, n_group=4, topk_group=2)
    scores = np.random.default_rng(4).integers(-2, 3, (50, config.n_routed_experts)).astype(np.float32)
    ours = torch_router.select_experts(config, torch.from_numpy(scores))
    assert np.array_equal(jax_router.select_experts(config, scores), ours)


def test_experts_outside_the_kept_groups_stay_out_however_negative_the_biases():
    config = dataclasses.replace(siblings("float32").config, n_group=4, topk_group=2)
    scores = -np.arange(1.0, 9.0, dtype=np.float32)[None]
    in_torch = torch_router.select_experts(config, torch.from_numpy(scores))
    for chosen in (jax_router.select_experts(config, scores), in_torch):
        assert sorted(np.asarray(chosen)[0]) == [0, 1, 2]


def test_bias_update_is_alike():
    rng = np.random.default_rng(5)
    bias, counts = rng.standard_normal((3, 8)), rng.integers(0, 4, (3, 8))
    counts[0] = 2  # an even load moves nothing
    ours = torch_router.updated_bias(torch.from_numpy(bias), torch.from_numpy(counts), 1e-3)
    with jax.enable_x64(True):
        theirs = jax_router.updated_bias(jnp.asarray(bias), jnp.asarray(counts), 1e-3)
    assert np.array_equal(theirs, ours) and np.array_equal(ours[0], bias[0])


def test_weights_as_small_as_the_reference_adds_are_normalised_as_it_does():
    weights = np.array([[3e-20, 1e-20], [0, 0], [0.3, 0.1]])
    expected = np.array([[0.6, 0.2], [0, 0], [0.75, 0.25]])
    np.testing.assert_allclose(torch_router.normalised(torch.from_numpy(weights)), expected, rtol=1e-15)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax_router.normalised(jnp.asarray(weights)), expected, rtol=1e-15)


def test_largest_scores_are_made_where_they_are_asked_for():
    """By one product of queries and keys more, beside an implementation that does not tell them."""
    config = dataclasses.replace(siblings("float32").config, attention="reference")
    attention, x, positions = (
        MultiHeadLatentAttention(config),
        np.zeros((1, 5, config.hidden_size), "float32"),
        np.arange(5)[None],
    )
    rope = jax_rope.rope_angles(config, positions)
    params = jax.eval_shape(attention.init, jax.random.key(0), x, rope, positions)["params"]

    def traced(*collections):
        def attend(params):
            return attention.apply({"params": params}, x, rope, positions, mutable=collections)

        return str(jax.make_jaxpr(attend)(params)).count("dot_general"), jax.eval_shape(attend, params)[1]

    (without, nothing), (products, told) = traced(), traced(SCORES)
    assert products == without + 1 and not nothing
    assert [scores.shape for scores in jax.tree.leaves(told)] == [(config.num_attention_heads,)]


def test_compiled_quickly_is_the_same_program():
    """The options of these tests change how, not what is computed."""
    pair = siblings("float64")
    (case,) = [case for case in cases(pair) if case.name == "feed-forward"]
    with jax.enable_x64(True):
        x = jnp.asarray(case.inputs[0])
        (quick,), _ = jax.jit(case.jax_call, compiler_options=COMPILE_QUICKLY)(case.params, x)
        (usual,), _ = jax.jit(case.jax_call)(case.params, x)
    assert relative_difference(quick, usual) < 1e-14


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_ends_turn_by_a_product_as_by_parts(dtype, x64):
    """To the bit, and so does the gradient; angles of another magnitude, as under YaRN."""
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(2, 5, 3, 10)), dtype) for _ in range(2))
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    angles = rng.normal(size=(2, 5, 2))
    cos, sin = jnp.asarray(1.25 * np.cos(angles), wide), jnp.asarray(1.25 * np.sin(angles), wide)
    for interleave in (True, False):
        parts, pull = jax.vjp(lambda x: jax_rope.turned_by_parts(x, cos, sin, interleave), x)
        np.testing.assert_array_equal(jax_rope.turned_by_product(x, cos, sin, interleave), parts)
        turned, pull_turned = jax.vjp(lambda x: jax_rope.turn_ends(x, cos, sin, interleave), x)
        np.testing.assert_array_equal(turned, parts)
        np.testing.assert_array_equal(*(jnp.asarray(p(cotangent)[0], wide) for p in (pull_turned, pull)))
        np.testing.assert_array_equal(jax_rope.turned_by_product(cotangent, cos, -sin, interleave), pull(cotangent)[0])

"""Both siblings against Hugging Face transformers with the same weights: logits, loss and every gradient.

In float64 first, where a difference of mathematics has nowhere to hide; then in float32, where
transformers runs as it is.
"""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.config import RopeScaling, load_config
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.training.loss import cross_entropy
from parity_tests.comparison import assert_close, relative_difference
from parity_tests.modules import COMPILE_QUICKLY
from parity_tests.siblings import Siblings
from parity_tests.transformers_oracle import Oracle, causal_loss, float64_islands, fuse_experts, split_experts
from parity_tests.weights import to_torch

TOLERANCES = {"float64": 1e-12, "float32": 1e-5}

TINY = dataclasses.replace(
    load_config("tiny").model, num_hidden_layers=3, num_nextn_predict_layers=0, grouped_matmul="reference",
    remat="none",
)  # fmt: skip
YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, mscale=0.7, mscale_all_dim=1.1)
CONFIGS = {
    "groups and YaRN": dataclasses.replace(TINY, rope_scaling=YARN),
    "no query compression, one group, sizes off 128": dataclasses.replace(
        TINY, q_lora_rank=None, n_group=1, topk_group=1, num_hidden_layers=2, hidden_size=136, intermediate_size=260,
        moe_intermediate_size=132, kv_lora_rank=130, qk_nope_head_dim=20, v_head_dim=45,
    ),
    "tied head, factors not normalised, two shared experts": dataclasses.replace(
        TINY, tie_word_embeddings=True, norm_topk_prob=False, n_shared_experts=2, n_group=2, topk_group=1,
        rms_norm_eps=1e-5,
    ),
    "dense layers alone": dataclasses.replace(TINY, first_k_dense_replace=3),
    "experts in every layer, YaRN without mscale": dataclasses.replace(
        TINY, first_k_dense_replace=0, rope_scaling=dataclasses.replace(YARN, mscale=0.0, mscale_all_dim=0.0)
    ),
}  # fmt: skip
GROUPS, OFF_128, *_ = CONFIGS


def widened(precision):
    """transformers as it is in float32; with its float32 islands widened in float64."""
    return float64_islands() if precision == "float64" else nullcontext()


def random_tokens(config, *shape):
    return np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)


def judged(pair, tokens):
    """transformers' logits, loss and gradients, by our names."""
    tokens = torch.from_numpy(tokens).long()
    with widened(pair.config.precision):
        oracle = Oracle(pair.config, pair.torch.state_dict())
        if pair.config.precision == "float64":  # its own loss works in float32
            logits = oracle.main(tokens).logits
            loss = causal_loss(logits, tokens)
        else:
            logits, loss = (getattr(oracle.main(tokens, labels=tokens), name) for name in ("logits", "loss"))
        loss.backward()
    return {"logits": logits, "loss": loss} | oracle.gradients()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", CONFIGS)
def test_pytorch_sibling(name, precision):
    pair = Siblings(dataclasses.replace(CONFIGS[name], precision=precision))
    tokens = random_tokens(pair.config, 2, 33)
    expected = judged(pair, tokens)
    logits = pair.torch.hidden_states(torch.from_numpy(tokens)) @ pair.torch.head()
    loss = causal_loss(logits, torch.from_numpy(tokens).long())
    loss.backward()
    ours = {"logits": logits, "loss": loss} | {name: p.grad for name, p in pair.torch.named_parameters()}
    assert_close(ours, expected, TOLERANCES[precision])


@pytest.mark.parametrize(("name", "precision"), [(GROUPS, "float64"), (OFF_128, "float64"), (GROUPS, "float32")])
def test_jax_sibling(name, precision):
    pair = Siblings(dataclasses.replace(CONFIGS[name], precision=precision))
    tokens = random_tokens(pair.config, 2, 33)

    def loss_of(params, state):
        variables = {"params": params, **state}
        hidden = pair.jax.apply(variables, tokens, method="hidden_states")
        head = pair.jax.apply(variables, method="head")
        predicting, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
        weights = jnp.full(targets.shape, 1 / targets.size, hidden.dtype)
        return cross_entropy(predicting, head, targets, weights, chunk=24)[0], hidden @ head

    with jax.enable_x64(precision == "float64"):
        params, *state = pair.variables.pop("params"), pair.variables
        both = jax.jit(jax.value_and_grad(loss_of, has_aux=True), compiler_options=COMPILE_QUICKLY)
        (loss, logits), gradients = jax.device_get(both(params, *state))
    ours = {"logits": logits, "loss": loss} | to_torch({"params": gradients}, pair.config)
    assert_close(ours, judged(pair, tokens), TOLERANCES[precision])


def test_yarn_at_four_times_the_original_length():
    """Logits of both siblings with the report's scaling (4.3: s 40, alpha 1, beta 32), at every position."""
    original = 16
    scaling = RopeScaling(factor=40.0, original_max_position_embeddings=original, beta_fast=32.0, beta_slow=1.0)
    config = dataclasses.replace(CONFIGS[GROUPS], rope_scaling=scaling, precision="float64", num_hidden_layers=2)
    pair, tokens = Siblings(config), random_tokens(config, 2, 4 * original)
    with float64_islands(), torch.no_grad():
        expected = Oracle(config, pair.torch.state_dict()).main(torch.from_numpy(tokens).long()).logits
        ours = pair.torch.hidden_states(torch.from_numpy(tokens)) @ pair.torch.head()
    plain = dataclasses.replace(config, rope_scaling=None)
    with jax.enable_x64(True):

        def logits(variables, config):
            model = DeepseekV3(config)
            return model.apply(variables, tokens, method="hidden_states") @ model.apply(variables, method="head")

        forward = jax.jit(logits, static_argnums=1, compiler_options=COMPILE_QUICKLY)
        theirs, unscaled = (np.asarray(forward(pair.variables, each)) for each in (config, plain))
    assert_close({"torch": ours, "jax": theirs}, {"torch": expected, "jax": expected}, 1e-12)
    assert relative_difference(unscaled, expected) > 1e-3, "the scaling is to matter"


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_modules_of_the_pytorch_sibling(depth, precision):
    """transformers numbers an MTP module's positions from 1 or 2 on, we from 0; RoPE sees only their differences."""
    config = dataclasses.replace(CONFIGS[GROUPS], num_nextn_predict_layers=depth, precision=precision)
    pair = Siblings(config)
    tokens = torch.from_numpy(random_tokens(config, 2, 20 + depth)).long()
    with widened(precision):
        oracle = Oracle(config, pair.torch.state_dict())
        main = oracle.main.model(tokens[:, :-depth]).last_hidden_state
        expected = torch.stack([main, *oracle.mtp_states(main, tokens)])
        sum(causal_loss(oracle.mtp.shared_head(state), tokens, k + 1) for k, state in enumerate(expected)).backward()
    output = pair.torch(tokens)
    sum(causal_loss(state @ output.head, tokens, k + 1) for k, state in enumerate(output.hidden)).backward()
    ours = {"hidden": output.hidden} | {name: p.grad for name, p in pair.torch.named_parameters()}
    assert_close(ours, {"hidden": expected} | oracle.gradients(), TOLERANCES[precision])


def test_mtp_modules_of_the_jax_sibling():
    config = dataclasses.replace(CONFIGS[GROUPS], num_nextn_predict_layers=2, precision="float64")
    pair = Siblings(config)
    tokens = random_tokens(config, 2, 22)
    with float64_islands(), torch.no_grad():
        oracle = Oracle(config, pair.torch.state_dict())
        main = oracle.main.model(torch.from_numpy(tokens[:, :-2])).last_hidden_state
        expected = torch.stack([main, *oracle.mtp_states(main, torch.from_numpy(tokens))])
    with jax.enable_x64(True):
        hidden = jax.jit(pair.jax.apply, compiler_options=COMPILE_QUICKLY)(pair.variables, tokens).hidden
        assert relative_difference(hidden, expected) < TOLERANCES["float64"]


def test_the_float64_oracle_needs_its_islands_widened():
    """Without that, transformers' float64 is good to float32 only: the widening is no decoration."""
    pair = Siblings(dataclasses.replace(CONFIGS[GROUPS], precision="float64"))
    tokens = torch.from_numpy(random_tokens(pair.config, 2, 33)).long()
    with torch.no_grad():
        ours = pair.torch.hidden_states(tokens) @ pair.torch.head()
        apart = relative_difference(Oracle(pair.config, pair.torch.state_dict()).main(tokens).logits, ours)
    assert 1e-9 < apart < 1e-5


def test_experts_fuse_and_split():
    state_dict = Siblings(CONFIGS[GROUPS]).torch.state_dict()
    back = split_experts(fuse_experts(state_dict))
    assert back.keys() == state_dict.keys() and all(torch.equal(back[key], state_dict[key]) for key in back)

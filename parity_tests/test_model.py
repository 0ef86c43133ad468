"""The whole model in both siblings: states of every depth, counts, balance loss and every gradient; and its weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.config import RopeScaling, load_config
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_torch.model.transformer import DeepseekV3 as TorchDeepseekV3
from parity_tests.comparison import assert_within
from parity_tests.modules import COMPILE_QUICKLY, Maker, compare
from parity_tests.siblings import Siblings
from parity_tests.weights import from_torch, to_torch

TOLERANCES = {"float64": 1e-12, "float32": 2e-5}

YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0)
# What compiles fastest; the modules' own tests run what training uses.
TINY = dataclasses.replace(load_config("tiny").model, num_hidden_layers=3, grouped_matmul="reference", remat="none")
CONFIGS = {
    "depth 2, groups, YaRN": dataclasses.replace(TINY, num_nextn_predict_layers=2, rope_scaling=YARN),
    "depth 1 before the norm, no query compression, tied head, experts in every layer": dataclasses.replace(
        TINY, num_hidden_layers=2, first_k_dense_replace=0, q_lora_rank=None, tie_word_embeddings=True,
        mtp_hidden_after_norm=False, n_group=1, topk_group=1, n_shared_experts=2,
    ),
    "depth 0, dense layers alone": dataclasses.replace(
        TINY, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0
    ),
    "depth 0": dataclasses.replace(TINY, num_hidden_layers=2, num_nextn_predict_layers=0),
}  # fmt: skip
DEEP, TIED, DENSE, PLAIN = CONFIGS


@pytest.mark.parametrize(
    ("name", "precision", "shape"),
    [
        (DEEP, "float64", (2, 11)),
        (DEEP, "float32", (2, 11)),
        (TIED, "float64", (2, 11)),
        (DENSE, "float64", (2, 11)),
        (PLAIN, "float64", (3, 1)),
    ],
)
def test_model(name, precision, shape):
    """`shape` is sequences and their length; one token is a sequence, too."""
    pair = Siblings(dataclasses.replace(CONFIGS[name], precision=precision))
    forward, backward = compare(Maker(pair, *shape).whole_model(), pair)
    assert_within(forward, TOLERANCES[precision])
    assert_within(backward, TOLERANCES[precision])
    assert len(backward) == len(list(pair.torch.parameters()))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_cross_exactly(name):
    """JAX's own shapes, the state dict's own names, and the same bits after there and back."""
    config = CONFIGS[name]
    torch.manual_seed(1)
    state_dict = TorchDeepseekV3(config).state_dict()
    expected = {place.name: place.shape for place in layout(config) if not place.is_copy}
    assert {name: tuple(tensor.shape) for name, tensor in state_dict.items()} == expected
    variables = from_torch(state_dict, config)
    tokens = np.zeros((1, 1 + config.num_nextn_predict_layers), np.int32)
    shapes = jax.eval_shape(DeepseekV3(config).init, jax.random.key(0), tokens)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == described
    back = to_torch(variables, config)
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[key], state_dict[key]) for key in back)
    again = from_torch(back, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, again))


def test_a_tensor_missing_or_left_over_is_an_error():
    config = CONFIGS[PLAIN]
    state_dict = TorchDeepseekV3(config).state_dict()
    with pytest.raises(KeyError, match=r"model\.extra"):
        from_torch({**state_dict, "model.extra": torch.zeros(1)}, config)
    del state_dict["model.norm.weight"]
    with pytest.raises(KeyError, match=r"model\.norm\.weight"):
        from_torch(state_dict, config)


def test_fresh_weights_are_drawn_alike():
    """Normal with initializer_range everywhere but the norms, which are 1, and the biases, which are 0."""
    config = dataclasses.replace(CONFIGS[DEEP], hidden_size=64)
    torch.manual_seed(0)
    fresh = TorchDeepseekV3(config).state_dict()
    tokens = np.zeros((1, 3), np.int32)
    init = jax.jit(DeepseekV3(config).init, compiler_options=COMPILE_QUICKLY)
    ours = to_torch(init(jax.random.key(0), tokens), config)
    for name in fresh:
        for tensor in (fresh[name], ours[name]):
            if "norm" in name:
                assert (tensor == 1).all(), name
            elif name.endswith("bias"):
                assert (tensor == 0).all(), name
            else:
                spread = 4 / tensor.numel() ** 0.5
                assert abs(tensor.std() / config.initializer_range - 1) < spread, name
                assert abs(tensor.mean() / config.initializer_range) < spread, name


def test_hidden_states_are_the_main_models():
    pair = Siblings(CONFIGS[DEEP])
    tokens = np.random.default_rng(0).integers(0, pair.config.vocab_size, (2, 9), dtype=np.int32)
    with torch.no_grad():
        alone = pair.torch.hidden_states(torch.from_numpy(tokens[:, :7]))
        beside = pair.torch(torch.from_numpy(tokens)).hidden[0]
    assert torch.allclose(alone, beside, rtol=1e-5, atol=1e-6)

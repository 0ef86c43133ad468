"""Muon: which matrices it makes orthogonal, as PyTorch's own Muon does, in both siblings and on a mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.config import ConfigError, TrainConfig, load_config
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.muon import is_orthogonalised
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.qk_clip import clipped_heads
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.step import init_state
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.training.muon import is_orthogonalised as is_orthogonalised_in_torch
from parity_tests.comparison import assert_close
from parity_tests.modules import COMPILE_QUICKLY

TINY = dataclasses.replace(load_config("tiny").model, precision="float64", num_hidden_layers=2)
TRAIN = TrainConfig(optimizer="muon", gradient_clip=1e9, weight_decay=0.3, muon_momentum=0.9)


@pytest.fixture
def wide_oracle(monkeypatch):
    """`torch.optim.Muon` in the parameters' own type."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def test_every_head_and_every_expert_is_moved_as_a_matrix_of_its_own_by_torchs_muon(wide_oracle):
    """Five steps in float64: queries by head, keys and values of each head apart, experts one by one, the rest whole.

    Gradients are large, so that the two's epsilons, added here and a limit there, say nothing.
    """
    c, rng = TINY, np.random.default_rng(0)
    nope, rope, v, heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.num_attention_heads
    names = {
        "q_b_proj": ("mtp_layers", "block", "self_attn", "q_b_proj", "weight"),
        "kv_b_proj": ("mtp_layers", "block", "self_attn", "kv_b_proj", "weight"),
        "o_proj": ("moe_layers", "self_attn", "o_proj", "weight"), "up_proj": ("moe_layers", "mlp", "experts", "up_proj"),
    }  # fmt: skip
    shapes = {"q_b_proj": (2, 24, heads * (nope + rope)), "kv_b_proj": (2, 16, heads * (nope + v)), "o_proj": (2, 9, 16),
              "up_proj": (2, 3, 8, 12)}  # fmt: skip
    start = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def matrices(name: str, of_layers: np.ndarray) -> list[np.ndarray]:
        widths = {"q_b_proj": [nope + rope] * heads, "kv_b_proj": [nope, v] * heads}.get(name, [of_layers.shape[-1]])
        flat = of_layers.reshape(-1, *of_layers.shape[-2:])
        return [part for matrix in flat for part in np.split(matrix, np.cumsum(widths)[:-1], axis=-1)]

    def tree(by_name: dict) -> dict:
        return unflatten_dict({names[name]: leaf for name, leaf in by_name.items()})

    oracle = {name: [torch.nn.Parameter(torch.from_numpy(m.copy()).T) for m in matrices(name, x)] for name, x in start.items()}
    muon = torch.optim.Muon([p for of in oracle.values() for p in of], lr=0.01, weight_decay=0.3, momentum=0.9,
                            adjust_lr_fn="match_rms_adamw")  # fmt: skip
    with jax.enable_x64(True):
        params, optimizer = tree({name: jnp.asarray(x) for name, x in start.items()}), make_optimizer(TRAIN, c)
        state, update = optimizer.init(params), jax.jit(optimizer.update, compiler_options=COMPILE_QUICKLY)
        for _ in range(5):
            gradients = {name: 1e5 * rng.standard_normal(shape) for name, shape in shapes.items()}
            updates, state = update(tree(gradients), state, params)
            params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
            for name, of in oracle.items():
                for parameter, gradient in zip(of, matrices(name, gradients[name]), strict=True):
                    parameter.grad = torch.from_numpy(gradient.copy()).T
            muon.step()
        for name, of in oracle.items():
            ours = matrices(name, np.asarray(flatten_dict(params)[names[name]]))
            assert_close(dict(enumerate(ours)), {i: p.detach().T for i, p in enumerate(of)}, 1e-12)


def test_both_siblings_choose_the_same_parameters():
    """All matrices of attention, feed-forwards, experts and the MTP modules' joining projection."""
    chosen = {place.name for place in layout(TINY) if place.path[0] == "params" and is_orthogonalised(place.path)}
    own = {name for name, _ in DeepseekV3(TINY).named_parameters() if is_orthogonalised_in_torch(name)}
    assert own == chosen
    kinds = {".".join(word for word in name.split(".")[3:-1] if not word.isdecimal()) for name in own}
    attention = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    entering = [f"mlp.{kind}{name}" for kind in ("", "experts.", "shared_experts.") for name in ("gate_proj", "up_proj")]
    assert kinds == attention | {*entering, "eh_proj"} | {name.replace("up_", "down_") for name in entering[1::2]}


@pytest.mark.parametrize("stack, query, rank", [("moe_layers", "q_b_proj", 24), ("mtp_layers", "q_proj", None)])
def test_a_head_whose_largest_score_is_above_the_limit_scores_less_by_that_factor(stack, query, rank):
    """All scores of that head, by its own weights: the rest of a key, which heads share, and values stay."""
    c, rng = dataclasses.replace(TINY, q_lora_rank=rank), np.random.default_rng(0)
    heads, nope, rope, layers = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, 2
    queries, keys, ends = (rng.standard_normal((layers, 7, width)) for width in (24, c.kv_lora_rank, rope))
    weights = {
        query: rng.standard_normal((layers, 24, heads * (nope + rope))),
        "kv_b_proj": rng.standard_normal((layers, c.kv_lora_rank, heads * (nope + c.v_head_dim))),
    }

    def scores_and_values(weights):
        q = np.einsum("lti,lio->lto", queries, weights[query]).reshape(layers, 7, heads, -1)
        kv = np.einsum("lti,lio->lto", keys, weights["kv_b_proj"]).reshape(layers, 7, heads, -1)
        scores = np.einsum("lthd,lshd->lhts", q[..., :nope], kv[..., :nope])
        return scores + np.einsum("lthd,lsd->lhts", q[..., nope:], ends), kv[..., nope:]

    scores, values = scores_and_values(weights)
    largest = scores.max(axis=(2, 3))
    limit = float(np.median(largest))
    attention = {name: {"weight": weight, "bias": 3} for name, weight in weights.items()} | {"o_proj": 4}
    layer = {"block": {"self_attn": attention}, "norm": 5} if stack == "mtp_layers" else {"self_attn": attention}
    with jax.enable_x64(True):
        clipped = clipped_heads(c, limit, {stack: layer, "lm_head": 6}, {stack: jnp.asarray(largest)})
    attention = (clipped[stack].get("block") or clipped[stack])["self_attn"]
    after, values_after = scores_and_values({name: np.asarray(attention[name]["weight"]) for name in weights})
    np.testing.assert_allclose(after, scores * np.minimum(limit / largest, 1)[..., None, None], rtol=1e-12)
    np.testing.assert_array_equal(values_after, values)
    assert clipped["lm_head"] == 6 and attention["o_proj"] == 4 and attention[query]["bias"] == 3


def test_its_state_is_saved_and_another_optimizers_is_not_taken_for_it(tmp_path):
    config = load_config("tiny", ["train.optimizer=muon"])
    shapes, rng = jax.eval_shape(partial(init_state, config)), np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(1, 9, leaf.shape), leaf.dtype), shapes)
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(Position(3, 12, 384), state)
    checkpoints.wait()
    restored = checkpoints.restore(3)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(restored), jax.tree.leaves(state)))
    # Who goes on by AdamW, as `--allow train.optimizer` lets one, begins with fresh moments.
    other = Checkpoints(tmp_path, load_config("tiny")).restore(3)
    assert not any(leaf.any() for leaf in jax.tree.leaves(other.optimizer))
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(other.params), jax.tree.leaves(state.params)))


@pytest.mark.parametrize(("field", "complaint"), [
    ("optimizer=shampoo", "train.optimizer=shampoo: choose one of adamw, muon"),
    ("muon_momentum=1", r"train.muon_momentum=1.0: must be in \[0, 1\)"),
    ("qk_clip=0", "train.qk_clip=0.0: must be greater than 0"),
])  # fmt: skip
def test_what_there_is_not(field, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config("tiny", [f"train.{field}"])
    with pytest.raises(ConfigError, match=r"train.qk_clip=9.0: scales weights of queries and keys, which train.trainable may"):
        load_config("tiny", ["train.qk_clip=9", "train.trainable=[lm_head/*]"])

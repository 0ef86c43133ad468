"""Which experts serve a token, and the statistics that keep their load even (report 2.1.2)."""

import dataclasses
import math
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import param_dtype
from deepseek_jax.model.products import keep
from deepseek_jax.parallel.context import before, devices_of_a_sequence, total
from deepseek_jax.parallel.sharding import Division

ROUTER_STATE = "router_state"
"""Collection of the biases: state that training updates without a gradient."""


class Routing(NamedTuple):
    """A router's choice for each token, and what balancing needs to know of it."""

    indices: jax.Array
    """Chosen experts, [B, T, K] int32, distinct within a token."""
    weights: jax.Array
    """Their factors on the output, [B, T, K], at least float32; zero for a choice that found no room."""
    counts: jax.Array
    """Tokens that chose each expert, [E] int32."""
    balance_loss: jax.Array
    """Sequence-wise balance loss before its weight alpha, averaged over the sequences."""
    dropped: Optional[jax.Array]
    """Share of the choices that found no room; None where there is always room."""


class Router(nn.Module):
    """Scores, selection by them (with a bias and among groups, as `topk_method` says), and room if that is limited."""

    config: ModelConfig
    division: Optional[Division] = None

    @nn.compact
    def __call__(self, x: jax.Array) -> Routing:
        """Route tokens [B, T, hidden_size], in at least float32."""
        c = self.config
        dtype = param_dtype(c)
        init = nn.initializers.normal(c.initializer_range)
        weight = self.param("weight", init, (x.shape[-1], c.n_routed_experts), dtype)
        logits = jnp.matmul(x.astype(dtype), weight, precision=jax.lax.Precision.HIGHEST)
        scores = SCORING_FUNCS[c.scoring_func](logits)
        preferred = scores
        if c.topk_method == "noaux_tc":
            bias = self.variable(ROUTER_STATE, "e_score_correction_bias", jnp.zeros, (c.n_routed_experts,), dtype)
            preferred = scores + bias.value
        indices = keep(select_experts(c, jax.lax.stop_gradient(preferred)))
        weights = jnp.take_along_axis(scores, indices, axis=-1)
        dropped = None
        if c.capacity_factor is not None:
            served = find_room(c, indices, c.capacity_factor, self.division)
            weights, dropped = weights * served, jnp.mean(~served, dtype=dtype)
        if c.norm_topk_prob:
            weights = normalised(weights)
        counts = jnp.sum(jax.nn.one_hot(indices, c.n_routed_experts, dtype=jnp.int32), axis=(1, 2))
        weights *= c.routed_scaling_factor
        return Routing(indices, weights, jnp.sum(counts, axis=0), balance_loss(c, scores, counts, self.division), dropped)


SCORING_FUNCS = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}
"""By `ModelConfig.scoring_func`: a router's logits [..., E] to scores."""


def two_best(grouped: jax.Array) -> jax.Array:
    """A group's score as the sum of its two best experts': [..., G, E / G] -> [..., G]."""
    return jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)


def best(grouped: jax.Array) -> jax.Array:
    """A group's score as its best expert's."""
    return jnp.max(grouped, axis=-1)


GROUP_SCORES = {"noaux_tc": two_best, "group_limited_greedy": best}
"""By `ModelConfig.topk_method`, for those that choose groups first."""


def select_experts(config: ModelConfig, scores: jax.Array) -> jax.Array:
    """Best num_experts_per_tok experts, within the best topk_group groups where these count: [..., E] -> [..., K] int32.

    What lies outside the kept groups counts as minus infinity, since biased scores may be negative.
    """
    c = config
    if c.topk_method in GROUP_SCORES and c.topk_group < c.n_group:
        grouped = scores.reshape(*scores.shape[:-1], c.n_group, -1)
        kept = jax.lax.top_k(GROUP_SCORES[c.topk_method](grouped), c.topk_group)[1]
        mask = jnp.any(kept[..., None] == jnp.arange(c.n_group), axis=-2)
        scores = jnp.where(mask[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, c.num_experts_per_tok)[1]


def find_room(config: ModelConfig, indices: jax.Array, factor: float, division: Optional[Division] = None) -> jax.Array:
    """Which choices [B, T, K] are served where an expert takes at most `factor` times its even share of a sequence.

    First come, first served, in the order of the tokens: what a token gets hangs on no later one.
    """
    c, tokens = config, indices.shape[1] * devices_of_a_sequence(division)
    capacity = math.ceil(factor * tokens * c.num_experts_per_tok / c.n_routed_experts)
    chosen = jnp.sum(jax.nn.one_hot(indices, c.n_routed_experts, dtype=jnp.int32), axis=2)
    return jnp.take_along_axis(before(division, chosen), indices, axis=-1) < capacity


def dropless(config: ModelConfig) -> ModelConfig:
    """The model as it evaluates and generates, with room for every choice: how long a text is must not change its words."""
    return dataclasses.replace(config, capacity_factor=None)


def normalised(weights: jax.Array) -> jax.Array:
    """Weights [..., K] that sum to 1, or all zero where nothing is served."""
    whole = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(whole > 0, whole + 1e-20, 1)


def balance_loss(config: ModelConfig, scores: jax.Array, counts: jax.Array, division: Optional[Division] = None) -> jax.Array:
    """Sum over experts of f_i P_i, averaged over sequences.

    Args:
        scores: [B, T, E] before bias.
        counts: [B, E] tokens of each sequence sent to each expert.
        division: the mesh, whose axis `context` may divide sequences: what is summed is whole, the same on its devices.
    """
    c = config
    share = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    devices = devices_of_a_sequence(division)
    mean_share = total(division, jnp.mean(share, axis=1)) / devices
    counts = total(division, counts).astype(scores.dtype)
    frequency = counts * (c.n_routed_experts / (c.num_experts_per_tok * scores.shape[1] * devices))
    return jnp.mean(jnp.sum(frequency * mean_share, axis=-1))


def updated_bias(bias: jax.Array, counts: jax.Array, speed: jax.Array) -> jax.Array:
    """Raise the bias of experts that got fewer tokens than the mean, lower that of the others.

    Args:
        bias, counts: [..., E]; the counts are those of the whole global batch.
        speed: gamma.
    """
    counts = counts.astype(bias.dtype)
    return bias + speed * jnp.sign(jnp.mean(counts, axis=-1, keepdims=True) - counts)

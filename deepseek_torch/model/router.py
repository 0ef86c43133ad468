"""Which experts serve a token, and the statistics that keep their load even (report 2.1.2)."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Optional

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.layers import normal_parameter, param_dtype


class Routing(NamedTuple):
    """A router's choice for each token, and what balancing needs to know of it."""

    indices: torch.Tensor
    """Chosen experts, [B, T, K], distinct within a token."""
    weights: torch.Tensor
    """Their factors on the output, [B, T, K], at least float32; zero for a choice that found no room."""
    counts: torch.Tensor
    """Tokens that chose each expert, [E]."""
    balance_loss: torch.Tensor
    """Sequence-wise balance loss before its weight alpha, averaged over the sequences."""
    dropped: Optional[torch.Tensor]
    """Share of the choices that found no room; None where there is always room."""


class Router(nn.Module):
    """Scores, selection by them (with a bias and among groups, as `topk_method` says), and room if training limits that."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = normal_parameter(config, config.n_routed_experts, config.hidden_size)
        has_bias = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=param_dtype(config)) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: torch.Tensor) -> Routing:
        """Route tokens [B, T, hidden_size], in at least float32."""
        c = self.config
        scores = SCORING_FUNCS[c.scoring_func](x.to(self.weight.dtype) @ self.weight.T)
        bias = self.e_score_correction_bias
        indices = select_experts(c, (scores if bias is None else scores + bias).detach())
        weights = scores.gather(-1, indices)
        dropped = None
        if c.capacity_factor is not None and self.training:
            served = find_room(c, indices, c.capacity_factor)
            weights, dropped = weights * served, (~served).to(weights.dtype).mean()
        if c.norm_topk_prob:
            weights = normalised(weights)
        counts = torch.stack([torch.bincount(row.flatten(), minlength=c.n_routed_experts) for row in indices])
        weights = weights * c.routed_scaling_factor
        return Routing(indices, weights, counts.sum(dim=0), balance_loss(c, scores, counts), dropped)


SCORING_FUNCS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=-1),
}
"""By `ModelConfig.scoring_func`: a router's logits [..., E] to scores."""


def two_best(grouped: torch.Tensor) -> torch.Tensor:
    """A group's score as the sum of its two best experts': [..., G, E / G] -> [..., G]."""
    return _largest(grouped, 2)[0].sum(dim=-1)


def best(grouped: torch.Tensor) -> torch.Tensor:
    """A group's score as its best expert's."""
    return grouped.amax(dim=-1)


GROUP_SCORES = {"noaux_tc": two_best, "group_limited_greedy": best}
"""By `ModelConfig.topk_method`, for those that choose groups first."""


def select_experts(config: ModelConfig, scores: torch.Tensor) -> torch.Tensor:
    """Best num_experts_per_tok experts, within the best topk_group groups where these count: [..., E] -> [..., K].

    What lies outside the kept groups counts as minus infinity, since biased scores may be negative.
    """
    c = config
    if c.topk_method in GROUP_SCORES and c.topk_group < c.n_group:
        grouped = scores.unflatten(-1, (c.n_group, -1))
        _, kept = _largest(GROUP_SCORES[c.topk_method](grouped), c.topk_group)
        dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=grouped.device).scatter(-1, kept, False)
        scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
    return _largest(scores, c.num_experts_per_tok)[1]


def _largest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of the last axis and their indices; of equal ones the first, which `topk` does not promise."""
    values, indices = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], indices[..., :count]


def find_room(config: ModelConfig, indices: torch.Tensor, factor: float) -> torch.Tensor:
    """Which choices [B, T, K] are served where an expert takes at most `factor` times its even share of a sequence.

    First come, first served, in the order of the tokens: what a token gets hangs on no later one.
    """
    c = config
    capacity = math.ceil(factor * indices.shape[1] * c.num_experts_per_tok / c.n_routed_experts)
    served = torch.zeros_like(indices, dtype=torch.bool)
    for choices, room_for in zip(indices.tolist(), served):
        taken = [0] * c.n_routed_experts
        for token, experts in enumerate(choices):
            for place, expert in enumerate(experts):
                room_for[token, place] = taken[expert] < capacity
                taken[expert] += 1
    return served


def normalised(weights: torch.Tensor) -> torch.Tensor:
    """Weights [..., K] that sum to 1, or all zero where nothing is served."""
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total > 0, total + 1e-20, 1.0)


def balance_loss(config: ModelConfig, scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sum over experts of f_i P_i, averaged over sequences.

    Args:
        scores: [B, T, E] before bias.
        counts: [B, E] tokens of each sequence sent to each expert.
    """
    c = config
    share = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    mean_share = share.mean(dim=1)
    tokens_if_even = scores.shape[1] * c.num_experts_per_tok / c.n_routed_experts
    return (counts.to(scores.dtype) / tokens_if_even * mean_share).sum(dim=-1).mean()


def updated_bias(bias: torch.Tensor, counts: torch.Tensor, speed: float) -> torch.Tensor:
    """Raise the bias of experts that got fewer tokens than the mean, lower that of the others.

    Args:
        bias, counts: [..., E]; the counts are those of the whole global batch.
        speed: gamma.
    """
    counts = counts.to(bias.dtype)
    return bias + speed * torch.sign(counts.mean(dim=-1, keepdim=True) - counts)

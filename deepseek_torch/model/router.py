"""Which experts serve a token, and the statistics that keep their load even (report 2.1.2)."""

from typing import NamedTuple

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.layers import normal_parameter, param_dtype


class Routing(NamedTuple):
    """A router's choice for each token, and what balancing needs to know of it."""

    indices: torch.Tensor
    """Chosen experts, [B, T, K], distinct within a token."""
    weights: torch.Tensor
    """Their factors on the output, [B, T, K], at least float32."""
    counts: torch.Tensor
    """Tokens sent to each expert, [E]."""
    balance_loss: torch.Tensor
    """Sequence-wise balance loss before its weight alpha, averaged over the sequences."""


class Router(nn.Module):
    """Sigmoid scores, a bias that acts on the selection alone, and selection limited to groups."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = normal_parameter(config, config.n_routed_experts, config.hidden_size)
        bias = torch.zeros(config.n_routed_experts, dtype=param_dtype(config))
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: torch.Tensor) -> Routing:
        """Route tokens [B, T, hidden_size], in at least float32."""
        c = self.config
        scores = torch.sigmoid(x.to(self.weight.dtype) @ self.weight.T)
        indices = select_experts(c, (scores + self.e_score_correction_bias).detach())
        weights = scores.gather(-1, indices)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        counts = torch.stack([torch.bincount(row.flatten(), minlength=c.n_routed_experts) for row in indices])
        return Routing(indices, weights * c.routed_scaling_factor, counts.sum(dim=0), balance_loss(c, scores, counts))


def select_experts(config: ModelConfig, biased_scores: torch.Tensor) -> torch.Tensor:
    """Best num_experts_per_tok experts within the best topk_group groups: [..., E] -> [..., K].

    A group's score is the sum of its two best; what lies outside the kept groups counts as minus
    infinity, since biased scores may be negative.
    """
    c = config
    if c.topk_group < c.n_group:
        grouped = biased_scores.unflatten(-1, (c.n_group, -1))
        best, _ = _largest(grouped, 2)
        _, kept = _largest(best.sum(dim=-1), c.topk_group)
        dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=grouped.device).scatter(-1, kept, False)
        biased_scores = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
    return _largest(biased_scores, c.num_experts_per_tok)[1]


def _largest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of the last axis and their indices; of equal ones the first, which `topk` does not promise."""
    values, indices = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], indices[..., :count]


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

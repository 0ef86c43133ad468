"""The routed experts: every token goes through exactly the experts chosen for it, none is dropped."""

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.layers import FeedForward, widen


class Experts(nn.ModuleList):
    """One feed-forward for each expert."""

    def __init__(self, config: ModelConfig):
        super().__init__(FeedForward(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts))

    def forward(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            x: [N, hidden_size] tokens.
            indices: [N, K] chosen experts.
            weights: [N, K] factors.

        Returns:
            [N, hidden_size].
        """
        total = torch.zeros_like(x, dtype=widen(x.dtype))
        for number, expert in enumerate(self):
            tokens, choices = torch.where(indices == number)
            served = expert(x[tokens], weights[tokens, choices][:, None])
            total = total.index_add(0, tokens, served.to(total.dtype))
        return total.to(x.dtype)

"""The routed experts: every token goes through exactly the experts chosen for it, none is dropped."""

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.layers import SwiGLU, widen


class Experts(nn.ModuleList):
    """One SwiGLU for each expert."""

    def __init__(self, config: ModelConfig):
        super().__init__(SwiGLU(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts))

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
            factors = weights[tokens, choices].to(x.dtype)
            # Before the down projection, which is linear, so that float8 rounds there what the JAX sibling's rounds.
            activated = expert.activated(x[tokens]) * factors[:, None]
            total = total.index_add(0, tokens, expert.down_proj(activated).to(total.dtype))
        return total.to(x.dtype)

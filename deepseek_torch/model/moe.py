"""DeepSeekMoE: shared experts that see every token beside routed ones that see their share (report 2.1.2)."""

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.experts import Experts
from deepseek_torch.model.layers import SwiGLU
from deepseek_torch.model.router import Router, Routing


class MoE(nn.Module):
    """Mixture-of-experts feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """[B, T, hidden_size] -> the same, and the routing behind it."""
        routing = self.gate(x)
        routed = self.experts(x.flatten(0, 1), routing.indices.flatten(0, 1), routing.weights.flatten(0, 1))
        return self.shared_experts(x) + routed.view_as(x), routing

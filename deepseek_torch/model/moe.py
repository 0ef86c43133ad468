"""DeepSeekMoE: shared experts that see every token beside routed ones that see their share (report 2.1.2)."""

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.experts import Experts
from deepseek_torch.model.layers import FeedForward, normal_parameter
from deepseek_torch.model.router import Router, Routing


class MoE(nn.Module):
    """Mixture-of-experts feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.gate = Router(c)
        self.experts = Experts(c)
        if c.n_shared_experts:
            self.shared_experts = FeedForward(c, c.n_shared_experts * c.moe_intermediate_size)
        if c.shared_expert_gate:
            self.shared_expert_gate = SharedExpertGate(c)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """[B, T, hidden_size] -> the same, and the routing behind it."""
        routing = self.gate(x)
        routed = self.experts(x.flatten(0, 1), routing.indices.flatten(0, 1), routing.weights.flatten(0, 1))
        routed = routed.view_as(x)
        return self._shared(x) + routed if self.config.n_shared_experts else routed, routing

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        """The shared experts' outputs, summed or weighed; side by side they are one feed-forward."""
        if not self.config.shared_expert_gate:
            return self.shared_experts(x)
        shares = self.shared_expert_gate(x)
        return self.shared_experts(x, shares.repeat_interleave(self.config.moe_intermediate_size, dim=-1))


class SharedExpertGate(nn.Module):
    """How much of each shared expert a token takes: a softmax over them, in at least float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = normal_parameter(config, config.n_shared_experts, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> [..., n_shared_experts]."""
        return torch.softmax(x.to(self.weight.dtype) @ self.weight.T, dim=-1)

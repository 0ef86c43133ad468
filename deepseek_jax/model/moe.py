"""DeepSeekMoE: shared experts that see every token beside routed ones that see their share (report 2.1.2)."""

from typing import Optional

import flax.linen as nn
import jax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.experts import Experts
from deepseek_jax.model.layers import SwiGLU
from deepseek_jax.model.router import Router, Routing
from deepseek_jax.parallel.sharding import Division


class MoE(nn.Module):
    """Mixture-of-experts feed-forward."""

    config: ModelConfig
    division: Optional[Division] = None

    def setup(self):
        c = self.config
        self.gate = Router(c)
        self.experts = Experts(c, self.division)
        self.shared_experts = SwiGLU(c, c.n_shared_experts * c.moe_intermediate_size)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """[B, T, hidden_size] -> the same, and the routing behind it."""
        routing = self.gate(x)
        choices = self.config.num_experts_per_tok
        routed = self.experts(
            x.reshape(-1, x.shape[-1]), routing.indices.reshape(-1, choices), routing.weights.reshape(-1, choices)
        )
        return self.shared_experts(x) + routed.reshape(x.shape), routing

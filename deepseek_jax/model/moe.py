"""DeepSeekMoE: shared experts that see every token beside routed ones that see their share (report 2.1.2)."""

from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.experts import Experts
from deepseek_jax.model.layers import FeedForward, param_dtype
from deepseek_jax.model.router import Router, Routing
from deepseek_jax.parallel.sharding import Division


class MoE(nn.Module):
    """Mixture-of-experts feed-forward."""

    config: ModelConfig
    division: Optional[Division] = None

    def setup(self):
        c = self.config
        self.gate = Router(c, self.division)
        self.experts = Experts(c, self.division)
        if c.n_shared_experts:
            self.shared_experts = FeedForward(c, c.n_shared_experts * c.moe_intermediate_size)
        if c.shared_expert_gate:
            self.shared_expert_gate = SharedExpertGate(c)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Routing]:
        """[B, T, hidden_size] -> the same, and the routing behind it."""
        routing = self.gate(x)
        choices = self.config.num_experts_per_tok
        routed = self.experts(
            x.reshape(-1, x.shape[-1]), routing.indices.reshape(-1, choices), routing.weights.reshape(-1, choices)
        )
        routed = routed.reshape(x.shape)
        return self._shared(x) + routed if self.config.n_shared_experts else routed, routing

    def _shared(self, x: jax.Array) -> jax.Array:
        """The shared experts' outputs, summed or weighed; side by side they are one feed-forward."""
        if not self.config.shared_expert_gate:
            return self.shared_experts(x)
        return self.shared_experts(x, jnp.repeat(self.shared_expert_gate(x), self.config.moe_intermediate_size, axis=-1))


class SharedExpertGate(nn.Module):
    """How much of each shared expert a token takes: a softmax over them, in at least float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., hidden_size] -> [..., n_shared_experts]."""
        c, dtype = self.config, param_dtype(self.config)
        init = nn.initializers.normal(c.initializer_range)
        weight = self.param("weight", init, (x.shape[-1], c.n_shared_experts), dtype)
        return jax.nn.softmax(jnp.matmul(x.astype(dtype), weight, precision=jax.lax.Precision.HIGHEST))

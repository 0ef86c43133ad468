"""The routed experts: every token goes through exactly the experts chosen for it, none is dropped."""

from collections.abc import Sequence
from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.dispatch import combine, dispatch, sort_slots
from deepseek_jax.model.expert_rounds import serve_in_rounds
from deepseek_jax.model.layers import param_dtype
from deepseek_jax.model.panels import PANELS, Panels
from deepseek_jax.model.products import grouped_swiglu, keep, products
from deepseek_jax.parallel.mesh import ALONE
from deepseek_jax.parallel.sharding import Division


class Experts(nn.Module):
    """SwiGLU experts whose weights are stacked, [E, in, out]; on a mesh each device has its share of them."""

    config: ModelConfig
    division: Optional[Division] = None

    @nn.compact
    def __call__(self, x: jax.Array, indices: jax.Array, weights: jax.Array) -> jax.Array:
        """Weighted sum of the chosen experts' outputs.

        Args:
            x: [N, hidden_size] tokens.
            indices: [N, K] chosen experts.
            weights: [N, K] factors.

        Returns:
            [N, hidden_size].
        """
        c = self.config
        parallel = self.division.parallel if self.division else ALONE
        experts, hidden, width = c.n_routed_experts // parallel.expert, c.hidden_size, c.moe_intermediate_size
        tokens = (x, indices, weights)
        if self.has_variable(PANELS, "gate_proj"):
            cut = [self.get_variable(PANELS, name) for name in ("gate_proj", "up_proj", "down_proj")]
            return serve_from_all(c, tokens, cut)
        init = nn.initializers.normal(c.initializer_range)
        gate_proj = self.param("gate_proj", init, (experts, hidden, width), param_dtype(c))
        up_proj = self.param("up_proj", init, (experts, hidden, width), param_dtype(c))
        down_proj = self.param("down_proj", init, (experts, width, hidden), param_dtype(c))
        projections = (gate_proj, up_proj, down_proj)
        return keep(
            serve_in_rounds(c, parallel, tokens, projections) if parallel.expert > 1 else serve(c, tokens, projections)
        )


def serve(config: ModelConfig, tokens: Sequence[jax.Array], projections: Sequence[jax.Array]) -> jax.Array:
    """What `Experts` returns for tokens (x, indices, weights), with all experts (gate, up, down) at hand."""
    x, indices, weights = tokens
    order = jax.tree.map(keep, sort_slots(indices.reshape(-1), config.n_routed_experts, indices.size))
    group_sizes = jnp.bincount(indices.reshape(-1), length=config.n_routed_experts).astype(jnp.int32)
    rows, factors = dispatch(x, order), dispatch(weights.reshape(-1, 1), order)
    return combine(grouped_swiglu(config, rows, factors, group_sizes, projections), order, x.shape[0])


def serve_from_all(config: ModelConfig, tokens: Sequence[jax.Array], projections: Sequence[Panels]) -> jax.Array:
    """What `serve` returns, by one wide feed-forward of all experts side by side.

    Few tokens take as long to read an expert's weights as many, and choose most of the experts between them; so every
    token is multiplied by all weights, and what it did not choose counts nothing.
    """
    (x, indices, weights), (gate_proj, up_proj, down_proj) = tokens, projections
    chosen = indices[:, :, None] == jnp.arange(config.n_routed_experts)
    factors = jnp.sum(jnp.where(chosen, weights[:, :, None], 0), axis=1).astype(x.dtype)
    factors = jnp.repeat(factors, config.moe_intermediate_size, axis=1)
    gate, up = products(config, x, gate_proj, up_proj)
    return products(config, jnp.where(factors != 0, nn.silu(gate) * up * factors, 0), down_proj)[0]

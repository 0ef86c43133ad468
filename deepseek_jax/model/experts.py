"""The routed experts: every token goes through exactly the experts chosen for it, none is dropped."""

from collections.abc import Sequence
from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.checkpoint.adapters import halves_of
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.dispatch import combine, dispatch, sort_slots
from deepseek_jax.model.expert_rounds import serve_in_rounds
from deepseek_jax.model.layers import FEED_FORWARD_FORMS, enter_experts, leave_experts, param_dtype
from deepseek_jax.model.panels import PANELS, Panels
from deepseek_jax.model.products import keep, products
from deepseek_jax.parallel.mesh import ALONE
from deepseek_jax.parallel.sharding import Division


class Experts(nn.Module):
    """Experts whose weights are stacked, [E, in, out]; on a mesh each device has its share of them.

    Where the parameters have `gate_proj_lora_A` and `gate_proj_lora_B` beside one, [E, in, rank] and [E, rank, out], their
    product is added to it: rows of an expert are many, and one product with a whole weight is one way for all forms.
    """

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
        shapes = dict.fromkeys(FEED_FORWARD_FORMS[c.feed_forward].projections, (experts, hidden, width))
        shapes["down_proj"] = (experts, width, hidden)
        if self.has_variable(PANELS, "down_proj"):
            return serve_from_all(c, tokens, [self.get_variable(PANELS, name) for name in shapes])
        init = nn.initializers.normal(c.initializer_range)
        projections = [
            self._with_adapter(name, self.param(name, init, shape, param_dtype(c))) for name, shape in shapes.items()
        ]
        return keep(
            serve_in_rounds(c, parallel, tokens, projections) if parallel.expert > 1 else serve(c, tokens, projections)
        )

    def _with_adapter(self, name: str, weight: jax.Array) -> jax.Array:
        a, b = (self.get_variable("params", half) for half in halves_of(name))
        return weight if a is None else weight + jnp.matmul(a, b)


def serve(config: ModelConfig, tokens: Sequence[jax.Array], projections: Sequence[jax.Array]) -> jax.Array:
    """What `Experts` returns for tokens (x, indices, weights), with all experts at hand, the down projection last."""
    (x, indices, weights), (*entering, down_proj) = tokens, projections
    order = jax.tree.map(keep, sort_slots(indices.reshape(-1), config.n_routed_experts, indices.size))
    group_sizes = jnp.bincount(indices.reshape(-1), length=config.n_routed_experts).astype(jnp.int32)
    rows, factors = dispatch(x, order), dispatch(weights.reshape(-1, 1), order)
    entered = enter_experts(config, rows, group_sizes, entering)
    return combine(leave_experts(config, entered, factors, group_sizes, down_proj), order, x.shape[0])


def serve_from_all(config: ModelConfig, tokens: Sequence[jax.Array], projections: Sequence[Panels]) -> jax.Array:
    """What `serve` returns, by one wide feed-forward of all experts side by side.

    Few tokens take as long to read an expert's weights as many, and choose most of the experts between them; so every
    token is multiplied by all weights, and what it did not choose counts nothing.
    """
    (x, indices, weights), (*entering, down_proj) = tokens, projections
    chosen = indices[:, :, None] == jnp.arange(config.n_routed_experts)
    factors = jnp.sum(jnp.where(chosen, weights[:, :, None], 0), axis=1).astype(x.dtype)
    factors = jnp.repeat(factors, config.moe_intermediate_size, axis=1)
    activated = FEED_FORWARD_FORMS[config.feed_forward].activation(*products(config, x, *entering))
    return products(config, jnp.where(factors != 0, activated * factors, 0), down_proj)[0]

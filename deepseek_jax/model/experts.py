"""The routed experts: every token goes through exactly the experts chosen for it, none is dropped."""

from collections.abc import Sequence
from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig, ParallelConfig
from deepseek_jax.model.layers import FEED_FORWARD_FORMS, param_dtype
from deepseek_jax.model.panels import PANELS, Panels
from deepseek_jax.model.products import grouped_products, keep, products
from deepseek_jax.parallel.exchange import plan_journey, send, send_back
from deepseek_jax.parallel.mesh import ALONE
from deepseek_jax.parallel.sharding import Division


class Experts(nn.Module):
    """Experts whose weights are stacked, [E, in, out]; on a mesh each device has its share of them."""

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
        shapes = dict.fromkeys(FEED_FORWARD_FORMS[c.feed_forward].projections, (experts, hidden, width))
        shapes["down_proj"] = (experts, width, hidden)
        if self.has_variable(PANELS, "down_proj"):
            return serve_from_all(c, (x, indices, weights), [self.get_variable(PANELS, name) for name in shapes])
        init = nn.initializers.normal(c.initializer_range)
        projections = [self.param(name, init, shape, param_dtype(c)) for name, shape in shapes.items()]
        tokens = (x, indices, weights)
        if parallel.expert == 1 or parallel.exchange_parts == 1:
            return serve(c, parallel, tokens, projections)
        # In the parameters' type, in which the parts' gradients are summed.
        projections = [projection.astype(param_dtype(c)) for projection in projections]
        parts = [each.reshape(parallel.exchange_parts, -1, each.shape[-1]) for each in tokens]
        served = jax.lax.map(jax.checkpoint(lambda part: serve(c, parallel, part, projections)), parts)
        return served.reshape(x.shape)


def serve(
    config: ModelConfig, parallel: ParallelConfig, tokens: Sequence[jax.Array], projections: Sequence[jax.Array]
) -> jax.Array:
    """What `Experts` returns for tokens (x, indices, weights), with this device's experts, the down projection last."""
    (x, indices, weights), (*entering, down_proj) = tokens, projections
    order = keep(jnp.argsort(indices.reshape(-1), stable=True))
    places = jnp.arange(order.size, dtype=order.dtype)
    inverse = keep(jnp.zeros_like(order).at[order].set(places, unique_indices=True))
    group_sizes = jnp.bincount(indices.reshape(-1), length=config.n_routed_experts).astype(jnp.int32)

    rows, factors = dispatch(x, order, inverse), dispatch(weights.reshape(-1, 1), order, inverse)
    if parallel.expert > 1:
        journey = plan_journey(group_sizes, rows.shape[0])
        rows, factors = (send(each, journey, parallel.exchange) for each in (rows, factors))
        group_sizes = journey.group_sizes
    entered = grouped_products(config, rows, group_sizes, *entering)
    # The factor is applied before the down projection, which is linear: its rows are the narrower ones.
    activated = FEED_FORWARD_FORMS[config.feed_forward].activation(*entered) * factors.astype(x.dtype)
    (outputs,) = grouped_products(config, activated, group_sizes, down_proj)
    if parallel.expert > 1:
        outputs = send_back(outputs, journey, parallel.exchange)
    return combine(outputs, order, inverse, x.shape[0])


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


@jax.custom_vjp
def dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of x, each repeated for its R / N choices, in expert order.

    Args:
        x: [N, d].
        order: [R] for each sorted row, the choice it holds; choice r belongs to row r // (R / N) of x.
        inverse: [R] for each choice, its sorted row.

    Returns:
        [R, d]. The gradient is a gather and a sum, where that of a plain take would be a scatter.
    """
    return x[order // (order.shape[0] // x.shape[0])]


def combine(rows: jax.Array, order: jax.Array, inverse: jax.Array, tokens: int) -> jax.Array:
    """Transpose of `dispatch`: sum over each token's choices of rows in expert order, [R, d] -> [N, d]."""
    return _unsort(rows, order, inverse).reshape(tokens, -1, rows.shape[-1]).sum(axis=1)


@jax.custom_vjp
def _unsort(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    return rows[inverse]


_unsort.defvjp(
    lambda rows, order, inverse: (rows[inverse], order),
    lambda order, gradient: (gradient[order], None, None),
)
dispatch.defvjp(
    lambda x, order, inverse: (dispatch(x, order, inverse), (order, inverse, x.shape[0])),
    lambda kept, gradient: (combine(gradient, kept[0], kept[1], kept[2]), None, None),
)

"""The routed experts: every token goes through exactly the experts chosen for it, none is dropped."""

from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import param_dtype
from deepseek_jax.model.products import grouped_products, keep
from deepseek_jax.parallel.exchange import plan_journey, send, send_back
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
        travel = parallel.expert > 1
        experts, hidden, width = c.n_routed_experts // parallel.expert, c.hidden_size, c.moe_intermediate_size
        init = nn.initializers.normal(c.initializer_range)
        gate_proj = self.param("gate_proj", init, (experts, hidden, width), param_dtype(c))
        up_proj = self.param("up_proj", init, (experts, hidden, width), param_dtype(c))
        down_proj = self.param("down_proj", init, (experts, width, hidden), param_dtype(c))

        order = keep(jnp.argsort(indices.reshape(-1), stable=True))
        places = jnp.arange(order.size, dtype=order.dtype)
        inverse = keep(jnp.zeros_like(order).at[order].set(places, unique_indices=True))
        group_sizes = jnp.bincount(indices.reshape(-1), length=c.n_routed_experts).astype(jnp.int32)

        rows = dispatch(x, order, inverse)
        factors = dispatch(weights.reshape(-1, 1), order, inverse)
        if travel:
            journey = plan_journey(group_sizes, rows.shape[0])
            rows, factors = (send(each, journey, parallel.exchange) for each in (rows, factors))
            group_sizes = journey.group_sizes
        gate, up = grouped_products(c, rows, group_sizes, gate_proj, up_proj)
        # The factor is applied before the down projection, which is linear: its rows are the narrower ones.
        activated = nn.silu(gate) * up * factors.astype(x.dtype)
        (outputs,) = grouped_products(c, activated, group_sizes, down_proj)
        if travel:
            outputs = send_back(outputs, journey, parallel.exchange)
        return combine(outputs, order, inverse, x.shape[0])


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

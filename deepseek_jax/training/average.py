"""An exponential average of the weights over the steps, beside training (report 3.2.3): often what a lower rate would reach.

On the host, as the report has it, it takes no device memory: each device's part of it lies in its host's memory, and is
moved on there while the devices go on. Routers' biases are not averaged; what is saved has them as they are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import compute_on

from deepseek_jax.config import TrainConfig

compute_at: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)  # its name before jax 0.12
HOST_MEMORY, HOST = "pinned_host", "device_host"
"""JAX's names for memory that devices reach, and for the processor beside it."""


class Average:
    """Of a run's parameters.

    Attributes:
        params: as they are averaged now.
    """

    def __init__(self, train: TrainConfig, params: Any, so_far: Any = None):
        """It begins at `params`, or goes on from `so_far`, which lies where `places` says."""
        where = places(train, params)
        self.params = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=where)(params) if so_far is None else so_far

        def moved(average: Any, params: Any, kept: jax.Array, taken: jax.Array) -> Any:
            return jax.tree.map(lambda old, new: kept.astype(old.dtype) * old + taken.astype(old.dtype) * new, average, params)

        def update(average: Any, params: Any, skipped: jax.Array) -> Any:
            kept = jnp.where(skipped, 1, train.ema_decay)
            shares = kept, 1 - kept
            if not train.ema_on_host:
                return moved(average, params, *shares)
            average, params = jax.device_put((average, params), (where, where))
            shares = jax.device_put(shares, jax.memory.Space.Host)
            return compute_at(moved, compute_type=HOST, out_memory_spaces=jax.memory.Space.Host)(average, params, *shares)

        self._update = jax.jit(update, donate_argnums=0, out_shardings=where)

    def update(self, params: Any, skipped: jax.Array) -> None:
        """Take in the parameters after a step, if it changed any; returns before it is done."""
        self.params = self._update(self.params, params, skipped)


def places(train: TrainConfig, params: Any) -> Any:
    """Shardings of the average: the parameters' own, in their hosts' memory if so asked."""
    if not train.ema_on_host:
        return jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(HOST_MEMORY), params)

"""Adam's moments, and the direction in which they say to move, with a step that may be skipped."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import TrainConfig


def scale_by_adam(train: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """As `optax.scale_by_adam`, with both moments in train.adam_moment_dtype between steps (report 3.3.3).

    Within a step they are in the gradients' type. Its update takes `skipped`, whether the state is to stay as it was, and
    chooses before it goes on: the direction comes from what is kept, so that XLA writes the moments where they lie. If the
    state were chosen when all is done, XLA for CPUs would have both moments a second time.
    """
    narrow = None if train.adam_moment_dtype == "float32" else train.adam_moment_dtype

    def init(params: Any) -> optax.ScaleByAdamState:
        moments = partial(optax.tree.zeros_like, params, dtype=narrow)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), moments(), moments())

    def update(
        gradients: Any, state: optax.ScaleByAdamState, params: Any = None, *, skipped: jax.Array | bool = False, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        before = tuple(optax.tree.cast_like(moment, gradients) for moment in (state.mu, state.nu))
        count = optax.safe_increment(state.count)
        mu, nu = kept_if(
            skipped,
            before,
            (
                optax.tree.update_moment(gradients, before[0], train.beta1, 1),
                optax.tree.update_moment(gradients, before[1], train.beta2, 2),
            ),
        )
        first, second = (
            optax.tree.bias_correction(moment, decay, count) for moment, decay in ((mu, train.beta1), (nu, train.beta2))
        )
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + train.adam_eps), first, second)
        mu, nu = (optax.tree.cast_like(moment, old) for moment, old in ((mu, state.mu), (nu, state.nu)))
        return direction, optax.ScaleByAdamState(kept_if(skipped, state.count, count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def kept_if(skipped: jax.Array | bool, before: Any, after: Any) -> Any:
    """`before` of a skipped step, otherwise `after`; trees of the same shapes."""
    return jax.tree.map(partial(jnp.where, skipped), before, after)

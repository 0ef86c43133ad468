"""Weights in the type in which products take them."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def narrow(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`weight.astype(dtype)`, made where it is used.

    XLA for TPUs lets what is only ever read as bfloat16 be bfloat16 from the start: a loop over layers would begin with a
    pass over all their weights, whose copies live as long as the loop. What is no mere reading, if only in form, stays
    within the loop: no number differs, for twice an infinity is the same.
    """
    if weight.dtype == dtype:
        return weight
    return jax.lax.platform_dependent(weight, tpu=_read_wide, default=lambda weight: weight).astype(dtype)


def _read_wide(weight: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(weight), weight, 2 * weight)


narrow.defvjp(
    lambda weight, dtype: (narrow(weight, dtype), jnp.zeros((0,), weight.dtype)),
    lambda dtype, like, gradient: (gradient.astype(like.dtype),),
)

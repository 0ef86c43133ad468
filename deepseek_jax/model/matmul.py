"""Products with weights whose gradients XLA computes fast on CPU as well.

A weight's gradient contracts the rows of both its operands. XLA leaves that to the slower of its two CPU
libraries, at about half the rate of a plain product; with one operand transposed by a copy of its own it is plain.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier as barrier

Arrays = list[jax.Array]


@jax.custom_vjp
def matmul(x: jax.Array, weights: Arrays) -> Arrays:
    """x [..., K] times each of the weights [K, M] in x's type: a list of [..., M]."""
    return [x @ weight for weight in weights]


def _backward(kept: tuple[jax.Array, Arrays], gradients: Arrays) -> tuple[Any, ...]:
    x, weights = kept
    dx = sum(gradient @ weight.T for gradient, weight in zip(gradients, weights))
    x_columns = columns(barrier(x.reshape(-1, x.shape[-1])))
    return dx, [x_columns @ gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]


matmul.defvjp(lambda x, weights: (matmul(x, weights), (x, weights)), _backward)


def columns(x: jax.Array) -> jax.Array:
    """x with its last two axes swapped, on CPU as an array of its own rather than a way to read x."""

    def swap(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, -1, -2)

    return jax.lax.platform_dependent(x, cpu=lambda x: barrier(swap(x)), default=swap)

"""A loop over layers of one kind, whose parameters are stacked, so that compile time does not grow with depth."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def run_layers(
    layer: Callable[..., tuple[jax.Array, Any]], params: Any, types: Any, x: jax.Array, *each: Any
) -> tuple[jax.Array, Any]:
    """Run x through layers, one after another.

    The gradients of the parameters are written where they belong, layer by layer, into memory that holds nothing yet.
    Were they what a loop returns, JAX would fill that memory with zeros first, a pass over all parameters.

    Args:
        layer: (params of a layer, x, *each of a layer) -> (x, output).
        params: tree of arrays with a leading axis of layers.
        types: of their gradients, the same tree: no wider than a layer makes them.
        each: further trees with that axis.

    Returns:
        The last x, and the outputs stacked.
    """
    known, count = jax.lax.stop_gradient(params), len(jax.tree.leaves(params)[0])

    def one(state: tuple[jax.Array, Any], own: tuple[jax.Array, Any, tuple]) -> tuple[tuple[jax.Array, Any], Any]:
        (x, gradients), (index, params, each) = state, own
        params, gradients = _with_gradients_in(gradients, params, index)
        x, output = layer(params, x, *each)
        return (x, gradients), output

    # What is carried stands for the gradients, backwards; nothing reads it.
    stack = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, types)
    (x, gradients), outputs = jax.lax.scan(one, (x, stack), (jnp.arange(count), known, each))
    return _begin(x, gradients), outputs


@jax.custom_vjp
def _with_gradients_in(stack: Any, params: Any, index: jax.Array) -> tuple[Any, Any]:
    """The parameters of layer `index`, whose gradients become those of the stack; and the stack as it is."""
    return params, stack


def _write(index: jax.Array, gradients: tuple[Any, Any]) -> tuple[Any, None, None]:
    own, stack = gradients

    def written(stack: jax.Array, own: jax.Array) -> jax.Array:
        start = (index, *[jnp.zeros_like(index)] * own.ndim)
        return jax.lax.dynamic_update_slice(stack, own.astype(stack.dtype)[None], start)

    return jax.tree.map(written, stack, own), None, None


_with_gradients_in.defvjp(lambda stack, params, index: ((params, stack), index), _write)


@jax.custom_vjp
def _begin(x: jax.Array, stack: Any) -> jax.Array:
    """x; where the backward pass comes by, the gradients of the stack are memory without content."""
    return x


def _begin_forward(x: jax.Array, stack: Any) -> tuple[jax.Array, Any]:
    return x, jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), stack)


def _begin_backward(like: Any, gradient: jax.Array) -> tuple[jax.Array, Any]:
    return gradient, jax.tree.map(lambda leaf: jax.lax.empty(leaf.shape[1:], leaf.dtype), like)


_begin.defvjp(_begin_forward, _begin_backward)

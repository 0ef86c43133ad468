"""A loop over layers of one kind, whose parameters are stacked, so that compile time does not grow with depth."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import slabs


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
        params, gradients = _with_gradients_in(_write, gradients, params, (index,))
        x, output = layer(params, x, *each)
        return (x, gradients), output

    # What is carried stands for the gradients, backwards; nothing reads it.
    stack = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, types)
    (x, gradients), outputs = jax.lax.scan(one, (x, stack), (jnp.arange(count), known, each))
    return _ending(jax.lax.empty, x, gradients), outputs


def run_chunk(
    layer: Callable[..., tuple[jax.Array, Any]],
    again: Callable[[Callable], Callable],
    params: Any,
    sums: Any,
    chunk: jax.Array,
    x: jax.Array,
    *each: Any,
) -> tuple[jax.Array, Any, Any]:
    """Run x through one of several chunks of layers, each of which others go through, too.

    Nothing is kept for the backward pass but what `again` keeps of a layer: its parameters are picked, and added up to
    their gradients, where they lie.

    Args:
        layer: as of `run_layers`.
        again: how the layer is made again in the backward pass, such as `jax.checkpoint`.
        params: tree of arrays with leading axes of chunks and their layers.
        sums: what the last chunk returned, or at first `begin_sums`.
        chunk: number of it.
        each: trees with an axis of the chunk's layers.

    Returns:
        The last x, `sums`, and the outputs stacked. After all chunks `x = end_sums(x, sums)`.
    """
    known, count = jax.lax.stop_gradient(params), jax.tree.leaves(params)[0].shape[1]

    @again
    def picked(known: Any, sums: Any, place: tuple, x: jax.Array, *each: Any) -> tuple[tuple[jax.Array, Any], Any]:
        own, sums = _with_gradients_in(partial(_write, adds=True), sums, jax.tree.map(partial(_pick, place), known), place)
        x, output = layer(own, x, *each)
        return (x, sums), output

    def one(state: tuple[jax.Array, Any], own: tuple[jax.Array, tuple]) -> tuple[tuple[jax.Array, Any], Any]:
        (x, sums), (index, each) = state, own
        return picked(known, sums, (chunk, index), x, *each)

    (x, sums), outputs = jax.lax.scan(one, (x, sums), (jnp.arange(count, dtype=chunk.dtype), each))
    return x, sums, outputs


def begin_sums(params: Any, dtype: jnp.dtype) -> Any:
    """What stands for the sums of the parameters' gradients, backwards, in the type in which they are summed."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _pick(place: tuple, leaf: jax.Array) -> jax.Array:
    depth = len(place)
    start = (*place, *[jnp.zeros_like(place[0])] * (leaf.ndim - depth))
    return jax.lax.dynamic_slice(leaf, start, (*[1] * depth, *leaf.shape[depth:])).reshape(leaf.shape[depth:])


def end_sums(x: jax.Array, sums: Any) -> jax.Array:
    """x; where the backward pass comes by, `sums` are zero."""
    return _ending(jnp.zeros, x, sums)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradients_in(put: Callable[..., jax.Array], stack: Any, params: Any, place: tuple) -> tuple[Any, Any]:
    """The parameters of the layer at a place, whose gradients are put into the stack's there; and the stack as it is."""
    return params, stack


def _put_all(put: Callable[..., jax.Array], place: tuple, gradients: tuple[Any, Any]) -> tuple[Any, None, None]:
    own, stack = gradients
    return jax.tree.map(partial(put, place), stack, own), None, None


_with_gradients_in.defvjp(lambda put, stack, params, place: ((params, stack), place), _put_all)


def _write(place: tuple, stack: jax.Array, own: jax.Array, adds: bool = False) -> jax.Array:
    """A layer's own gradient in the stack, or added to what is there.

    Of experts by slabs: `own` is a device's part, whose size does not tell whether the whole was made so.
    """
    axis = slabs.side(own.shape) if own.ndim == 3 else 0
    for number, piece in enumerate(slabs.cut(own, axis) if own.ndim == 3 else [own]):
        start = [*place, *[jnp.zeros_like(place[0])] * own.ndim]
        start[len(place) + axis] += number * slabs.WIDTH
        piece = piece.astype(stack.dtype).reshape(*[1] * len(place), *piece.shape)
        if adds:
            piece += jax.lax.dynamic_slice(stack, start, piece.shape)
        stack = jax.lax.dynamic_update_slice(stack, piece, start)
    return stack


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ending(begin: Callable[..., jax.Array], x: jax.Array, stack: Any) -> jax.Array:
    """x; where the backward pass comes by, the gradients of the stack are what `begin(shape, dtype)` makes."""
    return x


def _ending_forward(begin: Callable[..., jax.Array], x: jax.Array, stack: Any) -> tuple[jax.Array, Any]:
    return x, jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), stack)


def _ending_backward(begin: Callable[..., jax.Array], like: Any, gradient: jax.Array) -> tuple[jax.Array, Any]:
    return gradient, jax.tree.map(lambda leaf: begin(leaf.shape[1:], leaf.dtype), like)


_ending.defvjp(_ending_forward, _ending_backward)

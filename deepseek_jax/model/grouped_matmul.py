"""Matrix products over rows sorted by group, each group with its own weight: one signature, several forms.

XLA's `ragged_dot` multiplies every row by every weight on CPU and on CUDA. The blocked form does
only the work that is there, with loops whose length depends on the groups; megablox does so on TPU, Triton kernels on GPU.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import GROUPED_MATMULS
from deepseek_jax.errors import UserError
from deepseek_jax.implementations import WITHOUT_FLOAT64, best
from deepseek_jax.model.matmul import Arrays, columns
from deepseek_jax.parallel import slabs

LEAST_ROWS = {512: 385, 128: 65, 32: 9, 4: 1}
"""Rows multiplied at once by the blocked form, and for how many that is worth it: a block that is partly another
group's costs less than the several smaller ones that would fit exactly."""


def grouped_matmul(
    x: jax.Array, weights: Arrays, group_sizes: jax.Array, implementation: str = "auto", all_read: bool = True
) -> Arrays:
    """Multiply each group of rows by its own matrix, for one or more such sets of matrices.

    Args:
        x: [N, K] rows, those of group 0 first, then those of group 1, and so on.
        weights: each [E, K, M] in x's dtype, a matrix per group; they share the reading of x.
        group_sizes: [E] int32, how many rows each group has; their sum is at most N.
        implementation: one of `GROUPED_MATMULS`, of which `auto` is the best for the devices at hand. Inside
            `shard_map` megablox and triton need `check_vma=False`, the others nothing.
        all_read: whether rows that belong to no group are read, or their gradients; if not, both may be anything.

    Returns:
        For each of the weights [N, M] in x's dtype, summed in at least float32. Rows that belong to no group
        give zeros and get a gradient of zero, whatever they hold.

    Raises:
        UserError: the implementation is unknown or cannot compute in x's dtype.
    """
    if implementation not in GROUPED_MATMULS:
        raise UserError(f"model.grouped_matmul={implementation}: choose one of {', '.join(GROUPED_MATMULS)}")
    if implementation in WITHOUT_FLOAT64 and x.dtype == jnp.float64:
        raise UserError(f"model.grouped_matmul={implementation}: has no float64; choose blocked or model.precision=float32")
    if implementation == "auto":
        implementation = best("grouped_matmul", is_float64=x.dtype == jnp.float64)
    x, group_sizes, *weights = _vary_alike(x, group_sizes, *weights)
    if implementation == "reference":
        return [_reference(x, weight, group_sizes) for weight in weights]
    if implementation != "megablox" or not all_read:
        return _fast(x, weights, group_sizes, implementation)
    # The kernel leaves memory that it does not write as it found it.
    member = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    return [jnp.where(member, y, 0) for y in _fast(jnp.where(member, x, 0), weights, group_sizes, implementation)]


def _reference(x: jax.Array, weight: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The definition: every row by every matrix, keeping the rows of its group."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])

    def multiply_group(y: jax.Array, group: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        matrix, start, end = group
        member = ((start <= rows) & (rows < end))[:, None]
        product = jnp.matmul(jnp.where(member, x, 0), matrix, preferred_element_type=y.dtype)
        return jnp.where(member, product, y), None

    zero = jnp.zeros_like(x, _wide(x.dtype), (x.shape[0], weight.shape[2]))
    return lax.scan(multiply_group, zero, (weight, ends - group_sizes, ends))[0].astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fast(x: jax.Array, weights: Arrays, group_sizes: jax.Array, implementation: str) -> Arrays:
    return _IMPLEMENTATIONS[implementation][0](x, weights, group_sizes)


def _fast_forward(x: jax.Array, weights: Arrays, group_sizes: jax.Array, implementation: str) -> tuple[Arrays, Any]:
    return _fast(x, weights, group_sizes, implementation), (x, weights, group_sizes)


def _fast_backward(implementation: str, kept: Any, gradients: Arrays) -> tuple[jax.Array, Arrays, None]:
    x, weights, group_sizes = kept
    return *_IMPLEMENTATIONS[implementation][1](x, weights, group_sizes, gradients), None


_fast.defvjp(_fast_forward, _fast_backward)


def _blocked(x: jax.Array, weights: Arrays, group_sizes: jax.Array) -> Arrays:
    """The products, a block of one group's rows at a time."""

    def multiply_group(results: Arrays, group: jax.Array, start: jax.Array, end: jax.Array) -> Arrays:
        matrices = _of_group(weights, group)

        def multiply_block(results: Arrays, block: Block) -> Arrays:
            rows = block.read(x)
            return [block.write(y, _product(rows, matrix, (1, 0))) for y, matrix in zip(results, matrices)]

        return _over_blocks(x.shape[0], start, end, results, multiply_block)

    return _over_groups(group_sizes, [jnp.zeros_like(x, shape=(x.shape[0], w.shape[2])) for w in weights], multiply_group)


def _blocked_gradients(x: jax.Array, weights: Arrays, group_sizes: jax.Array, gradients: Arrays) -> tuple[jax.Array, Arrays]:
    """Gradients of x and of the weights, in one pass over the blocks, which reads each operand once."""

    def visit_group(totals: Any, group: jax.Array, start: jax.Array, end: jax.Array) -> Any:
        dx, dw = totals
        matrices = _of_group(weights, group)

        def visit_block(totals: Any, block: Block) -> Any:
            dx, of_group = totals
            x_columns = columns(jnp.where(block.member, block.read(x), 0))
            rows = [jnp.where(block.member, block.read(gradient), 0) for gradient in gradients]
            of_rows = reduce(jnp.add, (_product(dy, matrix, (1, 1)) for dy, matrix in zip(rows, matrices)))
            dx = block.write(dx, of_rows)
            return dx, [total + _product(x_columns, dy, (1, 0)) for total, dy in zip(of_group, rows)]

        zeros = [jnp.zeros_like(x, _wide(x.dtype), matrix.shape) for matrix in matrices]
        dx, of_group = _over_blocks(x.shape[0], start, end, (dx, zeros), visit_block)
        return dx, [lax.dynamic_update_index_in_dim(y, of.astype(y.dtype), group, 0) for y, of in zip(dw, of_group)]

    return _over_groups(group_sizes, (jnp.zeros_like(x), [jnp.zeros_like(w) for w in weights]), visit_group)


def _of_group(weights: Arrays, group: jax.Array) -> Arrays:
    return [lax.dynamic_index_in_dim(weight, group, keepdims=False) for weight in weights]


def _product(left: jax.Array, right: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Of two matrices over one dimension of each, in at least float32."""
    left_dimension, right_dimension = contracted
    dimensions = (((left_dimension,), (right_dimension,)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=_wide(left.dtype))


def _over_groups(group_sizes: jax.Array, carry: Any, visit: Callable) -> Any:
    """Fold `visit(carry, group, start, end)` over the groups that have rows, so that others cost nothing."""
    starts = jnp.cumsum(group_sizes) - group_sizes
    order = jnp.argsort(group_sizes == 0, stable=True)

    def step(i: jax.Array, carry: Any) -> Any:
        group = order[i]
        return visit(carry, group, starts[group], starts[group] + group_sizes[group])

    return lax.fori_loop(0, jnp.sum(group_sizes > 0), step, carry)


class Block(NamedTuple):
    """Rows of which some are a group's own."""

    first: jax.Array
    """Index of the first of them."""
    member: jax.Array
    """[size, 1] whether a row is the group's own; the block may reach beyond the group on either side."""

    def read(self, x: jax.Array) -> jax.Array:
        """These rows of all."""
        return lax.dynamic_slice_in_dim(x, self.first, self.member.shape[0], 0)

    def write(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """All rows, with the group's own among these in their place."""
        own = jnp.where(self.member, rows.astype(x.dtype), self.read(x))
        return lax.dynamic_update_slice_in_dim(x, own, self.first, 0)


def _over_blocks(rows: int, start: jax.Array, end: jax.Array, carry: Any, visit: Callable[[Any, Block], Any]) -> Any:
    """Fold `visit(carry, block)` over blocks of all `rows` that together cover those from start to end."""
    # Not size == rows: XLA would hoist the product of a block that is always the same out of its loop.
    sizes = [size for size in LEAST_ROWS if size < rows] or [rows]
    for size in sizes:
        least = LEAST_ROWS.get(size, 1)

        def step(state: tuple[jax.Array, Any], size: int = size) -> tuple[jax.Array, Any]:
            here, carry = state
            first = jnp.minimum(here, rows - size)
            index = first + jnp.arange(size, dtype=first.dtype)[:, None]
            return here + size, visit(carry, Block(first, (here <= index) & (index < end)))

        def is_worth(state: tuple[jax.Array, Any], least: int = least) -> jax.Array:
            return state[0] + least <= end

        start, carry = lax.while_loop(is_worth, step, (start, carry))
    return carry


def _megablox(x: jax.Array, weights: Arrays, group_sizes: jax.Array) -> Arrays:
    """Imported late: only TPUs should load Pallas."""
    from deepseek_jax.kernels.megablox import rows_by_weight

    return [rows_by_weight(x, weight, group_sizes) for weight in weights]


def _megablox_gradients(x: jax.Array, weights: Arrays, group_sizes: jax.Array, gradients: Arrays) -> tuple[jax.Array, Arrays]:
    """Weights side by side, so that one product sums what each gives to that of x.

    Unless they are more than the rows: then copying them, and taking their gradients apart, costs more than adding up rows.
    That in the wide type, for XLA's narrow sums, which stand alone, take nearly twice as long.
    """
    from deepseek_jax.kernels.megablox import rows_by_rows, rows_by_weight

    of_rows = partial(rows_by_rows, group_sizes=group_sizes)
    if sum(weight.size for weight in weights) > x.size:
        parts = (rows_by_weight(dy, weight, group_sizes, transpose=True) for dy, weight in zip(gradients, weights))
        dx = reduce(jnp.add, (part.astype(_wide(x.dtype)) for part in parts)).astype(x.dtype)
        return dx, [slabs.make(of_rows, x, dy, group_sizes.size) for dy in gradients]
    dy, ends = jnp.concatenate(gradients, axis=1), np.cumsum([weight.shape[2] for weight in weights])
    dx = rows_by_weight(dy, jnp.concatenate(weights, axis=2), group_sizes, transpose=True)
    return dx, jnp.split(of_rows(x, dy), ends[:-1], axis=2)


def _triton(x: jax.Array, weights: Arrays, group_sizes: jax.Array) -> Arrays:
    from deepseek_jax.kernels.triton_grouped_matmul import rows_by_weights

    return [rows_by_weights([x], [weight], group_sizes) for weight in weights]


def _triton_gradients(x: jax.Array, weights: Arrays, group_sizes: jax.Array, gradients: Arrays) -> tuple[jax.Array, Arrays]:
    """That of x is one sum in float32 over all weights."""
    from deepseek_jax.kernels.triton_grouped_matmul import rows_by_rows, rows_by_weights

    dx = rows_by_weights(gradients, weights, group_sizes, transpose=True)
    of_rows = partial(rows_by_rows, group_sizes=group_sizes)
    return dx, [slabs.make(of_rows, x, dy, group_sizes.size) for dy in gradients]


_IMPLEMENTATIONS = {
    "blocked": (_blocked, _blocked_gradients),
    "megablox": (_megablox, _megablox_gradients),
    "triton": (_triton, _triton_gradients),
    "mosaic": (_triton, _triton_gradients),  # its own are those of float8
}


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, inside `shard_map` marked as varying over each mesh axis that one of them varies over.

    Loops and custom gradients want this spelt out; the gradient of what was alike on all devices
    is then summed over them.
    """
    zero = reduce(jnp.add, (jnp.zeros_like(array, jnp.int32, shape=()) for array in arrays))
    return [jnp.where(True, array, zero.astype(array.dtype)) for array in arrays]

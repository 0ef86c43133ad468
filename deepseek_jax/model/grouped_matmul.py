"""Matrix products over rows sorted by group, each group with its own weight: one signature, several forms.

XLA's `ragged_dot` multiplies every row by every weight on CPU and on CUDA. The blocked form does
only the work that is there, with loops whose length depends on the groups; megablox does so on TPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import GROUPED_MATMULS
from deepseek_jax.errors import UserError

BLOCKS = (512, 128, 32, 4)
"""Rows multiplied at once by the blocked form: as many blocks of each size in turn as a group fills or almost fills."""

TILE = 128
"""Side of megablox' tiles; a width that is smaller is one tile."""


def grouped_matmul(x: jax.Array, weight: jax.Array, group_sizes: jax.Array, implementation: str = "auto") -> jax.Array:
    """Multiply each group of rows by its own matrix.

    Args:
        x: [N, K] rows, those of group 0 first, then those of group 1, and so on.
        weight: [E, K, M] in x's dtype, a matrix per group.
        group_sizes: [E] int32, how many rows each group has; their sum is at most N.
        implementation: one of `GROUPED_MATMULS`. `auto` is megablox where TPUs are the default backend, and
            blocked elsewhere; on GPU that is right but not measured. Inside `shard_map` megablox needs
            `check_vma=False`, the others nothing.

    Returns:
        [N, M] in x's dtype, summed in at least float32. Rows that belong to no group give zeros and
        get a gradient of zero, whatever they hold.

    Raises:
        UserError: the implementation is unknown or cannot compute in x's dtype.
    """
    if implementation not in GROUPED_MATMULS:
        raise UserError(f"model.grouped_matmul={implementation}: choose one of {', '.join(GROUPED_MATMULS)}")
    if implementation == "megablox" and x.dtype == jnp.float64:
        raise UserError("model.grouped_matmul=megablox: has no float64; choose blocked or model.precision=float32")
    if implementation == "auto":
        implementation = "megablox" if jax.default_backend() == "tpu" and x.dtype != jnp.float64 else "blocked"
    x, weight, group_sizes = _vary_alike(x, weight, group_sizes)
    if implementation == "reference":
        return _reference(x, weight, group_sizes)
    return _fast(x, weight, group_sizes, implementation)


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
def _fast(x: jax.Array, weight: jax.Array, group_sizes: jax.Array, implementation: str) -> jax.Array:
    rows_by_weight, _ = _IMPLEMENTATIONS[implementation]
    return rows_by_weight(x, weight, group_sizes, False)


def _fast_forward(x: jax.Array, weight: jax.Array, group_sizes: jax.Array, implementation: str) -> tuple[Any, Any]:
    return _fast(x, weight, group_sizes, implementation), (x, weight, group_sizes)


def _fast_backward(implementation: str, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, weight, group_sizes = kept
    rows_by_weight, rows_by_rows = _IMPLEMENTATIONS[implementation]
    return rows_by_weight(gradient, weight, group_sizes, True), rows_by_rows(x, gradient, group_sizes), None


_fast.defvjp(_fast_forward, _fast_backward)


def _blocked_rows_by_weight(x: jax.Array, weight: jax.Array, group_sizes: jax.Array, transpose: bool) -> jax.Array:
    """[N, K] by [E, K, M], or with `transpose` by [E, M, K] -> [N, M]."""
    dimensions = (((1,), (1 if transpose else 0,)), ((), ()))

    def multiply_group(y: jax.Array, group: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
        matrix = lax.dynamic_index_in_dim(weight, group, keepdims=False)

        def multiply_block(y: jax.Array, read: Callable, member: jax.Array, at: jax.Array) -> jax.Array:
            product = lax.dot_general(read(x), matrix, dimensions, preferred_element_type=_wide(x.dtype))
            return lax.dynamic_update_slice_in_dim(y, jnp.where(member, product.astype(x.dtype), read(y)), at, 0)

        return _over_blocks(x.shape[0], start, end, y, multiply_block)

    zero = jnp.zeros_like(x, shape=(x.shape[0], weight.shape[1 if transpose else 2]))
    return _over_groups(group_sizes, zero, multiply_group)


def _blocked_rows_by_rows(x: jax.Array, gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """For every group the product of its columns of xᵀ and its rows of the gradient, [E, K, M]."""
    dtype = _wide(x.dtype)
    shape = (x.shape[1], gradient.shape[1])

    def multiply_group(y: jax.Array, group: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
        def add_block(total: jax.Array, read: Callable, member: jax.Array, at: jax.Array) -> jax.Array:
            left, right = jnp.where(member, read(x), 0), jnp.where(member, read(gradient), 0)
            return total + lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=dtype)

        total = _over_blocks(x.shape[0], start, end, jnp.zeros_like(x, dtype, shape), add_block)
        return lax.dynamic_update_index_in_dim(y, total.astype(y.dtype), group, 0)

    return _over_groups(group_sizes, jnp.zeros_like(x, shape=(group_sizes.shape[0], *shape)), multiply_group)


def _over_groups(group_sizes: jax.Array, carry: jax.Array, visit: Callable) -> jax.Array:
    """Fold `visit(carry, group, start, end)` over the groups that have rows, so that others cost nothing."""
    starts = jnp.cumsum(group_sizes) - group_sizes
    order = jnp.argsort(group_sizes == 0, stable=True)

    def step(i: jax.Array, carry: jax.Array) -> jax.Array:
        group = order[i]
        return visit(carry, group, starts[group], starts[group] + group_sizes[group])

    return lax.fori_loop(0, jnp.sum(group_sizes > 0), step, carry)


def _over_blocks(rows: int, start: jax.Array, end: jax.Array, carry: jax.Array, visit: Callable) -> jax.Array:
    """Fold `visit(carry, read, member, at)` over blocks that together cover the rows from start to end.

    `read` takes a block's rows out of an array of all `rows`, of which `at` is the first. A block may
    reach beyond the group on either side: `member` [size, 1] marks the rows that are its own.
    """
    # Not size == rows: XLA would hoist the product of a block that is always the same out of its loop.
    sizes = [size for size in BLOCKS if size < rows] or [rows]
    for size in sizes:
        # A block that is almost full costs less than the several smaller ones that would fit exactly.
        least = 1 if size == sizes[-1] else size - size // 8

        def step(state: tuple[jax.Array, jax.Array], size: int = size) -> tuple[jax.Array, jax.Array]:
            here, carry = state
            at = jnp.minimum(here, rows - size)
            index = at + jnp.arange(size, dtype=at.dtype)[:, None]
            read = partial(lax.dynamic_slice_in_dim, start_index=at, slice_size=size)
            return here + size, visit(carry, read, (here <= index) & (index < end), at)

        start, carry = lax.while_loop(lambda state, least=least: state[0] + least <= end, step, (start, carry))
    return carry


def _megablox_rows_by_weight(x: jax.Array, weight: jax.Array, group_sizes: jax.Array, transpose: bool) -> jax.Array:
    """As `_blocked_rows_by_weight`, by the TPU kernel (imported late: only TPUs should pay for loading Pallas)."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows, width = x.shape[0], weight.shape[1 if transpose else 2]
    padded = _whole_tiles(x)
    tiling = (TILE, min(TILE, x.shape[1]), min(TILE, width))
    y = gmm(padded, weight, group_sizes, x.dtype, tiling, transpose_rhs=transpose)[:rows]
    # The kernel leaves memory that it does not write as it found it.
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(group_sizes), y, 0)


def _megablox_rows_by_rows(x: jax.Array, gradient: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """As `_blocked_rows_by_rows`, by the TPU kernel."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    left, right = _whole_tiles(x), _whole_tiles(gradient)
    tiling = (TILE, min(TILE, x.shape[1]), min(TILE, gradient.shape[1]))
    return tgmm(left.T, right, group_sizes, x.dtype, tiling)


def _whole_tiles(x: jax.Array) -> jax.Array:
    """Zero rows added up to whole tiles."""
    return jnp.pad(x, ((0, -x.shape[0] % TILE), (0, 0)))


_IMPLEMENTATIONS = {
    "blocked": (_blocked_rows_by_weight, _blocked_rows_by_rows),
    "megablox": (_megablox_rows_by_weight, _megablox_rows_by_rows),
}


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, inside `shard_map` marked as varying over each mesh axis that one of them varies over.

    Loops and custom gradients want this spelt out; the gradient of what was alike on all devices
    is then summed over them.
    """
    zero = sum(jnp.zeros_like(array, jnp.int32, shape=()) for array in arrays)
    return [jnp.where(True, array, zero.astype(array.dtype)) for array in arrays]

"""Gradients of many experts' weights, some rows or columns of all of them at a time: made, summed, and put where they belong.

Whole, those of one matrix 7168 x 2048 of 256 experts are 7.5 GB in bfloat16 and 15 GB as a sum in float32. Between functions
they are whole in name only: where one puts slabs together and the next takes the same ones apart, XLA does neither, if
nothing but a change of type stands between. An adapter's product or a sum over rounds wants them whole, and has them copied.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

WIDTH = 512
"""Of a slab: two tiles or more of the kernels for GPUs, and half of the widest for TPUs, which is 341 operations a byte read
(v5p wants 166, v6e 560). With slabs of 1024 a step on eight H100s took 9 GB more, for XLA gathers weights meanwhile."""
MANY = 2**31
"""Numbers from which on an array is made in slabs: 4 GiB of bfloat16."""


def are_many(shape: Sequence[int]) -> bool:
    """Whether a gradient of this shape is made in slabs."""
    return len(shape) == 3 and math.prod(shape) >= MANY


def side(shape: Sequence[int]) -> int:
    """The axis of [E, K, M] along which slabs lie: the narrower, for each slab reads all of the other; of equals, 2."""
    return 1 if shape[1] < shape[2] else 2


def cut(x: jax.Array, axis: int) -> list[jax.Array]:
    """x in slabs along an axis, the last of which may be the narrowest."""
    return jnp.split(x, list(range(WIDTH, x.shape[axis], WIDTH)), axis)


def make(rows_by_rows: Callable[[Any, Any], jax.Array], x: Any, dy: Any, groups: int) -> jax.Array:
    """`rows_by_rows(x, dy)`, [groups, K, M]; in slabs if that is many numbers.

    Args:
        x: tree of arrays with K columns in their second axis.
        dy: likewise, M columns.
    """
    shape = (groups, *(jax.tree.leaves(each)[0].shape[1] for each in (x, dy)))
    if not are_many(shape):
        return rows_by_rows(x, dy)
    if side(shape) == 1:
        return jnp.concatenate([rows_by_rows(columns, dy) for columns in _columns(x)], 1)
    return jnp.concatenate([rows_by_rows(x, columns) for columns in _columns(dy)], 2)


def _columns(tree: Any) -> list[Any]:
    leaves, structure = jax.tree.flatten(tree)
    return [jax.tree.unflatten(structure, each) for each in zip(*(cut(leaf, 1) for leaf in leaves))]

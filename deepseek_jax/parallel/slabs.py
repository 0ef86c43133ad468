"""Gradients of many experts' weights, a slab of columns of all of them at a time: made, summed, and put where it belongs.

Whole, those of one matrix 7168 x 2048 of 256 experts are 7.5 GB in bfloat16 and 15 GB as a sum in float32. Between functions
they are whole in name only: where one puts slabs together and the next takes the same ones apart, XLA does neither.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

WIDTH = 1024
"""Of a slab: a kernel's widest tile, so that none reads rows of the other side more often than it would have anyway."""
MANY = 2**30
"""Numbers from which on an array is made in slabs: 2 GiB of bfloat16."""


def side(shape: Sequence[int]) -> int:
    """The axis of [E, K, M] along which slabs lie: the matrices' narrower side, which is that of their slabs as well."""
    return 1 if shape[1] < shape[2] else 2


def cut(x: jax.Array, axis: int) -> list[jax.Array]:
    """Slabs of [E, K, M], or the columns of rows that make them; the last may be the narrowest."""
    return jnp.split(x, list(range(WIDTH, x.shape[axis], WIDTH)), axis)


def join(slabs: Sequence[jax.Array]) -> jax.Array:
    """[E, K, M] of its slabs."""
    return jnp.concatenate(slabs, side(slabs[0].shape))

"""Sequences divided over the axis `context`: which tokens a device has, and how it comes by what the others know.

A sequence is cut into 2 C pieces, of which device i has piece i and piece 2 C - 1 - i (zigzag): a late piece, whose tokens
look back far, beside an early one, so that all devices have the same work in causal attention. Every device reads the whole
sequence's ids, 4 bytes a token, and makes of them what needs its neighbours' (documents, targets, the tokens of MTP modules)
before it takes its own; attention goes by the order of the pieces and RoPE by positions that tokens carry along.
"""

from functools import partial
from typing import Optional

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.sharding import Division

AXIS = "context"


def devices_of_a_sequence(division: Optional[Division]) -> int:
    """C."""
    return 1 if division is None else division.mesh.shape[AXIS]


def pieces(division: Optional[Division], rows: jax.Array, length: int) -> jax.Array:
    """This device's pieces of sequences, each with as much of what follows it as follows a sequence.

    Args:
        rows: [B, length + E], the same on all devices of the axis.

    Returns:
        [B, P, length / (C P) + E], where P is 2, or 1 where the axis divides nothing.
    """
    devices = devices_of_a_sequence(division)
    if devices == 1:
        return rows[:, None]
    size = length // (2 * devices)
    wide = size + rows.shape[1] - length
    return jnp.stack([jax.lax.dynamic_slice_in_dim(rows, number * size, wide, axis=1) for number in _own(devices)], axis=1)


def joined(pieces: jax.Array, extra: int, ahead: int = 0) -> jax.Array:
    """Pieces [B, P, n + extra, ...] one after another without what follows them, or what is so far ahead: [B, P n, ...]."""
    size = pieces.shape[2] - extra
    return pieces[:, :, ahead : ahead + size].reshape(pieces.shape[0], -1, *pieces.shape[3:])


def own_tokens(division: Optional[Division], rows: jax.Array, length: int, ahead: int = 0) -> jax.Array:
    """This device's tokens, or those so far ahead of them: [B, length + E] -> [B, length / C]."""
    return joined(pieces(division, rows, length), rows.shape[1] - length, ahead)


def gather(x: jax.Array) -> jax.Array:
    """Every piece of the sequences in their order, from this device's two: [B, 2 n, ...] -> [2 C, B, n, ...]."""
    own = x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(0, 1)
    with jax.named_scope(AXIS):
        found = jax.lax.all_gather(own, AXIS)
    return jnp.concatenate([found[:, 0], found[::-1, 1]])


def scatter(x: jax.Array) -> jax.Array:
    """Transpose of `gather`: sums over the devices, of which each keeps its own pieces; [2 C, B, n, ...] -> [B, 2 n, ...]."""
    early, late = jnp.split(x, 2)
    with jax.named_scope(AXIS):
        own = jax.lax.psum_scatter(jnp.stack([early, late[::-1]], axis=1), AXIS)
    return own.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def whole(dtype: jnp.dtype, x: jax.Array) -> jax.Array:
    """All of the sequences, in order and in the type in which their gradient is summed: [B, 2 n, ...] -> [B, T, ...]."""
    return jnp.moveaxis(gather(x), 0, 1).reshape(x.shape[0], -1, *x.shape[2:]).astype(dtype)


def _whole_backward(dtype: jnp.dtype, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    by_piece = gradient.reshape(len(gradient), 2 * jax.lax.axis_size(AXIS), -1, *gradient.shape[2:])
    return (scatter(jnp.moveaxis(by_piece, 1, 0)).astype(like.dtype),)


whole.defvjp(lambda dtype, x: (whole(dtype, x), jnp.zeros(0, x.dtype)), _whole_backward)


def own_places(count: int) -> jax.Array:
    """Where in a sequence this device's tokens are, which are so many: [count] int32."""
    return jnp.concatenate([number * (count // 2) + jnp.arange(count // 2) for number in _own(jax.lax.axis_size(AXIS))])


def total(division: Optional[Division], x: jax.Array) -> jax.Array:
    """Sum over the devices of a sequence; differentiable."""
    return x if devices_of_a_sequence(division) == 1 else jax.lax.psum(x, AXIS)


def before(division: Optional[Division], x: jax.Array) -> jax.Array:
    """Sums of x [B, T / C, ...] over all tokens of the sequence before each of this device's."""
    devices = devices_of_a_sequence(division)
    parts = 1 if devices == 1 else 2
    by_piece = x.reshape(x.shape[0], parts, -1, *x.shape[2:])
    earlier = jnp.cumsum(by_piece, axis=2) - by_piece
    if devices > 1:
        sums = gather(jnp.sum(by_piece, axis=2))
        earlier += jnp.moveaxis((jnp.cumsum(sums, axis=0) - sums)[jnp.stack(_own(devices))], 0, 1)
    return earlier.reshape(x.shape)


def _own(devices: int) -> tuple[jax.Array, jax.Array]:
    """Numbers of this device's pieces."""
    mine = jax.lax.axis_index(AXIS)
    return mine, 2 * devices - 1 - mine

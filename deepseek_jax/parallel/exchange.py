"""Rows that travel to the devices of their experts and back; inside `shard_map` over the axis `expert`.

Nothing is dropped, whatever the routing: a device has room for every row of its whole group. What is sent is no more
than the rows there are (`ragged`), or equal parts of them for every device, again and again until the fullest has
all of its own (`rounds`); under even routing that is one round and as many bytes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.implementations import best

AXIS = "expert"


class Journey(NamedTuple):
    """Which rows go where; made once for a layer's tokens, it serves all that travels with them."""

    sizes: jax.Array
    """Rows by sender and receiver, [X, X] int32."""
    order: jax.Array
    """For each place among the rows here, sorted by expert, the place at which it arrives. [X * R]."""
    inverse: jax.Array
    group_sizes: jax.Array
    """Rows of each of this device's experts, [E / X] int32."""


def plan_journey(group_sizes: jax.Array, rows: int) -> Journey:
    """Agree with the other devices on who sends what.

    Args:
        group_sizes: [E] how many of this device's rows each expert serves; device j has experts j E / X and on.
        rows: R, of this device, all of which are served.
    """
    devices = jax.lax.axis_size(AXIS)
    counts = jax.lax.all_gather(group_sizes, AXIS).reshape(devices, devices, -1)
    here = jnp.take(counts, jax.lax.axis_index(AXIS), axis=1)  # [X, E / X] by sender
    experts = here.shape[1]
    empty = devices * rows - here.sum()
    kinds = jnp.append(jnp.tile(jnp.arange(experts), devices), experts)  # what is left empty sorts last
    arrived = jnp.repeat(kinds, jnp.append(here.reshape(-1), empty), total_repeat_length=devices * rows)
    order = jnp.argsort(arrived, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    return Journey(counts.sum(axis=2), order, inverse, here.sum(axis=0))


def send(rows: jax.Array, journey: Journey, implementation: str) -> jax.Array:
    """Rows [R, d] sorted by expert -> the rows for this device's experts, sorted by expert, [X * R, d]; then zeros."""
    arrived = _move(rows, journey.sizes, journey.order.size, implementation)
    return _permuted(arrived, journey.order, journey.inverse)


def send_back(rows: jax.Array, journey: Journey, implementation: str) -> jax.Array:
    """Inverse of `send`: [X * R, d] -> [R, d]."""
    own = rows.shape[0] // journey.sizes.shape[0]
    return _move(_permuted(rows, journey.inverse, journey.order), journey.sizes.T, own, implementation)


@jax.custom_vjp
def _permuted(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    return rows[order]


_permuted.defvjp(
    lambda rows, order, inverse: (rows[order], inverse),
    lambda inverse, gradient: (gradient[inverse], None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _move(rows: jax.Array, sizes: jax.Array, room: int, implementation: str) -> jax.Array:
    """Rows sorted by receiver -> rows sorted by sender, [room, d], then zeros."""
    if implementation == "auto":
        implementation = best("exchange")
    return _IMPLEMENTATIONS[implementation](rows, sizes, room)


def _move_forward(rows: jax.Array, sizes: jax.Array, room: int, implementation: str) -> tuple:
    return _move(rows, sizes, room, implementation), (sizes, jnp.zeros((rows.shape[0], 0)))


def _move_backward(room: int, implementation: str, kept: tuple, gradient: jax.Array) -> tuple:
    sizes, like = kept
    return _move(gradient, sizes.T, like.shape[0], implementation), None


_move.defvjp(_move_forward, _move_backward)


def _ragged(rows: jax.Array, sizes: jax.Array, room: int) -> jax.Array:
    mine = jax.lax.axis_index(AXIS)
    places = jnp.cumsum(sizes, axis=0) - sizes  # at the receiver
    return jax.lax.ragged_all_to_all(
        rows, jnp.zeros((room, *rows.shape[1:]), rows.dtype), _starts(sizes[mine]), sizes[mine], places[mine],
        sizes[:, mine], axis_name=AXIS,
    )  # fmt: skip


def _in_rounds(rows: jax.Array, sizes: jax.Array, room: int) -> jax.Array:
    devices, mine = sizes.shape[0], jax.lax.axis_index(AXIS)
    part = -(-min(rows.shape[0], room) // devices)
    sent, received = (_starts(sizes[mine]), sizes[mine]), (_starts(sizes[:, mine]), sizes[:, mine])

    def places(of: tuple[jax.Array, jax.Array], turn: jax.Array, outside: int) -> jax.Array:
        """Rows of this round by the other device, [X, part]; `outside` where it has no more."""
        starts, counts = of
        index = turn * part + jnp.arange(part)
        return jnp.where(index < counts[:, None], starts[:, None] + index, outside)

    def one_round(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, arrived = state
        leaving = rows.at[places(sent, turn, rows.shape[0])].get(mode="fill", fill_value=0)
        arriving = jax.lax.all_to_all(leaving, AXIS, split_axis=0, concat_axis=0)
        return turn + 1, arrived.at[places(received, turn, room)].set(arriving, mode="drop")

    rounds = -(-jnp.max(sizes) // part)  # the same on all devices of the group
    start = (jnp.zeros((), rounds.dtype), jnp.zeros((room, *rows.shape[1:]), rows.dtype))
    return jax.lax.while_loop(lambda state: state[0] < rounds, one_round, start)[1]


def _starts(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes) - sizes


_IMPLEMENTATIONS = {"ragged": _ragged, "rounds": _in_rounds}

"""Rows copied into another order, and summed back: each the other's gradient.

Every row of x has S / N slots: slot s belongs to row s // (S / N). An order gives slots a place each, or none.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """Which slot lies at which place."""

    slots: jax.Array
    """[R] for each place its slot, or S for none; what lies at a place without a slot is read by no one."""
    places: jax.Array
    """[S] for each slot its place, or R for none."""


def sort_slots(kinds: jax.Array, number: int, room: int) -> Order:
    """Slots sorted by kind, those of one kind as they were.

    Args:
        kinds: [S] from 0 on; what is `number` or more has no place.
        room: R; if there are more slots, the last have none.
    """
    places = jnp.arange(room, dtype=jnp.int32)
    slots = jnp.where(places < jnp.sum(kinds < number), jnp.argsort(kinds, stable=True)[:room], kinds.size)
    return Order(slots, jnp.full(kinds.size, room, jnp.int32).at[slots].set(places, mode="drop", unique_indices=True))


@jax.custom_vjp
def dispatch(x: jax.Array, order: Order) -> jax.Array:
    """Copies of the rows of x by place, [N, d] -> [R, d]."""
    return x[order.slots // (order.places.size // x.shape[0])]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(rows: jax.Array, order: Order, count: int) -> jax.Array:
    """Sum over each of N = `count` rows' slots, [R, d] -> [N, d]; transpose of `dispatch`."""
    by_slot, gathered, scattered = (partial(form, count=count) for form in (sum_by_slot, gathered_sum, scattered_sum))
    if order.places.size <= order.slots.size:
        return jax.lax.platform_dependent(rows, order, cuda=by_slot, default=gathered)
    return jax.lax.platform_dependent(rows, order, cuda=by_slot, tpu=scattered, default=gathered)


def gathered_sum(rows: jax.Array, order: Order, count: int) -> jax.Array:
    """`combine` where each slot reads its row."""
    return rows.at[order.places].get(mode="fill", fill_value=0).reshape(count, -1, rows.shape[-1]).sum(axis=1)


def sum_by_slot(rows: jax.Array, order: Order, count: int) -> jax.Array:
    """`combine` where each sum reads the rows of its slots, one after the other.

    For GPUs, where it is one pass; a row for every slot, also for those without a place, would be written and read again.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    places = order.places.reshape(count, -1)
    parts = (rows.at[places[:, slot]].get(mode="fill", fill_value=0).astype(wide) for slot in range(places.shape[1]))
    return sum(parts, jnp.zeros((), wide)).astype(rows.dtype)


def scattered_sum(rows: jax.Array, order: Order, count: int) -> jax.Array:
    """`combine` where each row is added to that of its slot.

    For TPUs, which sort the rows for that and would gather something for every slot, also those without a place.
    """
    at = order.slots // (order.places.size // count)
    return jnp.zeros((count, rows.shape[-1]), rows.dtype).at[at].add(rows, mode="drop")


dispatch.defvjp(
    lambda x, order: (dispatch(x, order), (order, jnp.zeros((x.shape[0], 0)))),
    lambda kept, gradient: (combine(gradient, kept[0], kept[1].shape[0]), None),
)
combine.defvjp(
    lambda rows, order, count: (combine(rows, order, count), order),
    lambda count, order, gradient: (dispatch(gradient, order), None),
)

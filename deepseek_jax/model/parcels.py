"""Tokens as they are sent to their experts' devices: which parcels there are, and which go in a round.

A parcel is a token for one of the devices that hold its experts, with their numbers; a token has a slot for each parcel
that it can make, and some slots are empty. All inside `shard_map` over the axis `expert`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.dispatch import Order, dispatch, sort_slots
from deepseek_jax.parallel.exchange import AXIS, Journey, Room, devices_of_a_token, experts_of_a_parcel


class Parcels(NamedTuple):
    """What a device has to send: N tokens with K choices each, in D slots for W choices each."""

    experts: jax.Array
    """[N * D, W] int32: 1 + the number of each expert among those of its device, 0 for none."""
    holds: jax.Array
    """[N, D, W, K] whether an expert of a slot is that choice of its token."""
    order: Order
    """Slots sorted by receiver; empty ones have no place. [N * D] each way."""
    choices_before: jax.Array
    """[N * D + 1] choices that lie in the parcels before a place."""
    loads: jax.Array
    """[X, X, 2] parcels and choices in all, by sender and receiver; the same on all devices."""


def pack(model: ModelConfig, indices: jax.Array) -> Parcels:
    """Parcels of this device's tokens.

    Args:
        indices: [N, K] chosen experts; device j has the experts j E / X and on.
    """
    devices, choices = jax.lax.axis_size(AXIS), indices.shape[1]
    most, width = devices_of_a_token(model, devices), experts_of_a_parcel(model, devices)
    own = model.n_routed_experts // devices
    device = indices // own
    together = device[:, :, None] == device[:, None, :]
    position = jnp.sum(together & jnp.tri(choices, k=-1, dtype=bool), axis=2)
    opens = position == 0
    slot = jnp.sum(jnp.where(together & opens[:, None], jnp.cumsum(opens, axis=1)[:, None] - 1, 0), axis=2)

    in_slot = slot[:, None] == jnp.arange(most)[:, None]  # [N, D, K]
    holds = in_slot[:, :, None] & (position[:, None, None] == jnp.arange(width)[:, None])
    experts = jnp.sum(jnp.where(holds, (indices % own + 1)[:, None, None], 0), axis=3)
    sizes = jnp.sum(in_slot, axis=2).reshape(-1)
    receiver = jnp.max(jnp.where(in_slot, device[:, None], 0), axis=2).reshape(-1)
    receiver = jnp.where(sizes > 0, receiver, devices)

    order = sort_slots(receiver, devices, receiver.size)
    to_device = receiver[:, None] == jnp.arange(devices)
    load = jnp.stack([jnp.sum(jnp.where(to_device, each, 0), axis=0) for each in (1, sizes[:, None])], axis=1)
    before = jnp.append(0, jnp.cumsum(dispatch(sizes[:, None], order)))
    return Parcels(experts.reshape(-1, width), holds, order, before, jax.lax.all_gather(load.astype(jnp.int32), AXIS))


def next_journey(parcels: Parcels, waiting: jax.Array, room: Room) -> tuple[Journey, jax.Array]:
    """Let as many go as find room, the first sender's first.

    Args:
        waiting: [X, X, 2] what of `parcels.loads` has not yet gone.

    Returns:
        The journey of those that go, and what waits still: less than before if anything did.
    """
    mine, before = jax.lax.axis_index(AXIS), parcels.choices_before
    allowed = jnp.clip(jnp.array(room) - (jnp.cumsum(waiting, axis=0) - waiting), 0, waiting)[mine]  # [X, 2]
    starts = jnp.cumsum(parcels.loads[..., 0], axis=1) - waiting[..., 0]
    first, place = starts[mine], jnp.arange(parcels.order.slots.size)
    inside = (first[:, None] <= place) & (place < (first + allowed[:, 0])[:, None])
    fits = before[1:] <= (before[first] + allowed[:, 1])[:, None]
    size = jnp.sum(inside & fits, axis=1)
    leaving = jnp.stack([size, before[first + size] - before[first]], axis=1)
    gone = jax.lax.all_gather(leaving.astype(jnp.int32), AXIS)
    sizes = gone[..., 0]
    return Journey(sizes, starts, jnp.cumsum(sizes, axis=0) - sizes), waiting - gone


def order_in(parcels: Parcels, journey: Journey) -> Order:
    """`parcels.order` of a round, in which parcels that do not go have no place."""
    mine, (slots, places) = jax.lax.axis_index(AXIS), parcels.order
    starts, sizes = journey.starts[mine][:, None], journey.sizes[mine][:, None]

    def goes(place: jax.Array) -> jax.Array:
        return jnp.any((starts <= place) & (place < starts + sizes), axis=0)

    return Order(jnp.where(goes(jnp.arange(slots.size)), slots, places.size), jnp.where(goes(places), places, slots.size))

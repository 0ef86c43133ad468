"""Tokens as they are sent to their experts' devices: which parcels there are, and which go in a round.

A parcel is a token for one of the devices of a hop, with the numbers of those of its experts that lie beyond it; a token
has a slot for each parcel that it can make, and some slots are empty. All inside `shard_map` over the axis `expert`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.dispatch import Order, dispatch, sort_slots
from deepseek_jax.parallel.exchange import AXIS, SCOPE, Hop, Journey


class Parcels(NamedTuple):
    """What a device has to send: N tokens with K choices each, in D slots for W choices each."""

    experts: jax.Array
    """[N * D, W] int32: 1 + the number of each expert among those beyond its device, 0 for none."""
    holds: jax.Array
    """[N, D, W, K] whether an expert of a slot is that choice of its token."""
    order: Order
    """Slots sorted by receiver, [R <= N * D]; empty ones have no place."""
    choices_before: jax.Array
    """[R + 1] choices that lie in the parcels before a place."""
    loads: jax.Array
    """[X, X, 2] parcels and choices in all, by sender and receiver; the same on all devices."""


@jax.named_scope(SCOPE)
def pack(hop: Hop, indices: jax.Array) -> Parcels:
    """Parcels of this device's tokens for a hop.

    Args:
        indices: [N, K] chosen experts, of which `hop.experts` lie beyond each of its devices in turn; -1 for none.
    """
    devices, most, width, choices = hop.devices, hop.parcels, hop.choices, indices.shape[1]
    device = jnp.where(indices < 0, devices, indices // hop.experts)
    together = device[:, :, None] == device[:, None, :]
    position = jnp.sum(together & jnp.tri(choices, k=-1, dtype=bool), axis=2)
    opens = (position == 0) & (indices >= 0)
    slot = jnp.sum(jnp.where(together & opens[:, None], jnp.cumsum(opens, axis=1)[:, None] - 1, 0), axis=2)
    slot = jnp.where(indices < 0, most, slot)

    in_slot = slot[:, None] == jnp.arange(most)[:, None]  # [N, D, K]
    holds = in_slot[:, :, None] & (position[:, None, None] == jnp.arange(width)[:, None])
    experts = jnp.sum(jnp.where(holds, (indices % hop.experts + 1)[:, None, None], 0), axis=3)
    sizes = jnp.sum(in_slot, axis=2).reshape(-1)
    receiver = jnp.max(jnp.where(in_slot, device[:, None], 0), axis=2).reshape(-1)
    receiver = jnp.where(sizes > 0, receiver, devices)

    order = sort_slots(receiver, devices, hop.rows)
    to_device = receiver[:, None] == jnp.arange(devices)
    load = jnp.stack([jnp.sum(jnp.where(to_device, each, 0), axis=0) for each in (1, sizes[:, None])], axis=1)
    before = jnp.append(0, jnp.cumsum(dispatch(sizes[:, None], order)))
    return Parcels(experts.reshape(-1, width), holds, order, before, _from_all(hop, load))


@jax.named_scope(SCOPE)
def next_journey(hop: Hop, parcels: Parcels, waiting: jax.Array) -> tuple[Journey, jax.Array]:
    """Let as many go as find room, the first sender's first.

    Args:
        waiting: [X, X, 2] what of `parcels.loads` has not yet gone.

    Returns:
        The journey of those that go, and what waits still: less than before if anything did.
    """
    mine, before = hop.mine(), parcels.choices_before
    allowed = jnp.clip(jnp.array(hop.room) - (jnp.cumsum(waiting, axis=0) - waiting), 0, waiting)[mine]  # [X, 2]
    starts = jnp.cumsum(parcels.loads[..., 0], axis=1) - waiting[..., 0]
    first, place = starts[mine], jnp.arange(parcels.order.slots.size)
    inside = (first[:, None] <= place) & (place < (first + allowed[:, 0])[:, None])
    fits = before[1:] <= (before[first] + allowed[:, 1])[:, None]
    size = jnp.sum(inside & fits, axis=1)
    leaving = jnp.stack([size, before[first + size] - before[first]], axis=1)
    gone = _from_all(hop, leaving)
    sizes = gone[..., 0]
    return Journey(sizes, starts, jnp.cumsum(sizes, axis=0) - sizes), waiting - gone


def order_in(hop: Hop, parcels: Parcels, journey: Journey) -> Order:
    """`parcels.order` of a round, in which parcels that do not go have no place."""
    mine, (slots, places) = hop.mine(), parcels.order
    starts, sizes = journey.starts[mine][:, None], journey.sizes[mine][:, None]

    def goes(place: jax.Array) -> jax.Array:
        return jnp.any((starts <= place) & (place < starts + sizes), axis=0)

    return Order(jnp.where(goes(jnp.arange(slots.size)), slots, places.size), jnp.where(goes(places), places, slots.size))


def _from_all(hop: Hop, counts: jax.Array) -> jax.Array:
    """[...] -> [X, ...] of all devices of a hop."""
    return jax.lax.all_gather(counts.astype(jnp.int32), AXIS, axis_index_groups=hop.groups())

"""Tokens that travel to the devices of their experts and back; inside `shard_map` over the axis `expert`.

A token goes once to each device that holds any of its experts, as a parcel: its row, and beside it the numbers and
factors of those experts. Each device has room for `parallel.exchange_room` times its even share of parcels and of choices.
What finds no room waits for a further round, and rounds go on until nothing waits: none is dropped, whatever the routing.

Of N tokens that go to D devices at most, a device sends under even routing N D rows and as many come back, less the
1/X that stay; in float8 they go as codes and scales (3.3.3), half the bytes, and come back in bfloat16, and so do
gradients both ways. Where the X devices are `parallel.exchange_groups` groups, whose links within are faster than between them
(hosts), a token goes in two hops: once to each group that holds any of its experts, to the device with its sender's place
there, and from it to the group's devices. Between groups then go N times the groups that a token can reach, as few as
the report's routing limits them to (2.1.2, 3.2.2).
"""

import math
from functools import partial
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig, ParallelConfig
from deepseek_jax.implementations import best

AXIS = "expert"
SCOPE, OVERFLOW = "exchange", "overflow"
"""In the names of a program's operations: what has to do with the exchange, and all of the rounds after the first."""


class Room(NamedTuple):
    """For how much each device has room in one round."""

    parcels: int
    choices: int


class Hop(NamedTuple):
    """A part of a token's way: which devices send to each other, what they reach, and for how much they have room."""

    devices: int
    stride: int
    """From each of them to the next along `expert`."""
    experts: int
    """Beyond each of them."""
    parcels: int
    """Of a token at most."""
    choices: int
    """In a parcel at most."""
    rows: int
    """Parcels of all its tokens that a device can have to send."""
    room: Room

    def mine(self) -> jax.Array:
        """This device's number among them."""
        return jax.lax.axis_index(AXIS) // self.stride % self.devices

    def groups(self) -> Optional[list[list[int]]]:
        """Devices that send to each other, as collectives take them; none for all."""
        size, span = jax.lax.axis_size(AXIS), self.stride * self.devices
        if self.devices == size:
            return None
        starts = [first + offset for first in range(0, size, span) for offset in range(self.stride)]
        return [list(range(start, start + span, self.stride)) for start in starts]


class Journey(NamedTuple):
    """Which rows go where in a round, [X, X] each by sender and receiver of a hop; the same on all its devices."""

    sizes: jax.Array
    """How many rows."""
    starts: jax.Array
    """Place of the first of them at the sender."""
    places: jax.Array
    """And at the receiver."""

    def back(self) -> "Journey":
        """The way back of the same rows."""
        return Journey(self.sizes.T, self.places.T, self.starts.T)


def devices_of_a_token(model: ModelConfig, devices: int) -> int:
    """D: on how many of the devices along `expert` one token's experts can lie at most.

    Its experts are in `topk_group` groups; a group's experts lie on one device or on several.
    """
    group, own = model.n_routed_experts // model.n_group, model.n_routed_experts // devices
    reached = [(first + group - 1) // own - first // own + 1 for first in range(0, model.n_routed_experts, group)]
    return min(model.num_experts_per_tok, devices, sum(sorted(reached)[-model.topk_group :]))


def hops_of(model: ModelConfig, parallel: ParallelConfig, tokens: int) -> tuple[Hop, ...]:
    """The way to their experts of so many tokens of each device: one hop, or one between groups and one within."""
    devices, groups, chosen = parallel.expert, parallel.exchange_groups, model.num_experts_per_tok

    def hop(reached: int, size: int, sent: int, parcels: int, rows: int) -> Hop:
        """To one of `reached` parts of the experts from `size` devices, of which none sends more than `sent` parcels there."""
        experts = model.n_routed_experts // reached
        choices, parcels = min(chosen, experts), min(parcels, size)
        share = math.ceil(parallel.exchange_room * tokens * devices_of_a_token(model, reached))
        room = min(share, size * sent)
        room_of_choices = min(math.ceil(parallel.exchange_room * tokens * chosen), room * choices)
        return Hop(size, devices // reached, experts, parcels, choices, min(sent * parcels, rows), Room(room, room_of_choices))

    every = tokens * chosen
    if groups in (1, devices):  # within a group of one there is nowhere to go
        return (hop(devices, devices, tokens, devices_of_a_token(model, devices), every),)
    between = hop(groups, groups, tokens, devices_of_a_token(model, groups), every)
    return between, hop(devices, devices // groups, between.room.parcels, between.choices, between.room.choices)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def send(rows: jax.Array, journey: Journey, hop: Hop, room: int, implementation: str) -> jax.Array:
    """Rows [R, d] sorted by receiver -> the rows for this device, sorted by sender, [room, d], and then anything."""
    if implementation == "auto":
        implementation = best("exchange")
    with jax.named_scope(SCOPE):
        return _IMPLEMENTATIONS[implementation](rows, journey, hop, room)


def _send_forward(rows: jax.Array, journey: Journey, hop: Hop, room: int, implementation: str) -> tuple:
    return send(rows, journey, hop, room, implementation), (journey, jnp.zeros((rows.shape[0], 0)))


def _send_backward(hop: Hop, room: int, implementation: str, kept: tuple, gradient: jax.Array) -> tuple:
    journey, like = kept
    return send(gradient, journey.back(), hop, like.shape[0], implementation), None


send.defvjp(_send_forward, _send_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def send_back(rows: jax.Array, journey: Journey, hop: Hop, room: int, implementation: str) -> jax.Array:
    """As `send` for rows of which only gradients travel: zeros, which stand for them where they arrive."""
    return jnp.zeros((room, *rows.shape[1:]), rows.dtype)


def _send_back_forward(rows: jax.Array, journey: Journey, hop: Hop, room: int, implementation: str) -> tuple:
    return send_back(rows, journey, hop, room, implementation), (journey, jnp.zeros((rows.shape[0], 0)))


send_back.defvjp(_send_back_forward, _send_backward)


def _ragged(rows: jax.Array, journey: Journey, hop: Hop, room: int) -> jax.Array:
    """What there is to send, and no more."""
    mine = hop.mine()
    # Bound to the rows: what depends on nothing XLA for TPUs takes out of a loop over layers, to copy it at each of them.
    rows, unfilled = jax.lax.optimization_barrier((rows, jax.lax.empty((room, *rows.shape[1:]), rows.dtype)))
    return jax.lax.ragged_all_to_all(
        rows, unfilled, journey.starts[mine], journey.sizes[mine],
        journey.places[mine], journey.sizes[:, mine], axis_name=AXIS, axis_index_groups=hop.groups(),
    )  # fmt: skip


def _in_rounds(rows: jax.Array, journey: Journey, hop: Hop, room: int) -> jax.Array:
    """Equal parts for all devices, again and again until the fullest has all of its own; under even routing once."""
    mine, groups = hop.mine(), hop.groups()
    part = -(-min(rows.shape[0], room) // hop.devices)
    sent, received = (journey.starts[mine], journey.sizes[mine]), (journey.places[:, mine], journey.sizes[:, mine])

    def places(of: tuple[jax.Array, jax.Array], turn: jax.Array, outside: int) -> jax.Array:
        """Rows of this turn by the other device, [X, part]; `outside` where it has no more."""
        starts, counts = of
        index = turn * part + jnp.arange(part)
        return jnp.where(index < counts[:, None], starts[:, None] + index, outside)

    def one_turn(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, arrived = state
        leaving = rows.at[places(sent, turn, rows.shape[0])].get(mode="fill", fill_value=0)
        arriving = jax.lax.all_to_all(leaving, AXIS, split_axis=0, concat_axis=0, axis_index_groups=groups)
        return turn + 1, arrived.at[places(received, turn, room)].set(arriving, mode="drop")

    turns = -(-jnp.max(journey.sizes) // part)  # the same on all devices of the hop
    start = (jnp.zeros((), turns.dtype), jax.lax.empty((room, *rows.shape[1:]), rows.dtype))
    return jax.lax.while_loop(lambda state: state[0] < turns, one_turn, start)[1]


_IMPLEMENTATIONS = {"ragged": _ragged, "rounds": _in_rounds}

"""Tokens that travel to the devices of their experts and back; inside `shard_map` over the axis `expert`.

A token goes once to each device that holds any of its experts, as a parcel: its row, and beside it the numbers and
factors of those experts. Each device has room for `parallel.exchange_room` times its even share of parcels and of choices.
What finds no room waits for a further round, and rounds go on until nothing waits: none is dropped, whatever the routing.

Of N tokens that go to D devices at most, a device sends under even routing N D rows and as many come back, less the
1/X that stay.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.implementations import best

AXIS = "expert"
SCOPE, OVERFLOW = "exchange", "overflow"
"""In the names of a program's operations: what has to do with the exchange, and all of the rounds after the first."""


class Room(NamedTuple):
    """For how much each device has room in one round."""

    parcels: int
    choices: int


class Journey(NamedTuple):
    """Which rows go where in a round, [X, X] each by sender and receiver; the same on all devices."""

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


def experts_of_a_parcel(model: ModelConfig, devices: int) -> int:
    """W: how many of a token's experts can lie on one device."""
    return min(model.num_experts_per_tok, model.n_routed_experts // devices)


def room_for(model: ModelConfig, room: float, tokens: int, devices: int) -> Room:
    """On each of the devices, which send so many tokens each; no more than could ever come."""
    share, choices = tokens * devices_of_a_token(model, devices), tokens * model.num_experts_per_tok
    parcels = min(math.ceil(room * share), devices * tokens)
    return Room(parcels, min(math.ceil(room * choices), parcels * experts_of_a_parcel(model, devices)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def send(rows: jax.Array, journey: Journey, room: int, implementation: str) -> jax.Array:
    """Rows [R, d] sorted by receiver -> the rows for this device, sorted by sender, [room, d], and then anything."""
    if implementation == "auto":
        implementation = best("exchange")
    with jax.named_scope(SCOPE):
        return _IMPLEMENTATIONS[implementation](rows, journey, room)


def _send_forward(rows: jax.Array, journey: Journey, room: int, implementation: str) -> tuple:
    return send(rows, journey, room, implementation), (journey, jnp.zeros((rows.shape[0], 0)))


def _send_backward(room: int, implementation: str, kept: tuple, gradient: jax.Array) -> tuple:
    journey, like = kept
    return send(gradient, journey.back(), like.shape[0], implementation), None


send.defvjp(_send_forward, _send_backward)


def _ragged(rows: jax.Array, journey: Journey, room: int) -> jax.Array:
    """What there is to send, and no more."""
    mine = jax.lax.axis_index(AXIS)
    # Bound to the rows: what depends on nothing XLA for TPUs takes out of a loop over layers, to copy it at each of them.
    rows, unfilled = jax.lax.optimization_barrier((rows, jax.lax.empty((room, *rows.shape[1:]), rows.dtype)))
    return jax.lax.ragged_all_to_all(
        rows, unfilled, journey.starts[mine], journey.sizes[mine],
        journey.places[mine], journey.sizes[:, mine], axis_name=AXIS,
    )  # fmt: skip


def _in_rounds(rows: jax.Array, journey: Journey, room: int) -> jax.Array:
    """Equal parts for all devices, again and again until the fullest has all of its own; under even routing once."""
    devices, mine = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    part = -(-min(rows.shape[0], room) // devices)
    sent, received = (journey.starts[mine], journey.sizes[mine]), (journey.places[:, mine], journey.sizes[:, mine])

    def places(of: tuple[jax.Array, jax.Array], turn: jax.Array, outside: int) -> jax.Array:
        """Rows of this turn by the other device, [X, part]; `outside` where it has no more."""
        starts, counts = of
        index = turn * part + jnp.arange(part)
        return jnp.where(index < counts[:, None], starts[:, None] + index, outside)

    def one_turn(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, arrived = state
        leaving = rows.at[places(sent, turn, rows.shape[0])].get(mode="fill", fill_value=0)
        arriving = jax.lax.all_to_all(leaving, AXIS, split_axis=0, concat_axis=0)
        return turn + 1, arrived.at[places(received, turn, room)].set(arriving, mode="drop")

    turns = -(-jnp.max(journey.sizes) // part)  # the same on all devices of the group
    start = (jnp.zeros((), turns.dtype), jax.lax.empty((room, *rows.shape[1:]), rows.dtype))
    return jax.lax.while_loop(lambda state: state[0] < turns, one_turn, start)[1]


_IMPLEMENTATIONS = {"ragged": _ragged, "rounds": _in_rounds}

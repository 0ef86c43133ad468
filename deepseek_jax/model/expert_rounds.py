"""Experts on several devices: tokens travel to them in rounds, the first of which serves all when routing is near even.

The first round is straight-line code that rematerialisation sees. Those after it are a loop, which turns as often as
there is something left to serve; the backward pass keeps nothing of it, and makes each of its rounds again.

Parts of a batch (`parallel.exchange_parts`) are there so that one's rows travel beside another's products. Backwards that
takes an order that XLA for TPUs does not find: it lets all gradients arrive, and rows that are sent again, before any product.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig, ParallelConfig
from deepseek_jax.model.dispatch import Order, combine, dispatch, sort_slots
from deepseek_jax.model.layers import enter_experts, leave_experts
from deepseek_jax.model.parcels import Parcels, next_journey, order_in, pack
from deepseek_jax.model.products import keep, policy, prepared, prepared_rows
from deepseek_jax.parallel.exchange import AXIS, OVERFLOW, Hop, Journey, hops_of, send, send_back
from deepseek_jax.precision.fp8_operands import Operand, Prepared, Quantized, from_bytes, join, part, to_bytes


class Setting(NamedTuple):
    """What is known before a program runs."""

    config: ModelConfig
    hops: tuple[Hop, ...]
    """That are still to come, the one at hand first."""
    exchange: str
    """Implementation of `send`."""


class Known(NamedTuple):
    """What rounds need and no gradient goes to."""

    parcels: Parcels
    rows: Optional[Quantized]
    """The tokens in float8."""
    weights: Sequence[Optional[Quantized]]
    """This device's experts in float8, the down projection last."""


Tokens = tuple[Operand, jax.Array, jax.Array]
"""x [N, hidden_size], the indices of their experts [N, K], and the weights or factors of these, likewise."""
Turn = Optional[jax.Array]
"""A zero that passes from part to part, and by which the parts wait for each other backwards; none of a batch in one part."""
Inputs = tuple[jax.Array, jax.Array, Sequence[jax.Array], Turn]
"""Tokens [N, hidden_size], the factors of their experts by slot [N * D, W], this device's experts, the down projection
last, and the turn. Under float8 tokens and experts are here to take their gradients alone."""
Served = tuple[jax.Array, Turn]
"""What experts add to each token, [N, hidden_size], and the turn."""


def in_turn(x: jax.Array, turn: Turn) -> Served:
    """Both as they are; backwards, x's gradient goes on when the turn has come, and the turn when that is made."""
    return (x, None) if turn is None else _in_turn(x, turn)


@jax.custom_vjp
def _in_turn(x: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, turn


_in_turn.defvjp(lambda x, turn: ((x, turn), None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


def serve_in_rounds(
    config: ModelConfig, parallel: ParallelConfig, tokens: Sequence[jax.Array], projections: Sequence[jax.Array]
) -> jax.Array:
    """What `Experts` returns for tokens (x, indices, weights), with this device's experts (the down projection last).

    Inside `shard_map` over the axis `expert`, all devices of which serve each other's tokens.
    """
    ready = [prepared(config, tokens[0], projection) for projection in projections]  # once, and not in every round
    parts = zip(*(jnp.split(each, parallel.exchange_parts) for each in tokens))

    turn, results = jnp.zeros(()) if parallel.exchange_parts > 1 else None, []
    for x, indices, weights in parts:
        setting = Setting(config, hops_of(config, parallel, x.shape[0]), parallel.exchange)
        served, turn = _hop(setting, (prepared_rows(config, x), indices, weights), ready, turn)
        results.append(served)
    return jnp.concatenate(results)


def _hop(setting: Setting, tokens: Tokens, projections: Sequence[Operand], turn: Turn) -> Served:
    """What the experts beyond a hop make of tokens."""
    x, indices, weights = tokens
    parcels = pack(setting.hops[0], indices)
    factors = jnp.sum(jnp.where(parcels.holds, weights[:, None, None], 0), axis=3).reshape(parcels.experts.shape)
    rows, place = part(x)
    quantized, own = zip(*map(part, projections))
    return _serve_all(setting, (place, factors, own, turn), Known(parcels, rows, quantized))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _serve_all(setting: Setting, inputs: Inputs, known: Known) -> Served:
    return _forward(setting, inputs, known)[0]


def _forward(setting: Setting, inputs: Inputs, known: Known) -> tuple[Served, Any]:
    journey, waiting = next_journey(setting.hops[0], known.parcels, known.parcels.loads)
    served, pull = jax.vjp(partial(_serve, setting, known, journey), inputs)

    def one_more(served: Served, journey: Journey) -> Served:
        return jax.tree.map(jnp.add, served, _serve(setting, known, journey, inputs))

    return _while_some_wait(setting, known.parcels, waiting, served, one_more), (pull, waiting, inputs, known)


def _backward(setting: Setting, kept: Any, gradient: Served) -> tuple[Inputs, None]:
    pull, waiting, inputs, known = kept

    def one_more(totals: Inputs, journey: Journey) -> Inputs:
        pull = jax.vjp(partial(_serve, setting, known, journey), inputs)[1]
        return jax.tree.map(jnp.add, totals, *pull(gradient))

    (first,) = pull(gradient)  # from the first round's gradients on, so that no zeros are made to begin with
    return _while_some_wait(setting, known.parcels, waiting, first, one_more), None


_serve_all.defvjp(_forward, _backward)


def _while_some_wait(setting: Setting, parcels: Parcels, waiting: jax.Array, start: Any, one_more: Any) -> Any:
    """Fold `one_more(result, journey)` over the rounds that are left."""
    hop = setting.hops[0]

    def some_wait(waiting: jax.Array) -> jax.Array:
        """On any device with which one shares a hop to come: all of them take part in each of its rounds."""
        some = jnp.any(waiting > 0)
        return some if len(setting.hops) == 1 else jax.lax.pmax(some.astype(jnp.int32), AXIS) > 0

    def one_round(state: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        _, waiting, result = state
        journey, waiting = next_journey(hop, parcels, waiting)
        return some_wait(waiting), waiting, one_more(result, journey)

    with jax.named_scope(OVERFLOW):
        return jax.lax.while_loop(lambda state: state[0], one_round, (some_wait(waiting), waiting, start))[2]


def _serve(setting: Setting, known: Known, journey: Journey, inputs: Inputs) -> Served:
    """What one round adds to each token."""
    (config, (hop, *further), exchange), (parcels, *_), (x, factors, own, turn) = setting, known, inputs
    projections = [join(*each) for each in zip(known.weights, own)]
    labels = jnp.concatenate([parcels.experts.astype(factors.dtype), factors], axis=1)
    outward = order_in(hop, parcels, journey)
    # Labels first: where rows go from here is found out while they travel.
    labels = keep(send(dispatch(labels, outward), journey, hop, hop.room.parcels, exchange))
    arrived = jnp.arange(hop.room.parcels) < jnp.sum(journey.sizes[:, hop.mine()])
    experts, factors = jnp.split(jnp.where(arrived[:, None], labels, 0), 2, axis=1)
    indices, tokens = experts.astype(jnp.int32) - 1, join(known.rows, x)
    arrive = partial(_send_rows, outward=outward, journey=journey, hop=hop, exchange=exchange)
    if further:
        onward = arrive(tokens), indices, factors
        outputs, turn = _hop(setting._replace(hops=tuple(further)), onward, projections, turn)
    else:
        outputs, turn = _serve_here(config, hop, arrive, (tokens, indices, factors), projections, turn)
    returned = send(outputs, journey.back(), hop, outward.slots.size, exchange)
    return combine(returned, outward, x.shape[0]), turn


def _send_rows(x: Operand, outward: Order, journey: Journey, hop: Hop, exchange: str) -> Operand:
    """Tokens to where they go in a round; in float8 as codes and scales (report 3.3.3), and only gradients as numbers."""
    quantized, place = part(x)
    if quantized is None:
        return keep(send(dispatch(place, outward), journey, hop, hop.room.parcels, exchange))
    arrived = keep(send(dispatch(to_bytes(quantized), outward), journey, hop, hop.room.parcels, exchange))
    place = send_back(dispatch(place, outward), journey, hop, hop.room.parcels, exchange)
    return Prepared(from_bytes(arrived, place.shape[1]), place)


def _serve_here(
    config: ModelConfig,
    hop: Hop,
    arrive: Callable[[Operand], Operand],
    tokens: Tokens,
    projections: Sequence[Operand],
    turn: Turn,
) -> Served:
    """What this device's experts make of the tokens of others, whose rows `arrive` brings; the rest of them is here."""
    (x, indices, factors), (*entering, down_proj), number = tokens, projections, hop.experts
    experts = indices.reshape(-1)
    order = jax.tree.map(keep, sort_slots(jnp.where(experts < 0, number, experts), number, hop.room.choices))
    group_sizes = jnp.sum(experts[:, None] == jnp.arange(number), axis=0, dtype=jnp.int32)

    def enter(x: Operand, turn: Turn, entering: Sequence[Operand]) -> tuple[list[jax.Array], Turn]:
        codes, place = part(arrive(x))
        place, turn = in_turn(place, turn)
        chosen = jax.tree.map(lambda each: dispatch(each, order), join(codes, place))
        return enter_experts(config, chosen, group_sizes, entering), turn

    if config.remat == "hidden":  # rows are sent again when there is the gradient that multiplies them, and no sooner
        enter = jax.checkpoint(enter, policy=policy(config.remat))
    entered, turn = enter(x, turn, entering)
    left = leave_experts(config, entered, dispatch(factors.reshape(-1, 1), order), group_sizes, down_proj)
    return in_turn(combine(left, order, hop.room.parcels), turn)

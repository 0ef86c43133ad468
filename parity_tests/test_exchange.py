"""Tokens that travel to the devices of their experts: every way of sending rows, and rounds until nothing waits."""

import dataclasses
import math
import re
from collections import Counter
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.config import ModelConfig, ParallelConfig, load_config
from deepseek_jax.model import expert_rounds
from deepseek_jax.model.dispatch import combine, gathered_sum, scattered_sum, sort_slots, sum_by_slot
from deepseek_jax.model.expert_rounds import serve_in_rounds
from deepseek_jax.model.experts import serve
from deepseek_jax.model.parcels import next_journey, pack
from deepseek_jax.model.products import policy
from deepseek_jax.parallel.exchange import Hop, Journey, Room, devices_of_a_token, hops_of, send, send_back
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.planning.collectives import collectives
from parity_tests.comparison import assert_close

DEVICES, ROWS, ROOM, WIDTH = 4, 10, 20, 3
SIZES = {
    "even": np.full((DEVICES, DEVICES), 2),
    "random": np.array([[1, 4, 0, 3], [2, 2, 5, 0], [0, 7, 1, 2], [3, 3, 3, 1]]),
    "none to the first two devices": np.array([[0, 0, 2, 5], [0, 0, 9, 1], [0, 0, 0, 0], [0, 0, 5, 5]]),
    "each device to itself": np.diag([10, 0, 3, 10]),
    "all to one": np.array([[0, 0, 0, 5]] * DEVICES),
}
CUT, WHOLE = PartitionSpec("expert"), PartitionSpec()


def across_devices(function, *specs):
    """`function` on each device's part of its arguments, compiled."""
    mesh = make_mesh(ParallelConfig(data=1, expert=DEVICES), jax.devices()[:DEVICES])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=CUT, check_vma=False))


@pytest.mark.parametrize("implementation", [
    "rounds",
    pytest.param("ragged", marks=pytest.mark.skipif(
        jax.default_backend() == "cpu", reason="XLA has no ragged all-to-all on CPU; test_tpu_compiles compiles it for TPUs")),
])  # fmt: skip
def test_rows_arrive_and_come_back(implementation, x64):
    """Where they arrive, what comes back, and gradients; a device's first row stays where there is another for everyone."""

    hop = Hop(DEVICES, 1, 4, 4, 4, ROWS, Room(ROOM, ROOM))

    def there_and_back(rows, sizes, starts):
        journey = Journey(sizes, starts, jnp.cumsum(sizes, axis=0) - sizes)
        here = send(rows, journey, hop, ROOM, implementation)
        return here, send(here * here, journey.back(), hop, ROWS, implementation)

    travel = across_devices(there_and_back, CUT, WHOLE, WHOLE)
    pull = jax.jit(lambda cotangent, rows, *journey: jax.vjp(lambda rows: travel(rows, *journey)[1], rows)[1](cotangent)[0])
    rows, cotangent = np.random.default_rng(0).standard_normal((2, DEVICES, ROWS, WIDTH))
    for sizes in SIZES.values():
        stay = np.minimum(1, ROWS - sizes.sum(axis=1, keepdims=True))
        starts = stay + np.cumsum(sizes, axis=1) - sizes
        here, back = travel(rows.reshape(-1, WIDTH), sizes, starts)
        for device, arrived in enumerate(np.split(np.asarray(here), DEVICES)):
            expected = [rows[sender, starts[sender, device] :][: sizes[sender, device]] for sender in range(DEVICES)]
            expected = np.concatenate(expected)
            np.testing.assert_array_equal(arrived[: len(expected)], expected)
        place = np.arange(ROWS)
        gone = ((stay <= place) & (place < stay + sizes.sum(axis=1, keepdims=True)))[..., None]
        np.testing.assert_array_equal(np.where(gone, back.reshape(rows.shape), 0), np.where(gone, rows**2, 0))
        gradient = pull(cotangent.reshape(-1, WIDTH), rows.reshape(-1, WIDTH), sizes, starts)
        of_gone = np.where(gone, gradient.reshape(rows.shape), 0)
        np.testing.assert_allclose(of_gone, np.where(gone, 2 * rows * cotangent, 0), rtol=1e-14)


def test_rows_that_stay_have_the_gradients_of_rows_that_travel(x64):
    hop = Hop(DEVICES, 1, 4, 4, 4, ROWS, Room(ROOM, ROOM))

    def gradient(of):
        def pulled(rows, there, sizes, starts):
            journey = Journey(sizes, starts, jnp.cumsum(sizes, axis=0) - sizes)
            arrived, pull = jax.vjp(lambda rows: of(rows, journey, hop, ROOM, "rounds"), rows)
            return arrived, *pull(there)

        return across_devices(pulled, CUT, CUT, WHOLE, WHOLE)

    rng = np.random.default_rng(0)
    rows, there = rng.standard_normal((DEVICES * ROWS, WIDTH)), rng.standard_normal((DEVICES * ROOM, WIDTH))
    sizes = SIZES["random"]
    starts = np.cumsum(sizes, axis=1) - sizes
    _, expected = gradient(send)(rows, there, sizes, starts)
    arrived, found = gradient(send_back)(rows, there, sizes, starts)
    np.testing.assert_array_equal(arrived, np.zeros_like(there))
    sent = np.arange(ROWS) < sizes.sum(axis=1)[:, None]
    np.testing.assert_array_equal(*(np.asarray(each).reshape(DEVICES, ROWS, WIDTH)[sent] for each in (found, expected)))


TOKENS = 8
"""Of each device."""
MODEL = dataclasses.replace(
    load_config("tiny").model, precision="float64", grouped_matmul="reference", hidden_size=16, moe_intermediate_size=8,
    n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
)  # fmt: skip
"""Each device has one group, so that a token goes to two devices at most."""


def in_groups(*groups):
    """Experts of tokens that choose among these groups, by turns: [DEVICES * TOKENS, 4]."""
    pairs = np.array([groups[i % len(groups)] for i in range(DEVICES * TOKENS)])
    return (4 * pairs[:, [0, 1, 0, 1]] + np.array([3, 0, 1, 2])).astype(np.int32)


def one_and_three():
    """More parcels of one choice for the first device than it has room for in a round."""
    other = 4 * (1 + np.arange(DEVICES * TOKENS) % 3)
    return np.stack([0 * other, other, other + 1, other + 2], axis=1).astype(np.int32)


def one_too_many():
    """Even but for a parcel of one choice, which alone has to wait."""
    indices = in_groups((0, 1), (2, 3))
    indices[-1], indices[-3] = (0, 12, 13, 14), (11, 12, 9, 8)
    return indices


def uneven_in_one_group():
    """The first and the third device send all to one, in as many rounds as it takes; the others evenly, in one."""
    even, uneven = in_groups((0, 1), (2, 3)), in_groups((2, 2))
    return np.where(np.arange(DEVICES * TOKENS)[:, None] // TOKENS % 2, even, uneven)


def random_routing():
    rng = np.random.default_rng(1)
    groups = np.argsort(rng.random((DEVICES * TOKENS, 4)))[:, :2]
    return np.stack([rng.permutation([*range(4 * a, 4 * a + 4), *range(4 * b, 4 * b + 4)])[:4] for a, b in groups]).astype(
        np.int32
    )


ROUTINGS = {
    "even": (in_groups((0, 1), (2, 3)), 1),
    "every second choice on one device": (in_groups((0, 1), (0, 2), (0, 3), (3, 0)), 2),
    "all on one device": (in_groups((2, 2)), 4),
    "each on one device": (in_groups((0, 0), (1, 1), (2, 2), (3, 3)), 1),
    "one choice on the first device, three on another": (one_and_three(), 2),
    "one too many": (one_too_many(), 2),
    "uneven in one group": (uneven_in_one_group(), 3),
    "random": (random_routing(), 2),
}
"""And how many rounds they take in room for an even share."""


@pytest.mark.parametrize(
    "remat, hops, parts",
    [
        ("none", 1, 1),
        pytest.param("products", 1, 1, marks=pytest.mark.slow),
        ("full", 1, 1),
        ("full", 2, 1),
        ("hidden", 1, 2),
        pytest.param("hidden", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_every_token_is_served(remat, hops, parts, x64, monkeypatch):
    """As on one device, gradients too, however many rounds it takes; what lies where no row arrived is not read.

    Neither as numbers, for some are NaN, nor as labels of experts, for some are 1.
    """
    rest, model = jnp.nan if remat == "none" else 1, dataclasses.replace(MODEL, remat=remat)
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, rest, dtype))
    parallel = ParallelConfig(data=1, expert=DEVICES, exchange_room=1, exchange_groups=hops, exchange_parts=parts)

    def served(indices, *inputs):
        def of(x, weights, *projections):
            return serve_in_rounds(model, parallel, (x, indices, weights), projections)

        return (of if remat == "none" else jax.checkpoint(of, policy=policy(remat)))(*inputs)

    def rounds(indices):
        (hop,) = hops_of(MODEL, dataclasses.replace(parallel, exchange_groups=1), TOKENS)
        parcels = pack(hop, indices)

        def one(state):
            return state[0] + 1, next_journey(hop, parcels, state[1])[1]

        return jax.lax.while_loop(lambda state: jnp.any(state[1] > 0), one, (0, parcels.loads))[0][None]

    def with_gradients(served):
        def both(cotangent, indices, *inputs):
            out, pull = jax.vjp(lambda *inputs: served(indices, *inputs), *inputs)
            return out, *pull(cotangent)

        return jax.jit(both)

    rng = np.random.default_rng(0)
    hidden, width, experts = MODEL.hidden_size, MODEL.moe_intermediate_size, MODEL.n_routed_experts
    shapes = [(experts, hidden, width), (experts, hidden, width), (experts, width, hidden)]
    x, cotangent = rng.standard_normal((2, DEVICES * TOKENS, hidden))
    inputs = x, rng.random((DEVICES * TOKENS, 4)), *map(rng.standard_normal, shapes)
    on_mesh, count = with_gradients(across_devices(served, *[CUT] * 6)), across_devices(rounds, CUT)
    on_mesh = on_mesh.lower(cotangent, ROUTINGS["even"][0], *inputs).compile()
    alone = with_gradients(lambda indices, x, weights, *projections: serve(MODEL, (x, indices, weights), projections))
    for name, (indices, turns) in ROUTINGS.items():
        assert count(indices).tolist() == [turns] * DEVICES, name
        results = (on_mesh(cotangent, indices, *inputs), alone(cotangent, indices, *inputs))
        assert_close(*(dict(zip(("out", "x", "weights", "gate", "up", "down"), result)) for result in results), 1e-12)
    assert (
        sent_by_group(on_mesh.as_text())
        == {
            1: {(0, 1, 2, 3): 2 * TOKENS // parts * hidden * 8 * 3 // 4},  # to two devices, where a quarter is already
            2: dict.fromkeys(((0, 2), (0, 1)), 2 * TOKENS // parts * hidden * 8 // 2),  # to two groups, to two devices
        }[hops]
    )


def test_experts_are_narrowed_once_and_not_in_every_round():
    model = dataclasses.replace(MODEL, precision="bfloat16")
    parallel = ParallelConfig(data=1, expert=DEVICES, exchange_room=1)
    hidden, width, experts = MODEL.hidden_size, MODEL.moe_intermediate_size, MODEL.n_routed_experts
    shapes = [(DEVICES * TOKENS, 4), (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)]
    x, *inputs = (jnp.zeros((DEVICES * TOKENS, hidden), jnp.bfloat16), *map(jnp.zeros, shapes))

    def served(indices, x, weights, *projections):
        return serve_in_rounds(model, parallel, (x, indices, weights), projections)

    program = str(jax.make_jaxpr(across_devices(served, *[CUT] * 6))(ROUTINGS["even"][0], x, *inputs))
    assert len(re.findall(rf"bf16\[{experts // DEVICES},\d+,\d+\] = convert_element_type", program)) == 3


@pytest.mark.parametrize("hops, gradients", [
    (1, False), pytest.param(1, True, marks=pytest.mark.slow), pytest.param(2, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_in_float8_rows_travel_as_codes_and_scales(hops, gradients, monkeypatch):
    """To the bit what rows that are quantised where they arrive give, gradients too, in every round; at half the bytes."""
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, 255 if dtype == jnp.uint8 else jnp.nan, dtype))
    model = dataclasses.replace(MODEL, precision="fp8", hidden_size=160, feed_forward="gelu")
    parallel = ParallelConfig(data=1, expert=DEVICES, exchange_room=1, exchange_groups=hops)
    rng = np.random.default_rng(0)
    x, cotangent = jnp.asarray(rng.standard_normal((2, DEVICES * TOKENS, 160)), jnp.bfloat16)
    shapes = [(DEVICES * TOKENS, 4), (16, 160, 8), (16, 8, 160)]
    inputs = x, *(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    def on_mesh():
        def served(indices, x, weights, *projections):
            return serve_in_rounds(model, parallel, (x, indices, weights), projections)

        def with_gradients(cotangent, indices, *inputs):
            out, pull = jax.vjp(lambda *inputs: across_devices(served, *[CUT] * 5)(indices, *inputs), *inputs)
            return (out, *pull(cotangent)) if gradients else out

        return jax.jit(with_gradients).lower(cotangent, ROUTINGS["even"][0], *inputs).compile()

    ahead = on_mesh()
    monkeypatch.setattr(expert_rounds, "prepared_rows", lambda config, x: x)
    where_they_arrive = on_mesh()
    for indices, _ in ROUTINGS.values():
        results = (program(cotangent, indices, *inputs) for program in (ahead, where_they_arrive))
        jax.tree.map(np.testing.assert_array_equal, *results)
    rows = 2 * TOKENS * hops  # to two devices, or to two groups and there to two devices; a part of them is there already
    stay = {1: rows // 4, 2: rows // 2}[hops]
    assert sent_forward(ahead.as_text()) == {(160 + 4 * 2, True): rows - stay, (160, False): rows - stay}
    assert sent_forward(where_they_arrive.as_text()) == {(160, False): 2 * (rows - stay)}


def sent_forward(text):
    """Rows that a device sends in a first round, not counting their labels, by width and whether these are bytes."""
    mesh = make_mesh(ParallelConfig(data=1, expert=DEVICES), jax.devices()[:DEVICES])
    sent = Counter()
    for one in collectives(text, mesh):
        (array,) = one.arrays[:1]
        if one.kind == "all-to-all" and not one.overflow and "transpose(" not in one.op_name and array.shape[-1] > 8:
            sent[array.shape[-1], array.dtype == "u8"] += one.sent // (array.bytes // math.prod(array.shape) * array.shape[-1])
    return dict(sent)


def sent_by_group(text):
    """Bytes of rows that a device sends at once in a first round, by who sends to whom; every time as many."""
    mesh = make_mesh(ParallelConfig(data=1, expert=DEVICES), jax.devices()[:DEVICES])
    found = [one for one in collectives(text, mesh) if one.kind == "all-to-all" and not one.overflow]
    rows = {(one.group, one.sent) for one in found if one.arrays[0].shape[-1] == MODEL.hidden_size}
    assert len(rows) == len({group for group, _ in rows})
    return dict(rows)


@pytest.mark.parametrize("form", [gathered_sum, sum_by_slot, scattered_sum])
def test_every_form_of_a_sum_over_slots(form, x64):
    """Two of five rows' three slots have no place, and one of the places no slot."""
    kinds = np.array([0, 2, 1, 2, 0, 2, 1, 1, 2, 2, 2, 2, 0, 1, 0])
    order, rows = sort_slots(jnp.asarray(kinds), 2, 10), jnp.asarray(np.random.default_rng(0).standard_normal((10, WIDTH)))
    chosen = np.argsort(kinds, stable=True)[: (kinds < 2).sum()]
    assert order.slots.tolist() == [*chosen, *[15] * (10 - len(chosen))]
    assert [order.places[slot] for slot in chosen] == [*range(len(chosen))] and (order.places == 10).sum() == 15 - len(chosen)
    expected = np.zeros((5, WIDTH))
    for slot, place in enumerate(order.places):
        if place < 10:
            expected[slot // 3] += rows[place]
    np.testing.assert_allclose(form(rows, order, 5), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("room, scatters", [(15, False), (10, True)])
def test_a_tpu_scatters_where_there_are_fewer_rows_than_slots(room, scatters):
    """Else every slot has a row to read."""
    order = sort_slots(jnp.asarray([0, 2, 1] * 5), 2, room)
    traced = jax.jit(partial(combine, count=5)).trace(jnp.ones((room, WIDTH)), order)
    assert ("stablehlo.scatter" in traced.lower(lowering_platforms=("tpu",)).as_text()) == scatters


def test_groups_of_one_are_one_hop():
    one, alike = (
        hops_of(MODEL, ParallelConfig(data=1, expert=DEVICES, exchange_groups=groups), TOKENS) for groups in (1, DEVICES)
    )
    assert one == alike


def test_devices_of_a_token():
    """Never fewer than a token can reach, and as many where groups and devices divide each other."""
    deepseek_v3 = ModelConfig()
    assert [devices_of_a_token(deepseek_v3, devices) for devices in (1, 2, 4, 8, 16, 32, 64)] == [1, 2, 4, 4, 8, 8, 8]
    for experts, groups, kept, choices, devices in [
        (12, 4, 1, 3, 3), (12, 4, 2, 3, 3), (12, 3, 1, 4, 4), (24, 3, 2, 8, 8), (24, 4, 1, 5, 12), (16, 1, 1, 5, 8),
        (8, 4, 2, 3, 8),
    ]:  # fmt: skip
        model = ModelConfig(n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=choices)
        by_group = np.arange(experts).reshape(groups, -1) // (experts // devices)
        reach = max(len(np.unique(by_group[list(some)])) for some in combinations(range(groups), kept))
        assert min(reach, choices) <= devices_of_a_token(model, devices) <= min(choices, devices)
        if groups % devices == 0 or devices % groups == 0:
            assert devices_of_a_token(model, devices) == min(reach, choices)

"""Rows that travel to the devices of their experts: every implementation passes the same tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.config import ParallelConfig
from deepseek_jax.parallel.exchange import plan_journey, send, send_back
from deepseek_jax.parallel.mesh import make_mesh

DEVICES, EXPERTS, ROWS, WIDTH = 4, 8, 10, 3
ROUTINGS = {
    "even": lambda rng: np.tile(np.arange(EXPERTS), (DEVICES, 2))[:, :ROWS],
    "random": lambda rng: rng.integers(0, EXPERTS, (DEVICES, ROWS)),
    "all to one expert": lambda rng: np.full((DEVICES, ROWS), 5),
    "none to the first two devices": lambda rng: rng.integers(4, EXPERTS, (DEVICES, ROWS)),
    "each device to itself": lambda rng: 2 * np.arange(DEVICES)[:, None] + rng.integers(0, 2, (DEVICES, ROWS)),
    "one to all others": lambda rng: np.where(np.arange(DEVICES)[:, None] == 1, rng.integers(0, EXPERTS, (DEVICES, ROWS)), 7),
}


@pytest.fixture(params=[
    "rounds",
    pytest.param("ragged", marks=pytest.mark.skipif(
        jax.default_backend() == "cpu", reason="XLA has no ragged all-to-all on CPU; test_tpu_compiles compiles it for TPUs")),
])  # fmt: skip
def travel(request):
    """Send every row to its expert, which multiplies it by its own number squared, and back."""

    def on_device(rows: jax.Array, experts: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        counts = jnp.bincount(experts, length=EXPERTS).astype(jnp.int32)
        journey = plan_journey(counts, ROWS)
        here = send(rows, journey, request.param)
        served = jnp.repeat(jnp.arange(EXPERTS // DEVICES), journey.group_sizes, total_repeat_length=here.shape[0])
        used = (jnp.arange(here.shape[0]) < journey.group_sizes.sum())[:, None]
        there = jnp.where(used, here * here * weights[served][:, None], jnp.nan)
        return send_back(there, journey, request.param), here, journey.group_sizes

    mesh = make_mesh(ParallelConfig(data=1, expert=DEVICES), jax.devices()[:DEVICES])
    cut = PartitionSpec("expert")
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_meet_their_expert_and_come_back(travel, routing, x64):
    """Values, where they were served, and gradients by rows and by the experts' numbers, against plain NumPy."""
    rng = np.random.default_rng(0)
    experts = np.sort(ROUTINGS[routing](rng), axis=1).reshape(-1)
    rows, weights = rng.standard_normal((DEVICES * ROWS, WIDTH)), rng.standard_normal(EXPERTS)
    back, here, sizes = travel(rows, experts, weights)
    np.testing.assert_allclose(back, rows**2 * weights[experts][:, None], rtol=1e-14)
    np.testing.assert_array_equal(sizes, np.bincount(experts, minlength=EXPERTS))
    by_device, own = np.split(np.asarray(here), DEVICES), EXPERTS // DEVICES
    for device, arrived in enumerate(by_device):
        expected = [rows[experts == expert] for expert in range(device * own, (device + 1) * own)]
        expected = np.concatenate(expected)  # by expert, then by sender
        np.testing.assert_array_equal(arrived[: len(expected)], expected)
        assert (arrived[len(expected) :] == 0).all()

    cotangent = rng.standard_normal(rows.shape)
    pull = jax.vjp(lambda rows, weights: travel(rows, experts, weights)[0], rows, weights)[1]
    by_rows, by_weights = pull(cotangent)
    np.testing.assert_allclose(by_rows, 2 * rows * weights[experts][:, None] * cotangent, rtol=1e-14)
    expected = np.zeros(EXPERTS)
    np.add.at(expected, experts, (cotangent * rows**2).sum(axis=1))
    np.testing.assert_allclose(by_weights, expected, rtol=1e-12, atol=1e-14)

"""Gradients of many experts' weights that are made, summed and put where they belong slab by slab."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.config import load_config
from deepseek_jax.model.grouped_matmul import grouped_matmul
from deepseek_jax.model.layer_loop import run_layers
from deepseek_jax.parallel import slabs
from deepseek_jax.parallel.mesh import resolve
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.parallel.weights import gather_layer
from deepseek_jax.precision.fp8_grouped_matmul import fp8_grouped_matmul

DEVICES, LAYERS, EXPERTS, HIDDEN, WIDTH = 8, 2, 16, 12, 8
SHAPES = {"gate_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}


def divided(params):
    config = load_config("tiny", ["parallel.data=1", f"parallel.fsdp={DEVICES}", f"train.batch_size={DEVICES}"])
    return config, Division(resolve(config, DEVICES), {"moe_layers": {"mlp": {"experts": params}}})


def product(precision, x, weight, sizes):
    if precision == "fp8":
        return fp8_grouped_matmul(x, weight, sizes, "triton")
    return grouped_matmul(x, [weight], sizes, "triton")[0]


def gradients(params, x, precision):
    """Of two layers whose experts eight devices share by `fsdp`, and the compiled program."""
    config, division = divided(params)
    sizes = jnp.full(EXPERTS, x.shape[1] // EXPERTS, jnp.int32)

    def layer(params, x):
        whole = gather_layer(division, config.model, ("moe_layers", "mlp", "experts"), params, stacked=True)
        entered = jnp.maximum(product(precision, x, whole["gate_proj"], sizes), 0)
        return product(precision, entered, whole["down_proj"], sizes), None

    def loss(params, x):
        types = jax.tree.map(lambda leaf: leaf.dtype, params)
        return jnp.sum(run_layers(layer, params, types, x[0])[0])

    cut = jax.tree.map(lambda _: PartitionSpec(None, "fsdp"), params)
    sharded = jax.shard_map(jax.grad(loss), mesh=division.mesh, in_specs=(cut, PartitionSpec("fsdp")), out_specs=cut,
                            check_vma=False)  # fmt: skip
    compiled = jax.jit(sharded).lower(params, x).compile()
    return compiled(params, x), compiled.as_text()


@pytest.mark.parametrize("precision", ["float32", pytest.param("fp8", marks=pytest.mark.slow)])
def test_no_gradient_is_ever_whole(precision, monkeypatch):
    """The same numbers to the bit, made and summed in slabs, and never put together."""
    rng = np.random.default_rng(0)
    params = {name: rng.integers(-2, 3, (LAYERS, EXPERTS, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    x = rng.integers(-2, 3, (DEVICES, 2 * EXPERTS, HIDDEN)).astype(np.float32)
    expected, whole = gradients(params, x, precision)
    monkeypatch.setattr(slabs, "MANY", 1)
    monkeypatch.setattr(slabs, "WIDTH", 3)
    found, program = gradients(params, x, precision)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(np.abs(leaf).max() > 1000 for leaf in jax.tree.leaves(found))
    own, narrowest = EXPERTS // DEVICES, WIDTH % 3
    assert summed_shapes(whole) == {(own, *shape) for shape in SHAPES.values()}
    assert summed_shapes(program) == {(own, *shape) for n in (3, narrowest) for shape in ((HIDDEN, n), (n, HIDDEN))}
    assert " concatenate(" not in program


def test_slabs_of_experts_that_are_themselves_cut(monkeypatch):
    """Three of them cannot be dealt to eight devices: each has rows of all, fewer than a slab is wide. `down_proj` is cut
    along the side of its slabs, and so has none."""
    monkeypatch.setattr(slabs, "MANY", 1)
    monkeypatch.setattr(slabs, "WIDTH", 3)
    shapes = {"gate_proj": (3, 16, WIDTH), "down_proj": (3, 16, 24)}
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    config, division = divided({name: leaf[None] for name, leaf in params.items()})
    rng = np.random.default_rng(0)
    factors = {name: rng.integers(-9, 10, (DEVICES, *shape)).astype(np.float32) for name, shape in shapes.items()}

    def loss(params, factors):
        whole = gather_layer(division, config.model, ("moe_layers", "mlp", "experts"), params, stacked=True)
        return sum(jnp.sum(whole[name] * factors[name][0]) for name in shapes)

    cut = {name: PartitionSpec(None, "fsdp") for name in shapes}
    found = jax.shard_map(jax.grad(loss), mesh=division.mesh, in_specs=(cut, PartitionSpec("fsdp")), out_specs=cut,
                          check_vma=False)(params, factors)  # fmt: skip
    for name in shapes:
        np.testing.assert_array_equal(found[name], factors[name].sum(axis=0))


@pytest.mark.parametrize("many, calls", [(28, [(3, 7), (1, 7)]), (29, [(4, 7)])])
def test_made_in_slabs_if_they_are_many(many, calls, monkeypatch):
    monkeypatch.setattr(slabs, "MANY", many)
    monkeypatch.setattr(slabs, "WIDTH", 3)
    x, dy, called = jnp.arange(20.0).reshape(5, 4), jnp.arange(35.0).reshape(5, 7), []

    def rows_by_rows(x, dy):
        called.append((x.shape[1], dy.shape[1]))
        return (x.T @ dy)[None]

    np.testing.assert_array_equal(slabs.make(rows_by_rows, x, dy, groups=1), (x.T @ dy)[None])
    assert called == calls


def summed_shapes(program):
    """Of what each device has of the sums over all of them."""
    found = re.findall(r"f32\[([\d,]+)\]\S* reduce-scatter\(", program)
    return {tuple(map(int, shape.split(","))) for shape in found}

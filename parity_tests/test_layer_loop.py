"""A loop over layers, whose gradients are written into memory that holds nothing yet."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.layer_loop import begin_sums, end_sums, run_chunk, run_layers
from deepseek_jax.model.products import PRODUCT, keep, policy
from deepseek_jax.parallel import slabs
from parity_tests.comparison import relative_difference

LAYERS, WIDTH = 3, 4
OF_A_WEIGHT = (1, WIDTH, WIDTH), (WIDTH, WIDTH)


@pytest.fixture(autouse=True)
def narrow_slabs(monkeypatch):
    """Of a weight's columns, so that the last slab is narrower than the first."""
    monkeypatch.setattr(slabs, "WIDTH", 3)


def layer(params, x, bias):
    y = jnp.tanh(keep(x @ params["weight"][0].astype(x.dtype)) + (params["norm"] * bias).astype(x.dtype))
    return x + y, jnp.sum(y)


def one_by_one(layer, params, types, x, *each):
    """The same without a loop."""
    outputs = []
    for number in range(LAYERS):
        x, output = layer(*jax.tree.map(lambda leaf, n=number: leaf[n], (params,)), x, *(leaf[number] for leaf in each))
        outputs.append(output)
    return x, jnp.stack(outputs)


def arrays(dtype):
    shapes = [(1, WIDTH, WIDTH), (WIDTH,), (1,)]
    weight, norm, bias = (np.random.default_rng(0).normal(size=(LAYERS, *shape)) for shape in shapes)
    return (
        {"weight": jnp.asarray(weight, dtype), "norm": jnp.asarray(norm, dtype)},
        jnp.ones((2, WIDTH), dtype),
        jnp.array(bias),
    )


def gradients(run, layer, params, types, x, bias):
    def loss(params, x):
        x, outputs = run(layer, params, types, x, bias)
        return jnp.sum(x**2) + jnp.sum(outputs)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)


@pytest.mark.parametrize("remat", ["none", "products", "full"])
def test_gradients_are_those_of_layers_one_by_one(remat, x64, monkeypatch):
    """In every place of memory that held no number before."""
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    params, x, bias = arrays(jnp.float64)
    types = jax.tree.map(lambda leaf: leaf.dtype, params)
    kept = layer if remat == "none" else jax.checkpoint(layer, policy=policy(remat))
    found, expected = (gradients(run, each, params, types, x, bias)
                       for run, each in ((run_layers, kept), (one_by_one, layer)))  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), found, expected)


def test_no_wider_than_a_layer_makes_them():
    """Gradients of narrowed weights come in the weights' own type, through memory of the narrow one, unchanged."""
    params, x, bias = arrays(jnp.float32)
    x, bias = x.astype(jnp.bfloat16), bias.astype(jnp.bfloat16)
    types = {"weight": jnp.dtype("bfloat16"), "norm": jnp.dtype("float32")}
    program = jax.make_jaxpr(lambda *a: gradients(run_layers, layer, *a[:1], types, *a[1:]))(params, x, bias)
    assert f"bf16[{LAYERS},1,{WIDTH},{WIDTH}] = dynamic_update_slice" in str(program)
    # Against layers one by one: a loop in the wide type may round elsewhere, on CPUs that multiply bfloat16 themselves.
    found, expected = (gradients(run, layer, params, types, x, bias) for run in (run_layers, one_by_one))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_weights_are_not_kept_twice():
    """What a layer reads of the stack is read there again, not from a stack of copies."""
    params, x, bias = arrays(jnp.float32)
    types = jax.tree.map(lambda leaf: leaf.dtype, params)
    kept = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT))
    program = jax.make_jaxpr(lambda params, x: jax.vjp(lambda *a: run_layers(kept, a[0], types, a[1], bias)[0], params, x)[0])(
        params, x
    )
    kept = stacked(program)
    assert (LAYERS, 2, WIDTH) in kept and not kept & {(LAYERS, *shape) for shape in OF_A_WEIGHT}


def stacked(program):
    """Shapes of what loops return from all of their passes."""
    loops = [equation for equation in program.jaxpr.eqns if equation.primitive.name == "scan"]
    pairs = [pair for loop in loops for pair in zip(loop.outvars, loop.params["jaxpr"].out_avals)]
    return {out.aval.shape for out, of_a_pass in pairs if out.aval.shape != of_a_pass.shape}


def in_chunks(again, params, x, bias, order=(1, 0, 1, 1)):
    """Layers of two chunks, visited in an order, as a pipeline's stage does; and their own numbers."""
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def tick(state, chunk):
        x, sums, output = run_chunk(layer, again, params, state[1], chunk, state[0], bias)
        return (x, sums), output

    (x, sums), outputs = jax.lax.scan(tick, (x, begin_sums(params, bias.dtype)), jnp.array(order))
    return end_sums(x, sums), outputs


@pytest.mark.parametrize("remat", ["none", "products", "full"])
def test_gradients_of_chunks_add_up(remat, x64):
    """Over all ticks that come by, in float64; and with rematerialisation no tick keeps weights."""
    params, x, bias = arrays(jnp.float64)

    def again(layer):
        return layer if remat == "none" else jax.checkpoint(layer, policy=policy(remat))

    def plainly(params, x, bias, order=(1, 0, 1, 1)):
        outputs = []
        for chunk in order:
            x, output = one_by_one(layer, jax.tree.map(lambda leaf, chunk=chunk: (1 + chunk) * leaf, params), None, x, bias)
            outputs.append(output)
        return x, jnp.stack(outputs)

    def loss(run, *args):
        x, outputs = run(*args, bias)
        return jnp.sum(x**2) + jnp.sum(outputs)

    found, expected = (jax.grad(partial(loss, run), argnums=(0, 1))(params, x) for run in (partial(in_chunks, again), plainly))
    # By the largest, for entries are sums of larger terms of both signs: one of -1.03 in an array up to 200 is off by 2e-13.
    apart = jax.tree.map(relative_difference, found, expected)
    assert max(jax.tree.leaves(apart)) <= 1e-14, apart
    program = jax.make_jaxpr(lambda params, x: jax.vjp(lambda *a: in_chunks(again, *a, bias), params, x)[0])(params, x)
    kept = stacked(program)
    assert (4, LAYERS, 2, WIDTH) in kept
    assert bool(kept & {(4, LAYERS, *shape) for shape in OF_A_WEIGHT}) == (remat == "none")

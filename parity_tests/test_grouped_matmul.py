"""Every implementation of `grouped_matmul` gives the product and gradients that are written out here in numpy."""

from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import megablox
from deepseek_jax.model.grouped_matmul import grouped_matmul

SUPPORTED = [
    *((name, dtype) for name in ("reference", "blocked") for dtype in ("float64", "float32", "bfloat16")),
    ("megablox", "bfloat16"),
    ("triton", "float32"),
    ("triton", "bfloat16"),
    pytest.param("megablox", "float32", marks=pytest.mark.slow),
]
ROWS, WIDTH_IN, WIDTH_OUT = 700, 130, 33
GROUPS = {
    "random": [171, 135, 159, 235],
    "an expert with none": [64, 0, 636, 0],
    "an expert with all": [0, 700, 0, 0],
    "the last expert with all": [0, 0, 0, 700],
    "rows left over": [513, 1, 7, 9],
    "a short last group": [320, 376, 1, 3],
    "no rows": [0, 0, 0, 0],
}


@contextmanager
def settings(implementation, dtype):
    """float64 where it is asked for, and the TPU's kernel emulated in tiles of 128, of which several make an array."""
    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype == "float64"))
        if implementation == "megablox":
            stack.enter_context(pltpu.force_tpu_interpret_mode())
            stack.enter_context(mock.patch.object(megablox, "FEWER_ROWS", 128))
            stack.enter_context(mock.patch.object(megablox, "WIDEST_BYTES", 128 * jnp.dtype(dtype).itemsize))
        yield


@partial(jax.jit, static_argnums=4)
def product_and_gradients(x, weight, gradient, group_sizes, implementation):
    y, pull_back = jax.vjp(lambda x, weight: grouped_matmul(x, [weight], group_sizes, implementation)[0], x, weight)
    return y, *pull_back(gradient)


def arrays(rows, group_sizes, dtype, seed=0):
    """x, weight and y's gradient; NaN in rows of no group, that whoever reads them is found out."""
    rng = np.random.default_rng(seed)
    shapes = (rows, WIDTH_IN), (len(group_sizes), WIDTH_IN, WIDTH_OUT), (rows, WIDTH_OUT)
    x, weight, gradient = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    used = sum(group_sizes)
    return x.at[used:].set(jnp.nan), weight, gradient.at[used:].set(jnp.nan)


def expected(x, weight, gradient, group_sizes):
    """The product, its gradients, and for each the sum of magnitudes that rounding errors are relative to."""
    x, weight, gradient = (np.asarray(array, np.float64) for array in (x, weight, gradient))
    results = [np.zeros_like(gradient), np.zeros_like(x), np.zeros_like(weight)]
    sums = [np.zeros_like(result) for result in results]
    ends = np.cumsum(group_sizes)
    for group, (start, end) in enumerate(zip(ends - group_sizes, ends)):
        rows = slice(start, end)
        for out, of in ((results, lambda a: a), (sums, np.abs)):
            a, w, g = of(x[rows]), of(weight[group]), of(gradient[rows])
            out[0][rows], out[1][rows], out[2][group] = a @ w, g @ w.T, a.T @ g
    return results, sums


def check(actual, arguments, group_sizes):
    """A sum of n products errs by at most (n + 1) u times the sum of their magnitudes, here and in `expected`.

    u is 2^-24, or 2^-53 in float64; a bfloat16 result is then rounded once more.
    """
    results, sums = expected(*arguments, group_sizes)
    terms = WIDTH_IN, WIDTH_OUT, max(group_sizes)
    for value, result, total, n in zip(actual, results, sums, terms, strict=True):
        assert value.dtype == arguments[0].dtype and value.shape == result.shape
        unit = 2.0**-53 if value.dtype == jnp.float64 else 2.0**-24
        bound = 2 * (n + 1) * unit * total + (2.0**-8 * np.abs(result) if value.dtype == jnp.bfloat16 else 0)
        error = np.abs(np.asarray(value, np.float64) - result)
        assert (error <= bound).all(), f"largest error {np.nanmax(error)}, {(~(error <= bound)).sum()} beyond the bound"
        if value.dtype == jnp.float64:
            assert error.max(initial=0) <= 1e-12 * np.abs(result).max(initial=1e-300)


@pytest.mark.parametrize("implementation, dtype", SUPPORTED)
def test_product_and_gradients(implementation, dtype):
    with settings(implementation, dtype):
        for name, group_sizes in GROUPS.items():
            arguments = arrays(ROWS, group_sizes, dtype)
            actual = product_and_gradients(*arguments, jnp.array(group_sizes, jnp.int32), implementation)
            try:
                check(actual, arguments, group_sizes)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(
    "implementation, dtype, rows, group_sizes",
    [("reference", "float64", ROWS, [513, 0, 130, 40]), ("blocked", "float64", ROWS, [513, 0, 130, 40]),
     ("triton", "float32", ROWS, [513, 0, 130, 40]),
     pytest.param("megablox", "float32", ROWS, [513, 0, 130, 40], marks=pytest.mark.slow),
     pytest.param("megablox", "float32", 200, [113, 0, 30, 40], marks=pytest.mark.slow)],
)  # fmt: skip
def test_two_weights(implementation, dtype, rows, group_sizes):
    """Two weights, one wider, read the same rows: two products, two gradients, and the sum of what either gives x."""
    with settings(implementation, dtype):
        x, *first = arrays(rows, group_sizes, dtype)
        _, *second = (array[..., :20] for array in arrays(rows, group_sizes, dtype, seed=1))
        sizes = jnp.array(group_sizes, jnp.int32)
        (y1, dx1, dw1), (y2, dx2, dw2) = (product_and_gradients(x, *each, sizes, implementation) for each in (first, second))
        y, pull_back = jax.vjp(
            lambda x, *weights: grouped_matmul(x, [*weights], sizes, implementation), x, first[0], second[0]
        )
        actual = *y, *pull_back([first[1], second[1]])
        for a, b in zip(actual, (y1, y2, dx1 + dx2, dw1, dw2), strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=(1e-14 if dtype == "float64" else 1e-6) * np.abs(b).max())


@pytest.mark.parametrize("rows, group_sizes", [(1, [0, 1, 0]), (1, [0, 0]), (7, [3, 4]), (32, [2] * 16)])
@pytest.mark.parametrize("implementation, dtype", [("reference", "float64"), ("blocked", "float64")])
def test_few_rows(implementation, dtype, rows, group_sizes):
    with settings(implementation, dtype):
        arguments = arrays(rows, group_sizes, dtype)
        actual = product_and_gradients(*arguments, jnp.array(group_sizes, jnp.int32), implementation)
        check(actual, arguments, group_sizes)


@pytest.mark.parametrize("implementation, group_sizes", [("megablox", [0, 1]), ("triton", [0, 1]), ("triton", [2] * 16)])
def test_few_rows_of_kernels(implementation, group_sizes):
    with settings(implementation, "float32"):
        arguments = arrays(sum(group_sizes), group_sizes, "float32")
        actual = product_and_gradients(*arguments, jnp.array(group_sizes, jnp.int32), implementation)
        check(actual, arguments, group_sizes)


@pytest.mark.parametrize("seed", range(5))
def test_random_groups(seed):
    rng = np.random.default_rng(seed)
    group_sizes = rng.multinomial(rng.integers(ROWS + 1), rng.dirichlet(np.full(4, 0.5))).tolist()
    with settings("blocked", "float64"):
        arguments = arrays(ROWS, group_sizes, "float64", seed)
        check(product_and_gradients(*arguments, jnp.array(group_sizes, jnp.int32), "blocked"), arguments, group_sizes)


def test_the_check_finds_small_and_misplaced_errors():
    with settings("blocked", "float64"):
        group_sizes = [9, 0, 20, 3]
        arguments = arrays(32, group_sizes, "float64")
        right = product_and_gradients(*arguments, jnp.array(group_sizes, jnp.int32), "blocked")
        check(right, arguments, group_sizes)
        for i in range(3):
            wrong = [y.at[(0,) * y.ndim].mul(1 + 1e-10) if i == j else y for j, y in enumerate(right)]
            with pytest.raises(AssertionError, match="beyond the bound"):
                check(wrong, arguments, group_sizes)
        with pytest.raises(AssertionError, match="beyond the bound"):
            check(right, arguments, [8, 0, 21, 3])


@pytest.mark.parametrize("implementation", ["auto", "blocked", "reference"])
def test_inside_scan_and_checkpoint(implementation):
    """Rematerialised layers under `scan`, as the model has them."""
    with settings(implementation, "float64"):
        rng = np.random.default_rng(0)
        group_sizes = jnp.array([5, 0, 14], jnp.int32)
        x, weights = jnp.array(rng.standard_normal((20, 6))), jnp.array(rng.standard_normal((2, 3, 6, 6)))

        def loss(x, weights, multiply):
            layer = jax.checkpoint(lambda x, weight: (jnp.tanh(multiply(x, weight)), None))
            return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)

        def plain(x, weight):
            return x.at[:5].set(x[:5] @ weight[0]).at[5:19].set(x[5:19] @ weight[2]).at[19:].set(0)

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
        actual = gradient(x, weights, lambda x, weight: grouped_matmul(x, [weight], group_sizes, implementation)[0])
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(gradient(x, weights, plain)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_inside_shard_map(implementation):
    """Rows divided over a mesh, weights the same everywhere: their gradient is the sum over the mesh."""
    devices = min(2, jax.device_count())
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    with settings(implementation, "float64"):
        group_sizes = [4, 0, 9]
        x, weight, gradient = arrays(devices * 13, group_sizes * devices, "float64")
        weight = weight[:3]
        rows, alike = PartitionSpec("data"), PartitionSpec()
        sharded = jax.shard_map(
            lambda x, weight: grouped_matmul(x, [weight], jnp.array(group_sizes, jnp.int32), implementation)[0],
            mesh=mesh, in_specs=(rows, alike), out_specs=rows,
        )  # fmt: skip
        y, pull_back = jax.vjp(jax.jit(sharded), x, weight)
        dx, dweight = pull_back(gradient)
        every = jnp.tile(weight, (devices, 1, 1))
        (y_right, dx_right, dweight_right), _ = expected(x, every, gradient, group_sizes * devices)
        dweight_right = dweight_right.reshape(devices, *weight.shape).sum(axis=0)
        for a, b in ((y, y_right), (dx, dx_right), (dweight, dweight_right)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_megablox_compiles_for_tpu(topology, dtype):
    """Forward and gradients, for the model's sizes and for some that no tile divides."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    place = jax.sharding.SingleDeviceSharding(chip)
    for rows, experts, width_in, width_out in [(4096, 2, 7168, 2048), (1000, 5, 200, 72)]:
        shapes = (rows, width_in), (experts, width_in, width_out), (rows, width_out)
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
        sizes = jax.ShapeDtypeStruct((experts,), "int32", sharding=place)
        text = product_and_gradients.lower(*arguments, sizes, "megablox").compile().as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize(
    "rows, experts, widths, dtype, expected",
    [(40960, 32, (7168, 2048), "bfloat16", (512, 1024, 1024)), (32768, 256, (7168, 2048), "bfloat16", (256, 1024, 1024)),
     (32768, 4, (2048, 7168), "float32", (512, 512, 512)), (700, 4, (130, 33), "float32", (256, 130, 33)),
     (1, 2, (1536, 1300), "bfloat16", (128, 768, 768))],
)  # fmt: skip
def test_megablox_tiles_follow_from_the_shapes(rows, experts, widths, dtype, expected):
    assert megablox.tiles(rows, experts, *widths, dtype) == expected


def test_unusable_choices_are_named():
    x, weight, group_sizes = jnp.ones((2, 3)), jnp.ones((1, 3, 4)), jnp.array([2], jnp.int32)
    with pytest.raises(
        UserError, match="grouped_matmul=dense: choose one of auto, reference, blocked, megablox, triton, mosaic"
    ):
        grouped_matmul(x, [weight], group_sizes, "dense")
    for name in ("megablox", "triton"):
        with jax.enable_x64(True), pytest.raises(UserError, match=f"{name}: has no float64"):
            grouped_matmul(x.astype("float64"), [weight.astype("float64")], group_sizes, name)

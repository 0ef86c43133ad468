"""FP8 (report 3.3): the products against float64, and what is kept for the backward pass."""

import functools
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from deepseek_jax.config import load_config
from deepseek_jax.model.products import products
from deepseek_jax.precision import fp8
from deepseek_jax.precision.fp8_grouped_matmul import fp8_grouped_matmul
from deepseek_jax.precision.fp8_matmul import IMPLEMENTATIONS, fp8_matmul, multiply_blocks, quantize_gradient
from deepseek_jax.precision.fp8_operands import Quantized, prepare_rows, prepare_weight
from deepseek_torch.model.products import products as torch_products
from deepseek_torch.precision.fp8_grouped_matmul import fp8_grouped_matmul as torch_grouped_matmul
from deepseek_torch.precision.fp8_matmul import fp8_matmul as torch_matmul

jax_tiles = jax.jit(fp8.quantize_tiles, static_argnames="axis")
jax_blocks = jax.jit(fp8.quantize_blocks)


NAMES = (*IMPLEMENTATIONS, "triton")
DENSE = {name: functools.partial(fp8_matmul, implementation=name) for name in NAMES}
GROUPED = {name: functools.partial(fp8_grouped_matmul, implementation=name) for name in NAMES}


def wide(codes, scales, axis: int) -> np.ndarray:
    """Dequantised in float64."""
    scales = np.asarray(scales, np.float64)
    codes = np.asarray(codes).astype(np.float64)
    return codes * np.repeat(scales, 128, axis).take(range(codes.shape[axis]), axis)


def truth(x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The fp8 product and its gradients, multiplied in float64."""
    codes, scales = jax_blocks(w)
    w_wide = wide(codes, np.repeat(np.asarray(scales), 128, 1)[:, : w.shape[1]], 0)
    x_tiles = jax_tiles(x, axis=1)
    x_again = wide(*jax_tiles(fp8.dequantize_tiles(*x_tiles, axis=1), axis=0), 0)
    along_features, along_tokens = (wide(*quantize_gradient(dy, axis), axis) for axis in (1, 0))
    return wide(*x_tiles, 1) @ w_wide, along_features @ w_wide.T, x_again.T @ along_tokens


def assert_close(actual, expected, tolerance: float = 1e-6) -> None:
    """Norm of the difference against the norm of what is expected."""
    for mine, other in zip(actual, expected, strict=True):
        mine, other = np.asarray(mine, np.float64), np.asarray(other, np.float64)
        assert mine.shape == other.shape
        assert np.linalg.norm(mine - other) <= tolerance * np.linalg.norm(other)


def problem(rows: int, k: int, m: int, experts: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [rows, k], w [k, m] or [experts, k, m], dy [rows, m]; magnitudes vary over rows and columns."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) * np.exp(rng.standard_normal((rows, 1)))
    w = rng.standard_normal((experts, k, m) if experts else (k, m)) * 0.02
    dy = rng.standard_normal((rows, m)) * 1e-6 * np.exp(rng.standard_normal(m))
    return x.astype(np.float32), w.astype(np.float32), dy.astype(np.float32)


@functools.cache
def compiled_vjp(product):
    def all_three(x, w, dy, *rest):
        y, vjp = jax.vjp(lambda x, w: product(x, w, *rest), x, w)
        return y, *vjp(dy)

    return jax.jit(all_three)


def jax_vjp(product, x, w, dy, *rest):
    """Output and gradients, compiled once a product and shape."""
    return compiled_vjp(product)(x, w, dy, *rest)


def torch_vjp(product, x, w, dy):
    x, w = (torch.tensor(each, requires_grad=True) for each in (x, w))
    y = product(x, w)
    y.backward(torch.from_numpy(dy))
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("rows, k, m", [(300, 515, 130), (1, 300, 5)])
def test_matmul_and_gradients(rows, k, m):
    """Both forms and the sibling within 1e-6 of the truth, and of one another."""
    x, w, dy = problem(rows, k, m)
    results = [truth(x, w, dy), torch_vjp(torch_matmul, x, w, dy)]
    results += [jax_vjp(product, x, w, dy) for product in DENSE.values()]
    for one, other in itertools.combinations(results, 2):
        assert_close(one, other)


@pytest.mark.parametrize("sizes", [(0, 130, 0, 90), (0, 0, 257, 0), (128, 1, 127, 1)])
def test_grouped_matmul_is_one_matmul_an_expert(sizes):
    """Experts without rows, one with all, edges off 128; rows past the last group may hold anything."""
    x, w, dy = problem(257, 140, 150, experts=4)
    used = sum(sizes)
    x[used:], dy[used:] = np.nan, np.nan
    expected = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    first = 0
    for e, size in enumerate(sizes):
        mine = slice(first, first + size)
        if size:
            expected[0][mine], expected[1][mine], expected[2][e] = truth(x[mine], w[e], dy[mine])
        first += size
    assert_close(torch_vjp(lambda x, w: torch_grouped_matmul(x, w, sizes), x, w, dy), expected)
    for product in GROUPED.values():
        assert_close(jax_vjp(product, x, w, dy, np.array(sizes, np.int32)), expected)


def test_without_rows_everything_is_zero():
    x, w, dy = problem(257, 140, 150, experts=4)
    for product in GROUPED.values():
        assert not any(map(np.any, jax_vjp(product, x, w, dy, np.zeros(4, np.int32))))
    for result in torch_vjp(lambda x, w: torch_grouped_matmul(x, w, [0] * 4), x, w, dy):
        assert not result.any()


@pytest.mark.parametrize("product", [DENSE["dot_general"], DENSE["triton"]], ids=["dot_general", "triton"])
def test_one_input_of_two_weights(product):
    """As two products, but for the sum of the input's two gradients."""
    x, w, dy = problem(130, 140, 150)
    weights, gradients = (w, 2 * w[:, :50]), (dy, dy[:, :50].copy())
    outputs, dx, dw = jax_vjp(product, x, weights, gradients)
    apart = [torch_vjp(torch_matmul, x, *each) for each in zip(weights, gradients)]
    for i, (y, _, one_dw) in enumerate(apart):
        assert_close([outputs[i], dw[i]], [y, one_dw])
    assert_close([dx], [apart[0][1] + apart[1][1]])

    leaf = torch.tensor(x, requires_grad=True)
    theirs = torch_matmul(leaf, tuple(map(torch.from_numpy, weights)))
    torch.autograd.backward(theirs, tuple(map(torch.from_numpy, gradients)))
    assert_close([*outputs, dx], [*(y.detach() for y in theirs), leaf.grad])


@pytest.mark.parametrize("product", [GROUPED["dot_general"], GROUPED["triton"]], ids=["dot_general", "triton"])
def test_grouped_matmul_of_two_weights(product):
    x, w, dy = problem(130, 140, 30, experts=3)
    sizes, weights = np.array([20, 0, 110], np.int32), (w, 2 * w[..., ::-1])
    outputs, dx, dw = jax_vjp(product, x, weights, (dy, dy), sizes)
    leaf, *leaves = (torch.tensor(each.copy(), requires_grad=True) for each in (x, *weights))
    theirs = torch_grouped_matmul(leaf, tuple(leaves), sizes)
    torch.autograd.backward(theirs, (torch.from_numpy(dy),) * 2)
    assert_close([*outputs, dx, *dw], [*(y.detach() for y in theirs), leaf.grad, *(each.grad for each in leaves)])


def test_types_and_leading_axes():
    x, w, dy = problem(24, 140, 150)
    x, dy = (jnp.asarray(each, jnp.bfloat16).reshape(2, 3, 4, -1) for each in (x, dy))
    y, dx, dw = jax_vjp(fp8_matmul, x, w, dy)
    np.testing.assert_array_equal(jax.jit(fp8_matmul)(x, w), y)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert y.shape == dy.shape and dx.shape == x.shape
    leaf = torch.tensor(np.asarray(x, np.float32)).bfloat16().requires_grad_()
    weight = torch.tensor(w, requires_grad=True)
    theirs = torch_matmul(leaf, weight)
    theirs.backward(torch.tensor(np.asarray(dy, np.float32)).bfloat16())
    assert (theirs.dtype, leaf.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert_close([dw], [weight.grad])
    # float32 sums a hair apart may round to neighbouring bfloat16.
    assert_close([y, dx], [theirs.detach().float(), leaf.grad.float()], 2**-9)


def test_in_the_model_gradients_of_weights_come_in_the_type_of_activations():
    """As those of bfloat16's products, in both siblings; what stores them may then be narrow."""
    config = load_config("tiny", ["model.precision=fp8"]).model
    x, w, dy = problem(24, 140, 150)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    (dw,) = jax.vjp(lambda w: products(config, x, w), w)[1]([dy])
    weight = torch.tensor(w.T.copy(), requires_grad=True)
    (theirs,) = torch_products(config, torch.tensor(np.asarray(x, np.float32)).bfloat16(), weight)
    theirs.backward(torch.tensor(np.asarray(dy, np.float32)).bfloat16())
    for each in (dw, weight.grad):
        np.testing.assert_array_equal(each, jnp.asarray(each).astype(jnp.bfloat16).astype(jnp.float32))
    assert_close([dw], [weight.grad.T], 2**-9)  # float32 sums a hair apart may round to neighbours


@pytest.mark.parametrize("name", NAMES)
def test_kernels_quantise_for_kernels(name):
    """They give the same bits, so that only the program tells."""
    x, w, _ = problem(24, 140, 150, experts=2)
    for operand, prepare in ((x, prepare_rows), (w, partial(prepare_weight, dtype=jnp.dtype("float32")))):
        text = str(jax.make_jaxpr(partial(prepare, implementation=name))(operand))
        assert ("pallas_call" in text) == (name == "triton")


def test_under_x64(x64):
    x, w, dy = problem(130, 140, 150, experts=3)
    sizes = np.array([100, 0, 30], np.int32)
    ours = jax_vjp(fp8_grouped_matmul, x, w, dy, sizes)
    np.testing.assert_array_equal(jax.jit(fp8_grouped_matmul)(x, w, sizes), ours[0])
    assert {each.dtype for each in ours} == {np.dtype("float32")}
    assert_close(ours, torch_vjp(lambda x, w: torch_grouped_matmul(x, w, sizes), x, w, dy))


def test_small_gradients_keep_their_digits():
    """Scaling the loss by a power of two scales the gradients by exactly that."""
    x, w, dy = problem(130, 140, 150)
    factor = np.float32(2.0**-40)
    for run, product in ((jax_vjp, DENSE["dot_general"]), (torch_vjp, torch_matmul)):
        _, dx, dw = run(product, x, w, dy)
        _, small_dx, small_dw = run(product, x, w, dy * factor)
        assert_close([small_dx, small_dw], [np.asarray(dx) * factor, np.asarray(dw) * factor], 0)


def test_nan_and_infinity_reach_the_output():
    x, w, dy = problem(130, 140, 150)
    x[3, 5], x[7, 139] = np.nan, np.inf
    for product in DENSE.values():
        y, _, dw = jax_vjp(product, x, w, dy)
        assert np.isnan(y[3]).all() and np.isnan(y[7]).all() and np.isfinite(np.delete(y, (3, 7), 0)).all()
        assert np.isnan(dw[5]).all() and np.isnan(dw[139]).all()


def largest_float32(compiled: str) -> int:
    """Entries of the largest float32 array in a compiled program."""
    shapes = re.findall(r"\bf32\[([\d,]+)\]", compiled)
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


def all_blocks_at_once(x: Quantized, w: Quantized) -> jax.Array:
    """The batched form that `multiply_blocks` must not become: a product for every 128 along K, then their sum."""
    codes = x.codes.reshape(x.codes.shape[0], -1, 128), w.codes.reshape(-1, 128, w.codes.shape[1])
    products = jnp.einsum("nkc,kcm->knm", *codes, preferred_element_type=jnp.float32)
    return jnp.sum(products * x.scales.T[:, :, None] * jnp.repeat(w.scales, 128, 1)[:, None], 0)


def test_partial_products_never_exist_together():
    rows, k, m = 256, 1024, 256
    x, w, dy = problem(rows, k, m)
    partial_products = k // 128 * rows * m
    operands = Quantized(*jax_tiles(x, axis=1)), Quantized(*jax_blocks(w))
    batched = jax.jit(all_blocks_at_once).lower(*operands).compile()
    looped = jax.jit(multiply_blocks, static_argnums=2).lower(*operands, (1, 0)).compile()
    assert_close([looped(*operands)], [batched(*operands)])
    assert largest_float32(batched.as_text()) == partial_products
    assert largest_float32(looped.as_text()) < partial_products
    step = compiled_vjp(DENSE["dot_general"]).lower(x, w, dy).compile()
    assert largest_float32(step.as_text()) < partial_products
    sizes = np.array([rows], np.int32)
    step = compiled_vjp(GROUPED["dot_general"]).lower(x, w[None], dy, sizes).compile()
    assert largest_float32(step.as_text()) < partial_products


def test_kept_for_the_backward_pass_is_fp8():
    x, w, _ = problem(512, 256, 384)
    x = jnp.asarray(x, jnp.bfloat16)

    def kept_bytes(product) -> tuple[int, list]:
        kept = jax.jit(lambda x, w: jax.vjp(product, x, w)[1])
        sizes = [leaf for leaf in jax.tree.leaves(jax.eval_shape(kept, x, w)) if leaf.size > 0]
        return kept.lower(x, w).compile().memory_analysis().output_size_in_bytes, sizes

    in_bf16, _ = kept_bytes(lambda x, w: x @ w.astype(jnp.bfloat16))
    in_fp8, leaves = kept_bytes(fp8_matmul)
    both, _ = kept_bytes(lambda x, w: fp8_matmul(x, (w, 2 * w)))
    assert sorted(leaf.dtype.name for leaf in leaves) == ["float32", "float32", "float8_e4m3fn", "float8_e4m3fn"]
    pointers = 1024
    assert in_bf16 >= 2 * (x.size + w.size)
    assert in_fp8 <= (1 + 4 / 128) * x.size + (1 + 4 / 128**2) * w.size + pointers
    assert both - in_fp8 <= 1.01 * w.size + pointers


def median_error(approximate: np.ndarray, exact: np.ndarray) -> float:
    """Typical relative error of a row."""
    return float(np.median(np.linalg.norm(approximate - exact, axis=1) / np.linalg.norm(exact, axis=1)))


def test_blocks_for_gradients_lose_what_tiles_keep():
    """The report's negative control: dy in 128 x 128 blocks, with outlier tokens for dx and outlier channels for dw."""
    x, w, _ = problem(512, 256, 256)
    dy = np.random.default_rng(1).standard_normal((512, 256)).astype(np.float32)
    tokens, channels = dy.copy(), dy.copy()
    tokens[::32] *= 1e5
    channels[:, ::32] *= 1e5

    def in_blocks(dy):
        return np.asarray(fp8.dequantize_blocks(*jax_blocks(dy)), np.float64)

    def in_tiles(dy, axis):
        return wide(*quantize_gradient(dy, axis), axis)

    x, w = x.astype(np.float64), w.astype(np.float64)
    dx_tiles, dx_blocks = (median_error(each @ w.T, tokens @ w.T) for each in (in_tiles(tokens, 1), in_blocks(tokens)))
    dw_tiles, dw_blocks = (median_error(each.T @ x, channels.T @ x) for each in (in_tiles(channels, 0), in_blocks(channels)))
    assert dx_tiles < 0.03 and dw_tiles < 0.03
    assert dx_blocks > 5 * dx_tiles and dw_blocks > 5 * dw_tiles


def test_a_scale_for_each_tile_beats_one_for_the_tensor():
    x, _, _ = problem(256, 512, 128)
    x[:, 7] *= 1e5
    scale = np.abs(x).max() / np.float32(448)
    per_tensor = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    per_tile = wide(*jax_tiles(x, axis=1), 1)
    clean = np.s_[:, 128:]
    assert median_error(per_tile[clean], x[clean]) < 0.03
    assert median_error(per_tensor[clean], x[clean]) > 5 * median_error(per_tile[clean], x[clean])

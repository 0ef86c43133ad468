"""The linear map whose three products run on float8 operands (report 3.3).

The backward pass keeps only codes and scales. As in the report's workflow (3.5.2), the weight gradient
dequantises the stored 1 x 128 tiles of x and quantises them again along tokens; dy, which is at hand in full
precision, is quantised along both axes. In blocks of 128 x 128 it would lose the tokens beside an outlier.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.precision import fp8_kernels
from deepseek_jax.precision.fp8 import (
    SMALLEST_GRADIENT_AMAX,
    TILE,
    dequantize_tiles,
    expand_scales,
    quantize_tiles,
)
from deepseek_jax.precision.fp8_operands import (
    KERNELS,
    Operands,
    Prepared,
    Quantized,
    as_given,
    gradient_of,
    like,
    prepare_rows,
    prepare_weights,
)

Kept = tuple[Quantized, list[Quantized], list[jax.Array]]
"""x, the weights, and arrays of their gradients' types."""
Multiply = Callable[[Quantized, Quantized, tuple[int, int]], jax.Array]


def fp8_matmul(x: jax.Array, w: Operands, implementation: str = "dot_general") -> Any:
    """`x w` with both operands in float8, and so its two gradients; sums in float32.

    Args:
        x: [..., K] in any float type.
        w: [K, M], the master weight itself, quantised here, or what `prepare_weight` made of it. Its gradient is float32
            before it takes w's type. Or a tuple of such that all read x, which is then quantised and kept once.
        implementation: a key of `IMPLEMENTATIONS`, or one of KERNELS.

    Returns:
        [..., M] in x's type, or a tuple of such. The gradient of x has x's type too.
    """
    weights = prepare_weights(w, implementation)
    rows = prepare_rows(x.reshape(-1, x.shape[-1]), implementation)
    if implementation in KERNELS:
        of_one = [jax.tree.map(lambda each: each[None], weight) for weight in weights]
        outputs = fp8_kernels.grouped_matmul(rows, of_one, jnp.array([rows.place.shape[0]], jnp.int32), implementation)
    else:
        outputs = _matmul(rows, weights, implementation)
    return as_given(w, [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Prepared, weights: list[Prepared], implementation: str) -> list[jax.Array]:
    return _forward(x, weights, implementation)[0]


def _forward(x: Prepared, weights: list[Prepared], implementation: str) -> tuple[list[jax.Array], Kept]:
    multiply = IMPLEMENTATIONS[implementation]
    kept = x.quantized, [w.quantized for w in weights], like(weights)
    return [multiply(kept[0], w, (1, 0)).astype(x.dtype) for w in kept[1]], kept


def _backward(implementation: str, kept: Kept, gradients: list[jax.Array]) -> tuple[Prepared, list[Prepared]]:
    multiply = IMPLEMENTATIONS[implementation]
    x, weights, types = kept
    dx = reduce(jnp.add, (multiply(quantize_gradient(dy, axis=1), w, (1, 1)) for dy, w in zip(gradients, weights)))
    x = retile(x)
    dw = [multiply(x, quantize_gradient(dy, axis=0), (0, 0)) for dy in gradients]
    return gradient_of(dx.astype(gradients[0].dtype)), [gradient_of(each.astype(own.dtype)) for each, own in zip(dw, types)]


_matmul.defvjp(_forward, _backward)


def retile(x: Quantized) -> Quantized:
    """Activations [N, K] stored in tiles of 1 x 128, again in tiles of 128 x 1 along tokens (report 3.5.2)."""
    return Quantized(*quantize_tiles(dequantize_tiles(x.codes, x.scales, axis=1), axis=0))


def quantize_gradient(dy: jax.Array, axis: int) -> Quantized:
    """Gradients [N, M] in tiles of 128 along `axis`, however small they are."""
    return Quantized(*quantize_tiles(dy, axis, smallest_amax=SMALLEST_GRADIENT_AMAX))


def multiply_dequantized(lhs: Quantized, rhs: Quantized, contracted: tuple[int, int]) -> jax.Array:
    """Dequantise and multiply in float32: the plain meaning of `multiply_blocks`; same arguments."""
    left, right = (each.codes.astype(jnp.float32) * _full_scales(each) for each in (lhs, rhs))
    return jax.lax.dot_general(left, right, (_axes(contracted), ((), ())), precision=jax.lax.Precision.HIGHEST)


def multiply_blocks(lhs: Quantized, rhs: Quantized, contracted: tuple[int, int]) -> jax.Array:
    """Multiply float8 matrices 128 of the contracted axis at a time: product, times its two scales, added in float32.

    The loop keeps one block's product alive; all of them at once would be [K/128, rows, columns] float32.

    Args:
        lhs, rhs: matrices with one scale for 128 entries along the contracted axis.
        contracted: the axis of each to contract, 0 or 1.

    Returns:
        float32 [lhs's free axis, rhs's free axis].
    """
    sides = tuple(zip((lhs, rhs), contracted))
    free = tuple(each.codes.shape[1 - axis] for each, axis in sides)
    blocks = lhs.scales.shape[contracted[0]]
    codes = [_pad(each.codes, axis, blocks * TILE) for each, axis in sides]

    def add_block(i: jax.Array, total: jax.Array) -> jax.Array:
        left, right = (jax.lax.dynamic_slice_in_dim(c, i * TILE, TILE, axis) for c, axis in zip(codes, contracted))
        product = jax.lax.dot_general(left, right, (_axes(contracted), ((), ())), preferred_element_type=jnp.float32)
        left_scale, right_scale = (
            _expand(jax.lax.dynamic_index_in_dim(each.scales, i, axis, keepdims=False), 0, size)
            for (each, axis), size in zip(sides, free)
        )
        return total + product * left_scale[:, None] * right_scale[None, :]

    return jax.lax.fori_loop(0, blocks, add_block, jnp.zeros(free, jnp.float32))


IMPLEMENTATIONS: dict[str, Multiply] = {"reference": multiply_dequantized, "dot_general": multiply_blocks}
"""(lhs, rhs, contracted axes) -> float32: the meaning, and what XLA makes anywhere. `fp8_kernels` has the kernels."""


def _axes(contracted: tuple[int, int]) -> tuple[tuple[int], tuple[int]]:
    return (contracted[0],), (contracted[1],)


def _pad(codes: jax.Array, axis: int, size: int) -> jax.Array:
    return jnp.pad(codes, [(0, size - codes.shape[i] if i == axis else 0) for i in range(2)])


def _full_scales(matrix: Quantized) -> jax.Array:
    rows, columns = matrix.codes.shape
    return _expand(_expand(matrix.scales, 0, rows), 1, columns)


def _expand(scales: jax.Array, axis: int, size: int) -> jax.Array:
    """One scale for each of `size` entries, where there may be one for 128."""
    return scales if scales.shape[axis] == size else expand_scales(scales, axis, size)

"""`fp8_matmul` for the routed experts: every group of rows has its own weight.

Rows are taken 128 at a time from one expert's first row on, so that the weight gradient's tiles of 128 x 1
lie as they would if every expert were multiplied alone. No row is copied into a padded layout: a block may
reach past its expert's last row, and what it wrote there the next block writes again.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from deepseek_jax.precision import fp8_kernels
from deepseek_jax.precision.fp8 import TILE
from deepseek_jax.precision.fp8_matmul import IMPLEMENTATIONS, Kept, quantize_gradient, retile
from deepseek_jax.precision.fp8_operands import (
    KERNELS,
    Operand,
    Operands,
    Prepared,
    Quantized,
    as_given,
    gradient_of,
    like,
    prepare_rows,
    prepare_weights,
)

Rows = TypeVar("Rows", Quantized, jax.Array)
Block = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def fp8_grouped_matmul(x: Operand, w: Operands, group_sizes: jax.Array, implementation: str = "dot_general") -> Any:
    """Each group of rows times its own weight, all three products in float8 as in `fp8_matmul`.

    Args:
        x: [N, K] rows sorted by group, or what `prepare_rows` made of them.
        w: [E, K, M] master weights, or what `prepare_weight` made of them, or a tuple of such that all read x.
        group_sizes: [E] int32, together at most N.
        implementation: a key of `fp8_matmul.IMPLEMENTATIONS`, or one of KERNELS.

    Returns:
        [N, M] in x's type, or a tuple of such; rows past the last group are zero.
    """
    rows, weights = prepare_rows(x, implementation), prepare_weights(w, implementation)
    if implementation in KERNELS:
        outputs = fp8_kernels.grouped_matmul(rows, weights, group_sizes, implementation)
    else:
        outputs = _grouped_matmul(rows, weights, group_sizes, implementation)
    return as_given(w, outputs)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x: Prepared, weights: list[Prepared], group_sizes: jax.Array, implementation: str) -> list[jax.Array]:
    return _forward(x, weights, group_sizes, implementation)[0]


def _forward(
    x: Prepared, weights: list[Prepared], group_sizes: jax.Array, implementation: str
) -> tuple[list[jax.Array], tuple[Kept, jax.Array]]:
    blocks = [w.quantized for w in weights]
    outputs = [_rows_times_weights([(x.quantized, w)], (1, 0), group_sizes, implementation, x.dtype) for w in blocks]
    return outputs, ((x.quantized, blocks, like(weights)), group_sizes)


def _backward(
    implementation: str, kept: tuple[Kept, jax.Array], gradients: list[jax.Array]
) -> tuple[Prepared, list[Prepared], None]:
    (x, weights, types), group_sizes = kept
    pairs = [(quantize_gradient(dy, axis=1), w) for dy, w in zip(gradients, weights)]
    dx = _rows_times_weights(pairs, (1, 1), group_sizes, implementation, gradients[0].dtype)
    dw = [_weight_gradient(x, dy, group_sizes, implementation) for dy in gradients]
    return gradient_of(dx), [gradient_of(each.astype(own.dtype)) for each, own in zip(dw, types)], None


_grouped_matmul.defvjp(_forward, _backward)


def _rows_times_weights(
    pairs: Sequence[tuple[Quantized, Quantized]],
    contracted: tuple[int, int],
    group_sizes: jax.Array,
    implementation: str,
    dtype: jnp.dtype,
) -> jax.Array:
    """Sum over pairs ([N, C] rows, [E, ...] weights) of each row times its expert's weight: [N, M]."""
    multiply = IMPLEMENTATIONS[implementation]
    rows, columns = pairs[0][0].codes.shape[0], pairs[0][1].codes.shape[2 - contracted[1]]
    pairs = [(_pad_rows(row_tiles), weights) for row_tiles, weights in pairs]

    def multiply_block(outputs: jax.Array, expert: jax.Array, first: jax.Array, mine: jax.Array) -> jax.Array:
        products = (
            multiply(_take_rows(row_tiles, first), jax.tree.map(lambda each: each[expert], weights), contracted)
            for row_tiles, weights in pairs
        )
        product = reduce(jnp.add, products)
        return jax.lax.dynamic_update_slice_in_dim(outputs, jnp.where(mine, product, 0).astype(dtype), first, 0)

    return _for_each_block(multiply_block, jnp.zeros((rows + TILE, columns), dtype), group_sizes)[:rows]


def _weight_gradient(x: Quantized, dy: jax.Array, group_sizes: jax.Array, implementation: str) -> jax.Array:
    """float32 [E, K, M]: both operands in tiles of 128 x 1, counted from each expert's first row."""
    multiply = IMPLEMENTATIONS[implementation]
    x, dy = _pad_rows(x), _pad_rows(dy)

    def add_block(gradient: jax.Array, expert: jax.Array, first: jax.Array, mine: jax.Array) -> jax.Array:
        codes, scales = _take_rows(x, first)
        tile = retile(Quantized(jnp.where(mine, codes, 0), jnp.where(mine, scales, 0)))
        dy_tile = quantize_gradient(jnp.where(mine, _take_rows(dy, first), 0), axis=0)
        return gradient.at[expert].add(multiply(tile, dy_tile, (0, 0)))

    shape = (group_sizes.shape[0], x.codes.shape[1], dy.shape[1])
    return _for_each_block(add_block, jnp.zeros(shape, jnp.float32), group_sizes)


def _for_each_block(body: Block, carry: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Fold `body(carry, expert, first row, [128, 1] is the row the expert's)` over all groups' blocks in order."""
    counts = -(-group_sizes // TILE)
    ends = jnp.cumsum(counts)
    starts = jnp.cumsum(group_sizes) - group_sizes

    def visit(i: jax.Array, carry: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(ends, i, side="right")
        skipped = TILE * (i - ends[expert] + counts[expert])
        mine = (jnp.arange(TILE) < group_sizes[expert] - skipped)[:, None]
        return body(carry, expert, starts[expert] + skipped, mine)

    return jax.lax.fori_loop(0, ends[-1], visit, carry)


def _pad_rows(tree: Rows) -> Rows:
    """128 more rows, so that a block that starts at any row lies within."""
    return jax.tree.map(lambda each: jnp.pad(each, ((0, TILE), (0, 0))), tree)


def _take_rows(tree: Rows, first: jax.Array) -> Rows:
    return jax.tree.map(lambda each: jax.lax.dynamic_slice_in_dim(each, first, TILE, 0), tree)

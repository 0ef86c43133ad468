"""What Pallas Triton kernels for matrices share: tiles of rows by group, parts of matrices with masked edges, the call.

JAX's Triton lowering wants sides that are powers of two and masks what lies beyond an edge only if told to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from deepseek_jax.errors import UserError

LEAST_SIDE = 16
"""Of a tile: tensor cores take no fewer."""


class Shape(NamedTuple):
    """Of a tile of a product, and how much of its sum one step adds."""

    rows: int
    columns: int
    depth: int

    def cut(self, rows: int, columns: int, depth: int) -> "Shape":
        """For a product of [rows, depth] by [depth, columns], which may be less."""
        sides = (min(most, max(LEAST_SIDE, pl.next_power_of_2(size))) for most, size in zip(self, (rows, columns, depth)))
        return Shape(*sides)


class Tiles(NamedTuple):
    """For each tile of rows, [tiles] int32; rows that belong to no group are one more group, the last."""

    group: jax.Array
    first: jax.Array
    """Its first row."""
    end: jax.Array
    """The row after its group's last. A tile that is not needed begins there or beyond."""


def make_tiles(group_sizes: jax.Array, rows: int, height: int) -> Tiles:
    """Tiles of `height` rows, counted from each group's first row, in as many places as may be needed."""
    sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes)).astype(jnp.int32)
    counts = pl.cdiv(sizes, height)
    tile_ends, ends = jnp.cumsum(counts), jnp.cumsum(sizes)
    index = jnp.arange((rows + sizes.size * (height - 1)) // height, dtype=jnp.int32)
    group = jnp.sum(tile_ends[:-1] <= index[:, None], axis=1, dtype=jnp.int32)
    skipped = index - (tile_ends - counts)[group]
    return Tiles(group, (ends - sizes)[group] + height * skipped, ends[group])


class Span(NamedTuple):
    """Places along one axis of a matrix."""

    slice: Any
    mask: jax.Array | None
    """Which of them there are; null for all."""


def span(first: Any, size: int, end: Any) -> Span:
    """`size` places from the first on, of which there is none from `end` on; if that is a number, `size` divides the first."""
    is_whole = isinstance(end, int) and end % size == 0
    return Span(pl.ds(first, size), None if is_whole else first + jnp.arange(size, dtype=jnp.int32) < end)


def load(ref: Any, rows: Span, columns: Span, *group: jax.Array) -> jax.Array:
    """Part of a matrix, or of a group's of several; zero where there is none."""
    mask = _mask(rows, columns)
    return plgpu.load(ref.at[(*group, rows.slice, columns.slice)], mask=mask, other=_zero(ref, mask))


def load_column(ref: Any, rows: Span, column: Any) -> jax.Array:
    """Part of one column of a matrix; zero where there is none."""
    return plgpu.load(ref.at[rows.slice, column], mask=rows.mask, other=_zero(ref, rows.mask))


def load_row(ref: Any, row: Any, columns: Span) -> jax.Array:
    """Part of one row of a matrix; zero where there is none."""
    return plgpu.load(ref.at[row, columns.slice], mask=columns.mask, other=_zero(ref, columns.mask))


def _zero(ref: Any, mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else jnp.zeros((), ref.dtype)


def store(ref: Any, value: jax.Array, rows: Span, columns: Span, *group: jax.Array) -> None:
    """Write part of a matrix, or of a group's of several, in its type."""
    plgpu.store(ref.at[(*group, rows.slice, columns.slice)], value.astype(ref.dtype), mask=_mask(rows, columns))


def _mask(rows: Span, columns: Span) -> jax.Array | None:
    masks = [mask for mask in (rows.mask, columns.mask) if mask is not None]
    if not masks:
        return None
    of_rows = True if rows.mask is None else rows.mask[:, None]
    of_columns = True if columns.mask is None else columns.mask[None, :]
    return jnp.broadcast_to(of_rows & of_columns, (rows.slice.size, columns.slice.size))


def call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    result: Any,
    parameters: plgpu.CompilerParams,
    *arrays: Any,
) -> Any:
    """Run a kernel over a grid, for a result or several; programs for a CPU, which only try it, interpret it.

    Raises:
        UserError: an array of numbers of one byte is of a size at which JAX's Triton lowering miscounts.
    """
    for array in jax.tree.leaves((arrays, result)):
        # It counts up to 2^32 bytes in signed 32 bits.
        if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
            raise UserError(
                f"model.precision=fp8: {array.size} numbers of a stack of weights or of rows on one device are more than the "
                "kernels can address; take a larger parallel.expert, or model.grouped_matmul=blocked"
            )

    def run(interpret: bool, *arrays: Any) -> Any:
        return pl.pallas_call(kernel, result, grid=grid, name=name, interpret=interpret, compiler_params=parameters)(*arrays)

    return lax.platform_dependent(*arrays, cpu=partial(run, True), default=partial(run, False))

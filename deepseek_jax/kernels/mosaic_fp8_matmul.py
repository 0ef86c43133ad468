"""Block-scaled products of float8 on Hopper as Pallas Mosaic-GPU kernels (report 3.3): plain ones are those of a single group.

A block of three groups of four warps makes 128 x 128 of a result. One group keeps copies of the operands coming, 128 of the
contracted axis at a time, by the chip's copy engine; two multiply them, each for 64 rows. So one adds its last product, times
its scales, to its float32 sum, while the tensor cores work for the other. Two blocks side by side share the rows that both
read, for what limits tiles of this size is what comes from the cache: 64 bytes a cycle at the tensor cores' peak, of which
the Triton kernels were seen to get 20 to 34. The tensor cores read float8 only where the contracted axis is the one that lies
contiguous in memory, so both operands come that way.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels.triton_fp8_matmul import Scaled, matmul_name

TILE = 128
HALF = TILE // 2
"""Rows of each multiplying group of warps."""
STEPS = 4
"""Of the contracted axis under way at once: with the result's tile 164 of 227 KB of shared memory, 196 in float32."""
PAIR = 2
"""Blocks that share rows."""
COPYING = 2
"""Index of the group of warps that copies."""
WHOLE = 64
"""Of what a matrix' sides are multiples that the copy engine takes, in numbers of two bytes; in codes it is a tile."""
Operands = Callable[[jax.Array], Sequence[Any]]
"""From a step to where in memory its part of each of `Buffers` lies."""


def rows_by_weights(rows: Sequence[Scaled], weights: Sequence[Scaled], group_sizes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What `triton_fp8_matmul.rows_by_weights` says."""
    count, groups, width = rows[0][0].shape[0], *weights[0][0].shape[:2]
    blocks = make_blocks(group_sizes, count)

    def body(group_of: Any, block_of: Any, first_of: Any, end_of: Any, rows: Any, weights: Any, y: Any) -> None:
        index = lax.axis_index("row")
        group, block, first, end = group_of[index], block_of[index], first_of[index], end_of[index]
        is_needed = (group < groups) & (first < end)
        own = jnp.minimum(group, groups - 1)
        here, there = _tile(block), _tile(_column())

        def operands(x: Any, w: Any) -> Operands:
            return lambda step: (
                x[0].at[here, _tile(step)], x[1].at[step, here], w[0].at[own, there, _tile(step)], w[1].at[own, step, there]
            )  # fmt: skip

        parts = [(jnp.where(is_needed, pl.cdiv(x[0].shape[1], TILE), 0), operands(x, w)) for x, w in zip(rows, weights)]
        _multiply(parts, y, block * TILE, first, end, there)

    y = _call(
        body,
        f"{matmul_name(groups)}_fp8",
        {"row": blocks.group.size},
        jax.ShapeDtypeStruct((count + -count % WHOLE, width + -width % WHOLE), dtype),
        *blocks,
        [(_filled_up(_filled_up(codes, TILE), axis=0), _filled_up(scales.T)) for codes, scales in rows],
        [(_filled_up(_filled_up(codes, TILE), axis=1), _of_columns(scales)) for codes, scales in weights],
    )
    return y[:count, :width]


def rows_by_rows(x: Scaled, dy: Scaled, tile_ends: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What `triton_fp8_matmul.rows_by_rows` says."""
    height, width, groups = x[0].shape[1], dy[0].shape[1], tile_ends.size

    def body(starts: Any, ends: Any, x: Any, dy: Any, dw: Any) -> None:
        group, row = lax.axis_index("group"), lax.axis_index("row")
        here, there = _tile(row), _tile(_column())
        start = starts[group]

        def operands(step: jax.Array) -> Sequence[Any]:
            tile = start + step
            return x[0].at[tile, here], x[1].at[tile, here], dy[0].at[tile, there], dy[1].at[tile, there]

        first = row * TILE
        _multiply([(ends[group] - start, operands)], dw.at[group], first, first, jnp.minimum(first + TILE, height), there)

    dw = _call(
        body,
        f"{matmul_name(groups)}_of_rows_fp8",
        {"group": groups, "row": pl.cdiv(height, TILE)},
        jax.ShapeDtypeStruct((groups, height, width + -width % WHOLE), dtype),
        jnp.append(0, tile_ends[:-1]).astype(jnp.int32),
        tile_ends,
        *((_filled_up(codes, axis=1), _filled_up(scales)) for codes, scales in (x, dy)),
    )
    return dw[:, :, :width]


class Blocks(NamedTuple):
    """For each block of 128 rows and each group that has some of them, [blocks] int32."""

    group: jax.Array
    block: jax.Array
    first: jax.Array
    """Of the group's rows in it."""
    end: jax.Array
    """The row after its last there; where no block is needed, the first."""


def make_blocks(group_sizes: jax.Array, rows: int) -> Blocks:
    """Blocks from the first row on, in as many places as may be needed; rows of no group are one more group, the last.

    They do not begin where a group does: the copy engine takes tiles for the tensor cores from every eighth row on alone.
    """
    sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes)).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    counts = jnp.where(sizes > 0, pl.cdiv(ends, TILE) - starts // TILE, 0)
    place_ends = jnp.cumsum(counts)
    index = jnp.arange(pl.cdiv(rows, TILE) + sizes.size - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(place_ends <= index[:, None], axis=1, dtype=jnp.int32), sizes.size - 1)
    block = starts[group] // TILE + index - (place_ends - counts)[group]
    first, end = jnp.maximum(starts[group], block * TILE), jnp.minimum(ends[group], (block + 1) * TILE)
    return Blocks(*(jnp.where(index < place_ends[-1], each, 0) for each in (group, block, first, end)))


def _of_columns(scales: jax.Array) -> jax.Array:
    """Scales of blocks [E, ceil(M/128), steps] for every column: [E, steps, at least M]."""
    return jnp.repeat(jnp.swapaxes(scales, 1, 2), TILE, axis=2)


def _filled_up(x: jax.Array, whole: int = WHOLE, axis: int = -1) -> jax.Array:
    """With zeros to a multiple of `whole`, if it is none yet."""
    axis %= x.ndim
    return jnp.pad(x, [(0, -x.shape[axis] % whole if each == axis else 0) for each in range(x.ndim)])


def _tile(index: Any) -> Any:
    """128 places, the first a multiple of as many."""
    return pl.ds(pl.multiple_of(index * TILE, TILE), TILE)


def _column() -> Any:
    """Which tile of columns a block makes."""
    return lax.axis_index("columns") * PAIR + lax.axis_index("column")


class Buffers(NamedTuple):
    """In shared memory, each of STEPS steps."""

    left: Any
    left_scales: Any
    right: Any
    right_scales: Any


def _multiply(parts: Sequence[tuple[Any, Operands]], result: Any, row: Any, first: Any, end: Any, there: Any) -> None:
    """Store the sum over all steps of left times rightᵀ, each times its scales; left is what the blocks of a pair share.

    Args:
        parts: how many steps, and their operands.
        result: a matrix in memory, of which columns `there` of rows from `first` to `end` are written.
        row: of the result, the tile's first.
    """

    def scope(buffers: Buffers, out: Any, filled: Any, free: Any) -> None:
        me = lax.axis_index("warps")

        @pl.when(me == COPYING)
        def _copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            _copy_steps(parts, buffers, filled, free)

        @pl.when(me != COPYING)
        def _compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            total = _sum_of_steps(sum(steps for steps, _ in parts), me, buffers, filled, free)
            out[me] = total.astype(out.dtype)
            plgpu.commit_smem()
            _store(out.at[me], result, row + me * HALF, first, end, there)

    codes = plgpu.SMEM((STEPS, TILE, TILE), jnp.float8_e4m3fn)
    scales = plgpu.SMEM((STEPS, TILE), jnp.float32)
    pl.run_scoped(
        scope,
        Buffers(codes, scales, codes, scales),
        plgpu.SMEM((2, HALF, TILE), result.dtype),
        plgpu.Barrier(num_arrivals=len(Buffers._fields), num_barriers=STEPS),
        plgpu.ClusterBarrier(collective_axes=("column",), num_arrivals=2, num_barriers=STEPS),
        collective_axes="warps",
    )


def _copy_steps(parts: Sequence[tuple[Any, Operands]], buffers: Buffers, filled: Any, free: Any) -> None:
    """Fill buffers as they become free in both blocks of the pair."""

    def copy(step: Any, slot: Any, operands: Operands) -> None:
        for name, source, buffer in zip(Buffers._fields, operands(step), buffers):
            shared = "column" if name.startswith("left") else None
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], filled.at[slot], collective_axes=shared)

    before: Any = 0
    for steps, operands in parts:

        def of_part(step: Any, _: None, before: Any = before, operands: Operands = operands) -> None:
            slot = lax.rem(before + step, STEPS)
            pl.when(before + step >= STEPS)(lambda: plgpu.barrier_wait(free.at[slot]))
            copy(step, slot, operands)

        lax.fori_loop(0, steps, of_part, None)
        before = before + steps
    # The other block tells this one of what it has read, so this one stays until it has.
    least = jnp.maximum(before - STEPS, 0)
    lax.fori_loop(least, before, lambda step, _: plgpu.barrier_wait(free.at[lax.rem(step, STEPS)]), None)


def _sum_of_steps(steps: Any, me: Any, buffers: Buffers, filled: Any, free: Any) -> jax.Array:
    """[64, 128] float32, of this group's rows."""
    own = pl.ds(pl.multiple_of(me * HALF, HALF), HALF)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        slot = lax.rem(step, STEPS)
        plgpu.barrier_wait(filled.at[slot])

        def product(sums: Any) -> jax.Array:
            plgpu.wgmma(sums, buffers.left.at[slot, own], plgpu.transpose_ref(buffers.right.at[slot], (1, 0)))
            return sums[...]

        these = pl.run_scoped(product, plgpu.ACC((HALF, TILE), jnp.float32))
        scales = buffers.left_scales[slot, own], buffers.right_scales[slot]
        plgpu.barrier_arrive(free.at[slot])
        by_row, by_column = (lax.broadcast_in_dim(each, (HALF, TILE), (axis,)) for axis, each in enumerate(scales))
        return total + these * (by_row * by_column)

    return lax.fori_loop(0, steps, add, jnp.zeros((HALF, TILE), jnp.float32))


def _store(tile: Any, result: Any, row: Any, first: Any, end: Any, there: Any) -> None:
    """Copy those of a tile's 64 rows that lie from `first` to `end`; copies are of sizes known beforehand, powers of two."""
    first = jnp.maximum(first, row)
    count = jnp.clip(end - first, 0, row + HALF - first)

    @pl.when(count == HALF)
    def _whole() -> None:
        plgpu.copy_smem_to_gmem(tile, result.at[pl.ds(row, HALF), there])

    for size in (32, 16, 8, 4, 2, 1):

        @pl.when(count & size != 0)
        def _part(size: int = size, first: Any = first) -> None:
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(first - row, size)], result.at[pl.ds(first, size), there])

        first = first + (count & size)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _call(body: Callable[..., None], name: str, rows: dict[str, int], result: Any, *arrays: Any) -> Any:
    """Run a kernel for all tiles of the result; those of a row come one after the other, for the cache still holds it."""
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=result,
        grid=(*rows.values(), pl.cdiv(result.shape[-1], PAIR * TILE)),
        grid_names=(*rows, "columns"),
        cluster=(PAIR,),
        cluster_names=("column",),
        num_threads=COPYING + 1,
        thread_name="warps",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*arrays)

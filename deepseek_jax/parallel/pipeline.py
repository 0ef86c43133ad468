"""A stack of layers in stages, each on a row of devices of its own, with micro-batches that follow each other.

A device holds `pipe_interleave` chunks of layers, every `pipe`-th of the stack: at each tick it computes one chunk for
one micro-batch and passes the result on. A micro-batch runs through all devices once for every chunk of theirs, so that
the ticks in which a device has nothing to do, pipe - 1 of them, are as short as a chunk.
Micro-batches come from the device that read them and go back to it, one neighbour further at each tick.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ParallelConfig

ABSENT = -1
"""In place of a layer, where a chunk has one fewer than others."""

AXIS = "pipe"


def assign_layers(layers: int, parallel: ParallelConfig) -> np.ndarray:
    """Number of the layer at each place, or ABSENT: [pipe, pipe_interleave, layers of a chunk]."""
    chunks = parallel.pipe * parallel.pipe_interleave
    edges = [chunk * layers // chunks for chunk in range(chunks + 1)]
    places = np.full((chunks, -(-layers // chunks)), ABSENT)
    for chunk, (start, end) in enumerate(zip(edges, edges[1:])):
        places[chunk, : end - start] = np.arange(start, end)
    return places.reshape(parallel.pipe_interleave, parallel.pipe, -1).swapaxes(0, 1)


def bubble(layers: int, parallel: ParallelConfig, rounds: int) -> float:
    """Share of the stages' time in which they compute no layer for a micro-batch.

    `rounds` is the micro-batches that each device reads. Absent layers take their time, too.
    """
    microbatches = rounds * parallel.pipe
    ticks = microbatches * parallel.pipe_interleave + parallel.pipe - 1
    return 1 - microbatches * layers / (ticks * assign_layers(layers, parallel)[:, 0].size)


def run_pipeline(
    chunk: Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any, Any]],
    inputs: jax.Array,
    beside: Any,
    kept: Any,
    parallel: ParallelConfig,
) -> tuple[jax.Array, Any, Any, Any]:
    """Send micro-batches through all stages; inside `shard_map` over the axis `pipe`.

    Args:
        chunk: (number of this device's chunk, state of a micro-batch, what goes beside it, what the device keeps) -> (state
            after its layers, what the device keeps, (statistics to be summed, statistics of which the largest count)).
        inputs: [rounds, ...] micro-batches that this device read.
        beside: tree of [rounds, ...], what goes from stage to stage with each of them as it is.
        kept: at first.

    Returns:
        What comes out at the end for these micro-batches, what the device keeps, and over all micro-batches by chunk,
        [pipe_interleave, ...], the sums of the former statistics and the maxima of the latter.
    """
    stages, chunks, rounds = parallel.pipe, parallel.pipe_interleave, inputs.shape[0]
    stage, period = jax.lax.axis_index(AXIS), stages * chunks
    onward = [(i, (i + 1) % stages) for i in range(stages)]
    back = [(i, (i - 1) % stages) for i in range(stages)]
    last_chunk_ends = (chunks - 1) * stages + 2 * (stages - 1)

    def send(tree: Any, way: list[tuple[int, int]]) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, AXIS, way), tree)

    def choose(condition: jax.Array, one: Any, other: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)

    def pick(number: jax.Array | int) -> tuple[jax.Array, Any]:
        return jax.tree.map(lambda leaf: leaf[number], (inputs, beside))

    def tick(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
        passed, arriving, leaving, outputs, totals, peaks, kept = carry
        work = time - stage
        busy = (work >= 0) & (work < rounds * period)
        number = work % period // stages
        # Every device offers its next micro-batch at the same time; it reaches the first stage when its turn comes.
        offered = pick(jnp.clip(time // period, 0, rounds - 1))
        arriving = choose(time % period == 0, offered, send(arriving, back))
        state, along = choose((stage == 0) & (number == 0), arriving, passed)
        state, kept, (counted, reached) = chunk(number, state, along, kept)
        totals = jax.tree.map(lambda total, new: total.at[number].add(jnp.where(busy, new, 0)), totals, counted)
        peaks = jax.tree.map(lambda peak, new: peak.at[number].max(jnp.where(busy, new, -jnp.inf)), peaks, reached)
        leaving = choose(stage == stages - 1, state, send(leaving, back))
        done, home = jnp.divmod(time - last_chunk_ends, period)
        place = jnp.clip(done, 0, rounds - 1)
        outputs = outputs.at[place].set(jnp.where((home == 0) & (done >= 0), leaving, outputs[place]))
        return (send((state, along), onward), arriving, leaving, outputs, totals, peaks, kept), None

    first = pick(0)
    counted, reached = jax.eval_shape(lambda first: chunk(jnp.int32(0), first[0], first[1], kept)[2], first)
    totals = jax.tree.map(lambda leaf: jnp.zeros((chunks, *leaf.shape), leaf.dtype), counted)
    peaks = jax.tree.map(lambda leaf: jnp.full((chunks, *leaf.shape), -jnp.inf, leaf.dtype), reached)
    nothing = jax.tree.map(jnp.zeros_like, first)
    # Until work comes a stage computes on what is like it: zeros would all go to the same experts.
    start = (first, nothing, nothing[0], jnp.zeros_like(inputs), totals, peaks, kept)
    times = jnp.arange(rounds * period + stages - 1)
    # The last micro-batch is home stages - 1 ticks after it left the last stage.
    (_, _, _, outputs, totals, peaks, kept), _ = jax.lax.scan(tick, start, times)
    return outputs, kept, totals, peaks

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
    chunk: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any, Any]],
    inputs: jax.Array,
    kept: Any,
    parallel: ParallelConfig,
) -> tuple[jax.Array, Any, Any, Any]:
    """Send micro-batches through all stages; inside `shard_map` over the axis `pipe`.

    Args:
        chunk: (number of this device's chunk, state of a micro-batch, what the device keeps) -> (state after its
            layers, what the device keeps, (statistics to be summed, statistics of which the largest count)).
        inputs: [rounds, ...] micro-batches that this device read.
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

    def tick(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
        passed, arriving, leaving, outputs, totals, peaks, kept = carry
        work = time - stage
        busy = (work >= 0) & (work < rounds * period)
        number = work % period // stages
        # Every device offers its next micro-batch at the same time; it reaches the first stage when its turn comes.
        offered = inputs[jnp.clip(time // period, 0, rounds - 1)]
        arriving = jnp.where(time % period == 0, offered, jax.lax.ppermute(arriving, AXIS, back))
        state, kept, (counted, reached) = chunk(number, jnp.where((stage == 0) & (number == 0), arriving, passed), kept)
        totals = jax.tree.map(lambda total, new: total.at[number].add(jnp.where(busy, new, 0)), totals, counted)
        peaks = jax.tree.map(lambda peak, new: peak.at[number].max(jnp.where(busy, new, -jnp.inf)), peaks, reached)
        leaving = jnp.where(stage == stages - 1, state, jax.lax.ppermute(leaving, AXIS, back))
        done, home = jnp.divmod(time - last_chunk_ends, period)
        place = jnp.clip(done, 0, rounds - 1)
        outputs = outputs.at[place].set(jnp.where((home == 0) & (done >= 0), leaving, outputs[place]))
        return (jax.lax.ppermute(state, AXIS, onward), arriving, leaving, outputs, totals, peaks, kept), None

    nothing = jnp.zeros_like(inputs[0])
    counted, reached = jax.eval_shape(lambda state: chunk(jnp.int32(0), state, kept)[2], nothing)
    totals = jax.tree.map(lambda leaf: jnp.zeros((chunks, *leaf.shape), leaf.dtype), counted)
    peaks = jax.tree.map(lambda leaf: jnp.full((chunks, *leaf.shape), -jnp.inf, leaf.dtype), reached)
    # Until work comes a stage computes on what is like it: zeros would all go to the same experts.
    start = (inputs[0], nothing, nothing, jnp.zeros_like(inputs), totals, peaks, kept)
    times = jnp.arange(rounds * period + stages - 1)
    # The last micro-batch is home stages - 1 ticks after it left the last stage.
    (_, _, _, outputs, totals, peaks, kept), _ = jax.lax.scan(tick, start, times)
    return outputs, kept, totals, peaks

"""What a run prints of its mesh before it starts: what each axis divides, and what a device must hold."""

import math
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Config, expert_layers
from deepseek_jax.config.trainable import learns, trainable
from deepseek_jax.parallel.exchange import hops_of
from deepseek_jax.parallel.mesh import readers
from deepseek_jax.parallel.pipeline import assign_layers, bubble
from deepseek_jax.parallel.sharding import PIPELINED, Division, Place, bytes_per_device
from deepseek_jax.parallel.weights import step_type

DIVIDES = {
    "pipe": "the mixture-of-experts layers, in stages",
    "data": "sequences, master weights and moments (ZeRO-1)",
    "fsdp": "sequences, master weights and moments, weights too (ZeRO-3)",
    "context": "each sequence; also master weights and moments, weights too (ZeRO-3)",
    "expert": "sequences, and the routed experts, to which tokens travel",
}


def mesh_summary(config: Config, division: Division, state: Any, shardings: Any) -> str:
    """Lines for a person, from the state's shapes and shardings."""
    sizes = division.mesh.shape
    count = jax.process_count()
    lines = [f"mesh: {' x '.join(f'{axis} {size}' for axis, size in sizes.items())} = {division.mesh.size} devices "
             f"in {count} process{'es' if count > 1 else ''}"]  # fmt: skip
    lines += [f"  {axis} {size} divides {DIVIDES[axis]}" for axis, size in sizes.items() if size > 1]
    if division.parallel.expert > 1:
        lines.append(_exchange(config, division))
    if division.parallel.pipe > 1:
        lines.append(_pipeline(config, division))
    masters, moments = (bytes_per_device(getattr(state, name), getattr(shardings, name)) for name in ("params", "optimizer"))
    weights, gradients = bytes_in_step(division, config, state.params)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    lines.append(
        f"each device holds: parameters {readable_bytes(masters)}, optimizer {readable_bytes(moments)}; in a step also "
        f"gathered weights {readable_bytes(weights)}, gradients {readable_bytes(gradients)}; the whole state is "
        f"{readable_bytes(total)}"
    )
    return "\n".join(lines)


def _exchange(config: Config, division: Division) -> str:
    parallel, model, train = division.parallel, config.model, config.train
    sequences = train.batch_size // train.gradient_accumulation_steps // readers(parallel)
    tokens = (parallel.microbatch_size if parallel.pipe > 1 else sequences) * train.sequence_length // parallel.context
    hops = hops_of(model, parallel, tokens)
    reached, room = min(model.num_experts_per_tok, math.prod(hop.parcels for hop in hops)), hops[-1].room
    first = f"{hops[0].parcels} groups and on to " if len(hops) > 1 else ""
    return (
        f"  {tokens:,} tokens at a time go to {first}{reached} devices each at most; a device has room for {room.parcels:,} "
        f"of them and {room.choices:,} choices of its experts, and what finds none follows"
    )


def _pipeline(config: Config, division: Division) -> str:
    parallel, train = division.parallel, config.train
    layers = expert_layers(config.model)
    own = (assign_layers(layers, parallel) >= 0).sum(axis=(1, 2))
    sequences = train.batch_size // train.gradient_accumulation_steps // readers(parallel)
    rounds = sequences // parallel.microbatch_size
    count = f"{own.min()}" if own.min() == own.max() else f"{own.min()} to {own.max()}"
    return (
        f"  stages of {count} layers in {parallel.pipe_interleave} chunks; {rounds * parallel.pipe} micro-batches of "
        f"{parallel.microbatch_size} sequences; the bubble is {bubble(layers, parallel, rounds):.1%} of the time"
    )


def bytes_in_step(division: Division, config: Config, params: Any) -> tuple[int, int]:
    """Of the weights as `collect` gathers them, and of the gradients while they are summed on each device.

    Only what learns has gradients. Both are cut where weights are gathered layer by layer, by expert and by stage.
    """
    sizes = division.mesh.shape

    def one(path: tuple[str, ...], place: Place, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        is_learnt = learns(trainable(config), path)
        cut_by = {*division.layer_axes(path), *(("expert",) if "experts" in path else ())}
        cuts = math.prod(sizes[axis] for axis, _ in place.cuts if axis in cut_by)
        size = leaf.size
        if path[0] == PIPELINED and division.parallel.pipe > 1:
            size = size // leaf.shape[0] * assign_layers(leaf.shape[0], division.parallel)[0].size
        itemsizes = (step_type(division, config.model, path, place, leaf.dtype).itemsize, leaf.dtype.itemsize * is_learnt)
        return size // cuts * np.array(itemsizes)

    weights, gradients = np.sum(jax.tree.leaves(division.map(one, params)), axis=0)
    return int(weights), int(gradients)


def readable_bytes(count: float) -> str:
    """`12345678` as `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

"""The training step compiled from shapes alone, for devices that need not be there; nothing is allocated."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import Config
from deepseek_jax.config.trainable import trainable
from deepseek_jax.implementations import choose
from deepseek_jax.model.layers import param_dtype
from deepseek_jax.parallel.mesh import make_mesh, resolve
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.step import Scalars, TrainState, init_state, make_step


class CompiledStep(NamedTuple):
    """A step that could run, and what it was compiled for."""

    compiled: jax.stages.Compiled
    division: Division
    state: TrainState
    """Its arrays' shapes and shardings."""


def compile_step(
    config: Config, devices: Sequence[jax.Device], options: Optional[dict[str, str | bool]] = None
) -> CompiledStep:
    """Compile `train_step` as a run has it, over a mesh of these devices.

    Args:
        devices: of this machine, or of `jax.experimental.topologies.get_topology_desc(...)`; every `auto` is chosen
            for their platform.
        options: of the compiler, beside those that a run gives it.
    """
    config = choose(dataclasses.replace(config, parallel=resolve(config, len(devices))), devices[0].platform)
    shapes = jax.eval_shape(partial(init_state, config))
    division = Division(config.parallel, shapes.params, make_mesh(config.parallel, devices))

    def placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(placed, shapes, division.shardings(shapes, make_optimizer(config.train), trainable(config)))
    parts, length = config.train.gradient_accumulation_steps, config.train.sequence_length
    batch = (parts, config.train.batch_size // parts, length + 1 + config.model.num_nextn_predict_layers)
    tokens = jax.ShapeDtypeStruct(batch, jnp.int32, sharding=NamedSharding(division.mesh, division.batch_spec(axis=1)))
    scalar = jax.ShapeDtypeStruct((), param_dtype(config.model), sharding=NamedSharding(division.mesh, PartitionSpec()))
    step = make_step(config, division)
    return CompiledStep(step.lower(state, tokens, Scalars(scalar, scalar, scalar)).compile(options), division, state)

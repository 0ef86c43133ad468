"""The mesh of devices, and whether a run fits it: all that can be said before anything compiles."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from deepseek_jax.config import MESH_AXES, Config, ConfigError, ModelConfig, ParallelConfig, expert_layers

ALONE = ParallelConfig(data=1)
"""One device."""


def resolve(config: Config, devices: int) -> ParallelConfig:
    """`config.parallel` with its open axis filled in, for so many devices.

    Raises:
        ConfigError: the mesh has another number of devices, or the model or the batch cannot be divided by it; names
            the nearest sizes that work.
    """
    model, train = config.model, config.train
    parallel = _with_experts(config.parallel, model, train.sequence_length, devices)
    own = train.sequence_length // parallel.context
    _divides("parallel.exchange_parts", parallel.exchange_parts, "a device's tokens of a sequence", own)
    if parallel.pipe > 1 and model.moe_layer_freq > 1:
        raise ConfigError(
            f"parallel.pipe={parallel.pipe}: stages are of mixture-of-experts layers alone, and with "
            f"model.moe_layer_freq={model.moe_layer_freq} dense ones stand between; divide by fsdp, data and expert"
        )
    layers, stages = expert_layers(model), parallel.pipe * parallel.pipe_interleave
    if parallel.pipe > 1 and stages > layers:
        raise ConfigError(
            f"parallel.pipe={parallel.pipe} with pipe_interleave={parallel.pipe_interleave}: {stages} parts for "
            f"{layers} mixture-of-experts layers; at most pipe={max(layers // parallel.pipe_interleave, 1)}"
        )
    for axis in ("fsdp", "context"):
        if getattr(parallel, axis) > 1 and model.remat == "none":
            raise ConfigError(
                f"model.remat=none: would keep every gathered weight under parallel.{axis}; choose products, hidden, "
                "attention or full"
            )
    context, length = parallel.context, train.sequence_length
    if context > 1 and length % (2 * context):
        raise ConfigError(
            f"train.sequence_length={length}: must be a multiple of {2 * context}, two pieces for each device along "
            f"parallel.context={context}; nearest {_nearest_multiple(length, 2 * context)}"
        )
    part = train.gradient_accumulation_steps * readers(parallel)
    if parallel.pipe > 1:
        part *= parallel.microbatch_size
    for name in ("batch_size", "batch_size_start"):
        size = getattr(train, name)
        if size is not None and size % part:
            raise ConfigError(
                f"train.{name}={size}: must be a multiple of {part}, the devices times gradient_accumulation_steps"
                f"{' times parallel.microbatch_size' if parallel.pipe > 1 else ''}"
                f"{' over parallel.context' if context > 1 else ''}; nearest {_nearest_multiple(size, part)}"
            )
    return parallel


def resolve_serving(parallel: ParallelConfig, model: ModelConfig, devices: int) -> ParallelConfig:
    """`parallel` with its open axis filled in, for a model that only writes or scores on so many devices.

    Raises:
        ConfigError: as `resolve`, and for axes that divide what a token at a time has not: stages and sequences.
    """
    for axis in ("pipe", "context"):
        if (size := getattr(parallel, axis)) != 1:
            raise ConfigError(f"parallel.{axis}={size}: does not write or score; divide by expert, fsdp and data")
    return _with_experts(parallel, model, 1, devices)


def make_mesh(parallel: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a resolved config.

    Neighbours along the last axis, `expert`, are the nearest devices: its all-to-all in every layer moves the most. An axis
    may take a part of one side of a TPU's torus, where no whole sides make its size.
    """
    devices = jax.devices() if devices is None else devices
    placed = mesh_utils.create_device_mesh(mesh_shape(parallel), devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_shape(parallel: ParallelConfig) -> tuple[int, ...]:
    """Sizes of MESH_AXES."""
    return tuple(getattr(parallel, axis) for axis in MESH_AXES)


def readers(parallel: ParallelConfig) -> int:
    """Devices, or groups of them along `context`, that have sequences of their own."""
    return math.prod(mesh_shape(parallel)) // parallel.context


def _with_experts(parallel: ParallelConfig, model: ModelConfig, length: int, devices: int) -> ParallelConfig:
    parallel = _filled(parallel, model, length, devices)
    _divides("parallel.expert", parallel.expert, "model.n_routed_experts", model.n_routed_experts)
    _divides("parallel.exchange_groups", parallel.exchange_groups, "parallel.expert", parallel.expert)
    return parallel


def _filled(parallel: ParallelConfig, model: ModelConfig, length: int, devices: int) -> ParallelConfig:
    shape = mesh_shape(parallel)
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and devices % known == 0:
        rest: dict[str, Any] = {MESH_AXES[shape.index(-1)]: devices // known}
        return dataclasses.replace(parallel, **rest)
    if known == devices:
        return parallel
    asked = " x ".join(f"{axis} {'rest' if size == -1 else size}" for axis, size in zip(MESH_AXES, shape))
    nearest = " ".join(
        f"parallel.{axis}={size}" for axis, size in zip(MESH_AXES, _nearest_shape(parallel, model, length, devices))
    )
    raise ConfigError(f"parallel: {asked} does not make the {devices} devices that are here; nearest {nearest}")


def _nearest_shape(parallel: ParallelConfig, model: ModelConfig, length: int, devices: int) -> tuple[int, ...]:
    """The mesh of that many devices whose sizes are the fewest doublings away from those asked for."""
    layers = expert_layers(model)

    def shapes(devices: int, axes: int) -> list[tuple[int, ...]]:
        if axes == 1:
            return [(devices,)]
        sizes = [size for size in range(1, devices + 1) if devices % size == 0]
        return [(size, *others) for size in sizes for others in shapes(devices // size, axes - 1)]

    def distance(shape: tuple[int, ...]) -> float:
        pairs = zip(shape, mesh_shape(parallel))
        return sum(abs(math.log2(size / asked)) for size, asked in pairs if asked != -1)

    possible = [shape for shape in shapes(devices, len(MESH_AXES))
                if model.n_routed_experts % shape[-1] == 0 and (shape[0] == 1 or shape[0] <= layers)
                and (shape[3] == 1 or length % (2 * shape[3]) == 0)]  # fmt: skip
    return min(possible, key=distance)


def _divides(name: str, size: int, whole_name: str, whole: int) -> None:
    if whole % size:
        divisors = [n for n in range(1, whole + 1) if whole % n == 0]
        nearest = sorted(divisors, key=lambda n: abs(n - size))[:2]
        raise ConfigError(f"{name}={size}: must divide {whole_name}={whole}; nearest {' or '.join(map(str, nearest))}")


def _nearest_multiple(size: int, part: int) -> int:
    return max(round(size / part), 1) * part

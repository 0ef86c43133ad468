"""What a whole run comes to, from one step's estimate: tokens per second, days, and the share of the peak."""

import dataclasses
import math
from dataclasses import dataclass

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import readers
from deepseek_jax.planning.figures import flops_by_part
from deepseek_jax.planning.topologies import Topology
from deepseek_jax.training.schedules import plan_steps

ROUNDS = 4
"""Micro-batches that a device reads for one accumulation part of a pipeline: with fewer the bubble grows, with more memory."""


@dataclass(frozen=True)
class RunFigures:
    """An estimate."""

    step_tokens: int
    step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_chip: float
    model_flops_per_chip: float
    """A second, of the products that the model's mathematics asks for: nothing made again, causal attention."""
    mfu: float
    """Their share of the machine's bfloat16 peak."""
    total_tokens: int
    days: float
    chip_hours: float


def run_figures(config: Config, topology: Topology, step_seconds: float) -> RunFigures:
    """Of all of the run's steps at the pace of the one that was compiled, the largest."""
    train, machine = config.train, topology.machine
    step_tokens = train.batch_size * train.sequence_length
    flops = sum(part.forward + part.backward for part in flops_by_part(config.model, train.sequence_length).values())
    per_second = step_tokens / step_seconds
    chips = topology.devices / machine.devices_per_chip
    total = sum(plan.batch_size for plan in plan_steps(train)) * train.sequence_length
    seconds = total / per_second
    return RunFigures(
        step_tokens,
        step_seconds,
        per_second,
        per_second / chips,
        flops * per_second / chips,
        flops * per_second / topology.devices / machine.bf16_flops,
        total,
        seconds / 86400,
        seconds * chips / 3600,
    )


def accumulated(config: Config) -> Config:
    """`config` with accumulation parts that leave a device one sequence at a time, in a pipeline ROUNDS micro-batches.

    Its mesh is resolved. A config that names a number of parts keeps it.
    """
    train, parallel = config.train, config.parallel
    if train.gradient_accumulation_steps != 1:
        return config
    own = train.batch_size // readers(parallel)
    at_once = math.gcd(own, ROUNDS * parallel.microbatch_size) if parallel.pipe > 1 else 1
    return dataclasses.replace(config, train=dataclasses.replace(train, gradient_accumulation_steps=own // at_once))

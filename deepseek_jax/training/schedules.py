"""What changes from step to step (report 4.2): batch size, learning rate, gamma and lambda.

All of it is a function of the tokens seen so far, computed on the host and handed to the compiled
step as plain numbers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepseek_jax.config import Phase, TrainConfig


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    step: int
    """Counted from 1."""
    first_sequence: int
    """Number of the first training sequence of its batch."""
    batch_size: int
    """Sequences."""
    learning_rate: float
    bias_update_speed: float
    mtp_loss_weight: float


def plan_steps(train: TrainConfig) -> Iterator[StepPlan]:
    """Every step of a run, in order; tokens are counted before the step."""
    end = sum(_batch_sizes(train)) * train.sequence_length
    sequences = 0
    for step, batch_size in enumerate(_batch_sizes(train), start=1):
        tokens = sequences * train.sequence_length
        warmup = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
        warmup_end = train.warmup_steps * (train.batch_size_start or train.batch_size) * train.sequence_length
        decay = value_at(train.learning_rate_decay, tokens, end, start=1.0, since=warmup_end)
        yield StepPlan(
            step=step,
            first_sequence=sequences,
            batch_size=batch_size,
            learning_rate=train.learning_rate * warmup * decay,
            bias_update_speed=value_at(train.bias_update_speed, tokens, end),
            mtp_loss_weight=value_at(train.mtp_loss_weight, tokens, end),
        )
        sequences += batch_size


def _batch_sizes(train: TrainConfig) -> Iterator[int]:
    """Sequences of each step: whole multiples of the starting size, so that few sizes are compiled."""
    start = train.batch_size_start or train.batch_size
    tokens = 0
    for _ in range(train.steps):
        ramp = train.batch_size_ramp_tokens
        grown = start + (train.batch_size - start) * min(1.0, tokens / ramp) if ramp else train.batch_size
        size = int(grown) // start * start
        yield size
        tokens += size * train.sequence_length


def value_at(phases: Sequence[Phase], tokens: int, end: int, start: float | None = None, since: int = 0) -> float:
    """Value of a schedule after `tokens` tokens.

    Args:
        phases: in order; an open last phase ends at `end`.
        start: value before the first phase; by default that phase's own, so that it is constant.
        since: tokens at which the first phase begins.
    """
    before = phases[0].to if start is None else start
    begin = since
    for phase in phases:
        until = end if phase.until is None else phase.until
        if tokens < until or phase is phases[-1]:
            progress = min(max((tokens - begin) / max(until - begin, 1), 0.0), 1.0)
            return before + (phase.to - before) * _eased(phase.shape, progress)
        before, begin = phase.to, until
    raise AssertionError("a schedule has at least one phase")


def _eased(shape: str, progress: float) -> float:
    if shape == "constant":
        return 1.0
    return progress if shape == "linear" else (1 - math.cos(math.pi * progress)) / 2

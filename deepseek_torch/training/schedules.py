"""What changes from step to step (report 4.2): batch size, learning rate, gamma and lambda.

All of it is a function of the tokens seen so far. Written apart from the JAX sibling's, so that a
mistake in a schedule shows as a difference between the two.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepseek_jax.config import Phase, TrainConfig
from deepseek_jax.training.schedules import Position

START = Position()


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
    tokens: int
    """Seen when it is done."""


def plan_steps(train: TrainConfig, since: Position = START) -> Iterator[StepPlan]:
    """Every step of a run after `since`, in order; tokens are counted before the step."""
    sizes = batch_sizes(train, since)
    end = since.tokens + sum(sizes) * train.sequence_length
    first_size = train.batch_size if train.batch_size_start is None else train.batch_size_start
    warmup_tokens = train.warmup_steps * first_size * train.sequence_length
    seen, tokens = since.sequences, since.tokens
    for number, size in enumerate(sizes, start=since.step + 1):
        decay = value_at(train.learning_rate_decay, tokens, end, start=1.0, since=warmup_tokens)
        learning_rate = train.learning_rate * decay
        if number < train.warmup_steps:
            learning_rate *= number / train.warmup_steps
        gamma = value_at(train.bias_update_speed, tokens, end)
        mtp_weight = value_at(train.mtp_loss_weight, tokens, end)
        yield StepPlan(number, seen, size, learning_rate, gamma, mtp_weight, tokens + size * train.sequence_length)
        seen += size
        tokens += size * train.sequence_length


def batch_sizes(train: TrainConfig, since: Position = START) -> list[int]:
    """Sequences of every step: growing in a straight line over the ramp's tokens, by multiples of the first size."""
    sizes, tokens = [], since.tokens
    for _ in range(since.step, train.steps):
        size = train.batch_size
        if train.batch_size_start is not None and tokens < train.batch_size_ramp_tokens:
            first, share = train.batch_size_start, tokens / train.batch_size_ramp_tokens
            grown = first + (train.batch_size - first) * share
            size = first * math.floor(grown / first)
        sizes.append(size)
        tokens += size * train.sequence_length
    return sizes


def value_at(phases: Sequence[Phase], tokens: int, end: int, start: float | None = None, since: int = 0) -> float:
    """Value of a schedule after `tokens` tokens.

    Args:
        phases: in order; an open last phase ends at `end`.
        start: value before the first phase; by default that phase's own, so that it is constant.
        since: tokens at which the first phase begins.
    """
    value, begin = phases[0].to if start is None else start, since
    for phase in phases:
        until = end if phase.until is None else phase.until
        if tokens < until:
            return value + (phase.to - value) * _progress(phase.shape, tokens - begin, until - begin)
        value, begin = phase.to, until
    return value


def _progress(shape: str, done: int, whole: int) -> float:
    """From 0 to 1 how far a phase has changed the value."""
    share = min(max(done / whole, 0.0), 1.0) if whole > 0 else 0.0
    return {"constant": 1.0, "linear": share, "cosine": 0.5 - 0.5 * math.cos(math.pi * share)}[shape]

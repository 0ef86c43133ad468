"""What changes from step to step (report 4.2): batch size, learning rate, gamma and lambda.

All of it is a function of the tokens seen so far, computed on the host and handed to the compiled
step as plain numbers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepseek_jax.config import Phase, TrainConfig


@dataclass(frozen=True)
class Position:
    """How far a run has come, counted as it goes and saved with it: no config that is given later can say."""

    step: int = 0
    sequences: int = 0
    """Taken from the endless stream of training sequences."""
    tokens: int = 0
    epochs: float = 0.0
    """Times that the training text was seen."""

    def after(self, plan: "StepPlan", windows: int | None = None) -> "Position":
        """When this step is done, in a text of so many training sequences, if that matters."""
        epochs = self.epochs + (plan.batch_size / windows if windows else 0)
        return Position(plan.step, self.sequences + plan.batch_size, plan.tokens, epochs)


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


def plan_steps(train: TrainConfig, since: Position = Position()) -> Iterator[StepPlan]:
    """Every step of a run after `since`, in order."""
    end = since.tokens + sum(_batch_sizes(train, since)) * train.sequence_length
    for batch_size in _batch_sizes(train, since):
        plan = plan_step(train, since, batch_size, end)
        yield plan
        since = since.after(plan)


def plan_step(train: TrainConfig, since: Position, batch_size: int, end: int) -> StepPlan:
    """The step after `since`; schedules go by the tokens seen before it, and open ones last until `end` tokens."""
    step, tokens = since.step + 1, since.tokens
    warmup = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    warmup_end = train.warmup_steps * (train.batch_size_start or train.batch_size) * train.sequence_length
    decay = value_at(train.learning_rate_decay, tokens, end, start=1.0, since=warmup_end)
    return StepPlan(
        step=step,
        first_sequence=since.sequences,
        batch_size=batch_size,
        learning_rate=train.learning_rate * warmup * decay,
        bias_update_speed=value_at(train.bias_update_speed, tokens, end),
        mtp_loss_weight=value_at(train.mtp_loss_weight, tokens, end),
        tokens=tokens + batch_size * train.sequence_length,
    )


def _batch_sizes(train: TrainConfig, since: Position) -> Iterator[int]:
    """Sequences of each step: whole multiples of the starting size, so that few sizes are compiled."""
    start = train.batch_size_start or train.batch_size
    tokens = since.tokens
    for _ in range(since.step, train.steps):
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
        if tokens < until:
            progress = (tokens - begin) / (until - begin) if tokens > begin else 0.0
            return before + (phase.to - before) * _eased(phase.shape, progress)
        before, begin = phase.to, until
    return before


def _eased(shape: str, progress: float) -> float:
    if shape == "constant":
        return 1.0
    return progress if shape == "linear" else (1 - math.cos(math.pi * progress)) / 2

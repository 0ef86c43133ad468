"""The steps of a run: what is told, evaluated and saved along the way, and what ends it early."""

import faulthandler
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import MESH_AXES, Config
from deepseek_jax.data.loader import part_size, training_sequences
from deepseek_jax.data.packing import PreparedData
from deepseek_jax.errors import UserError
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.sharding import Division, place_batch
from deepseek_jax.training.average import Average, places
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.culprit import Search
from deepseek_jax.training.evaluation import Evaluation
from deepseek_jax.training.goodput import Times, goodput, goodput_text
from deepseek_jax.training.local_checkpoint import LocalCheckpoints
from deepseek_jax.training.metrics import MetricsFile, Progress, evaluation_line, evaluation_text, expert_line
from deepseek_jax.training.plot import PLOT_FILE, plot_experts, plot_run
from deepseek_jax.training.schedules import Position, StepPlan, plan_steps
from deepseek_jax.training.speed import share_of_peak
from deepseek_jax.training.spikes import SpikeWatch
from deepseek_jax.training.step import Scalars, StepMetrics, TrainState, make_step
from deepseek_jax.training.stragglers import Stragglers
from deepseek_jax.training.trackers import make_trackers
from deepseek_jax.training.where import MOST, too_many_skips

TRACE = "trace"
"""Folder of a run directory."""


class _Wishes(NamedTuple):
    """What a process wants after a step; all do it after the same one."""

    stop: bool | jax.Array = False
    save: bool | jax.Array = False


class Loop:
    """The steps of a run and what is written along the way."""

    def __init__(self, config: Config, run_dir: Path, data: PreparedData, checkpoints: Checkpoints, position: Position,
                 local: LocalCheckpoints, division: Optional[Division], times: Times):  # fmt: skip
        train = config.train
        self._config, self._run_dir, self._checkpoints, self._position = config, run_dir, checkpoints, position
        self._local = local
        self._windows = training_sequences(config, data.sets)
        self._division = division
        self._evaluation = Evaluation(config, data, division)
        is_first = processes.is_first()
        trackers = make_trackers(config, run_dir, position.step) if is_first else []
        self._metrics = MetricsFile(run_dir, position.step, is_first, trackers)
        self._progress = Progress(train.steps, share_of_peak(config, jax.devices()))
        self._times, self._spikes = times, SpikeWatch()
        self._stragglers = Stragglers() if jax.process_count() > 1 else None
        self._step = make_step(config, division)
        self._interrupted = False
        self._saved, self._saved_at = position.step, time.monotonic()
        self._skipped, self._traces = 0, False
        self._any = jax.jit(lambda flags: jnp.any(flags, axis=0))

    def run(self, state: TrainState) -> TrainState:
        """Take every remaining step; the state that is given is used up."""
        train = self._config.train
        self._times.start(self._run_dir if processes.is_first() else None)
        previous = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            told: tuple[StepPlan, StepMetrics] | None = None
            asked = _Wishes()
            average = self._average(state)
            for plan in plan_steps(train, self._position):
                self._trace(plan.step)
                state, metrics = self._step(state, self._batch(plan), _scalars(plan, self._config))
                self._watch()
                if average is not None:
                    average.update(state.params, metrics.skipped)
                # Telling of the step before keeps the device busy while the host reads its metrics.
                self._tell(told, state)
                told = (plan, metrics)
                self._position = self._position.after(plan, len(self._windows))
                asked, wishes = self._wishes(asked)
                end = plan.step == train.steps or bool(wishes.stop)
                saves = end or plan.step % train.checkpoint_every == 0 or bool(wishes.save)
                keeps = not saves and train.local_checkpoint_dir is not None and plan.step % train.local_checkpoint_every == 0
                # What is told of a step is told before it is saved: who goes on from there does not tell it again.
                # The step that ends the run is made again from the state as it was: none may come after it.
                if saves or keeps or plan.step % train.eval_every == 0 or self._skipped + 1 >= train.max_skips:
                    self._tell(told, state)
                    told = None
                with self._progress.aside():
                    if plan.step % train.eval_every == 0 or plan.step == train.steps:
                        with self._times.aside("evaluating"):
                            self._evaluate(plan, state)
                    if keeps:
                        with self._times.aside("saving"):
                            self._local.save(self._position, state)
                    if saves:
                        with self._times.aside("saving"):
                            self._checkpoints.save(self._position, state, average and average.params)
                        self._times.write(plan.step)
                        self._saved, self._saved_at = plan.step, time.monotonic()
                        asked = asked._replace(save=False)  # or a wish from before it would save once more
                if end:
                    break
        finally:
            self._end_trace()
            faulthandler.cancel_dump_traceback_later()
            for number, handler in previous.items():
                signal.signal(number, handler)
            with self._times.aside("saving"):
                self._checkpoints.wait()
            self._times.write(self._position.step)
            self._metrics.close()
        if self._saved < train.steps:
            raise Interrupted(f"interrupted; step {self._saved} is saved: --resume run_dir={self._run_dir} goes on from it")
        self._plot()
        if processes.is_first() and (seconds := goodput(self._run_dir, self._saved)):
            print(goodput_text(seconds))
        print(f"loss plot: {self._run_dir / PLOT_FILE}")
        return state

    def _average(self, state: TrainState) -> Average | None:
        """Of the weights, if one is asked for: the one that was saved, or it begins here."""
        train, step = self._config.train, self._position.step
        if not train.ema_decay:
            return None
        so_far = self._checkpoints.restore_average(step, places(train, state.params)) if step else None
        return Average(train, state.params, so_far)

    def _watch(self) -> None:
        """Tell every thread's stack if no other step is on its way in time; the first is once it is compiled."""
        seconds = self._config.train.hang_after
        if seconds and sys.__stderr__ is not None:  # not `sys.stderr`, which may be a notebook's
            faulthandler.dump_traceback_later(seconds, repeat=True, file=sys.__stderr__)

    def _trace(self, step: int) -> None:
        """Begin or end a trace before this step."""
        train = self._config.train
        if train.profile:
            first, last = map(int, train.profile.split("-"))
            if step == first:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # else Python's own calls fill it
                jax.profiler.start_trace(self._run_dir / TRACE, profiler_options=options)
                self._traces = True
            if step == last + 1:
                self._end_trace()

    def _end_trace(self) -> None:
        if self._traces:
            self._traces = False
            with self._progress.aside(), self._times.aside("saving"):
                jax.profiler.stop_trace()
            self._progress.note(f"steps {self._config.train.profile} are traced in {self._run_dir / TRACE}")

    def _wishes(self, asked: _Wishes) -> tuple[_Wishes, _Wishes]:
        """What to pass in after the next step, and what all processes do now: wishes of any, as of the step before."""
        minutes = self._config.train.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        own = _Wishes(self._interrupted, late)
        if jax.process_count() == 1:
            return own, own
        shape = jax.device_count(), len(own)
        flags = place_batch(
            self._division, shape, 0, lambda start, end: np.tile(np.array(own), (end - start, 1)), axes=MESH_AXES
        )
        return _Wishes(*self._any(flags)), asked

    def _interrupt(self, signum: int, frame: object) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self._progress.note("stopping after this step and saving; press Ctrl-C again to stop at once")

    def _batch(self, plan: StepPlan) -> jax.Array | np.ndarray:
        """[A, B / A, ...] of the largest batch that there will be; a process reads the sequences of its own devices."""
        train, size = self._config.train, part_size(self._config.train)

        def read(start: int, end: int) -> np.ndarray:
            begin = time.monotonic()
            found = self._sequences(plan, start, end)
            if self._stragglers is not None:
                self._stragglers.read(time.monotonic() - begin)
            return np.pad(found, [(0, train.batch_size // size - len(found)), (0, 0), (0, 0)])

        return place_batch(self._division, (train.batch_size // size, size, self._windows.window), 1, read)

    def _sequences(self, plan: StepPlan, start: int, end: int) -> np.ndarray:
        """Of each part of a batch the sequences from `start` to `end`."""
        size = part_size(self._config.train)
        firsts = range(plan.first_sequence + start, plan.first_sequence + plan.batch_size, size)
        return np.stack([self._windows.take(first, end - start) for first in firsts])

    def _tell(self, told: tuple[StepPlan, StepMetrics] | None, state: TrainState) -> None:
        """Write and show a step's metrics."""
        if told is None:
            return
        plan, metrics = told
        metrics = jax.device_get(metrics)
        self._times.stepped(plan.step, bool(metrics.skipped))
        if metrics.skipped:
            self._skip(plan, metrics, state)
            return
        self._skipped = 0
        first, *further = (float(nats) for nats in metrics.parts.cross_entropy)
        limited = {} if metrics.parts.dropped is None else {"dropped": float(metrics.parts.dropped)}
        if metrics.parts.largest_scores is not None:
            limited["max_attention_score"] = max(float(scores.max()) for scores in metrics.parts.largest_scores.values())
        experts = expert_line(metrics.parts.counts)
        self._metrics.write(
            step=plan.step,
            tokens=plan.tokens,
            loss=float(metrics.loss),
            next_token_loss=first,
            mtp_losses=further,
            balance_loss=float(metrics.parts.balance_loss),
            grad_norm=float(metrics.grad_norm),
            learning_rate=plan.learning_rate,
            **experts,
            **limited,
        )
        mtp = {"mtp": sum(further) / len(further)} if further else {}
        norm, rate = metrics.grad_norm, plan.learning_rate
        worst = {"load": experts["max_expert_load"]} if metrics.parts.counts else {}
        self._progress.step(plan.step, plan.tokens, loss=first, **mtp, grad=norm, lr=rate, **worst, **limited)
        if (median := self._spikes.look(first)) is not None:
            self._progress.note(f"step {plan.step}: the loss jumps to {first:.4g}, from a median of {median:.4g} before it")

    def _skip(self, plan: StepPlan, metrics: StepMetrics, state: TrainState) -> None:
        """Tell of a step that changed nothing; raises `UserError` when there were too many in a row."""
        self._skipped += 1
        self._metrics.write(step=plan.step, tokens=plan.tokens, skipped=self._skipped)
        numbers = f"loss {metrics.loss:.4g}, gradient norm {metrics.grad_norm:.4g}"
        told = f"step {plan.step}: no update: {numbers}; not finite: {_not_finite(metrics.squares)}"
        self._progress.note(told)
        if self._skipped < self._config.train.max_skips:
            return
        self._progress.note("looking where it began")
        batch = self._sequences(plan, 0, part_size(self._config.train))
        where = Search(self._config, self._division).find(state, batch, _scalars(plan, self._config)._replace(parts=None))
        raise UserError(too_many_skips(plan.step, numbers, where, self._skipped))

    def _evaluate(self, plan: StepPlan, state: TrainState) -> None:
        bits = self._evaluation.by_set(state)
        self._metrics.write(step=plan.step, tokens=plan.tokens, **evaluation_line(bits))
        self._progress.note(evaluation_text(plan.step, bits))
        if self._stragglers is not None:
            for line in self._stragglers.look():
                self._progress.note(f"step {plan.step}: {line}")
        self._plot()

    def _plot(self) -> None:
        if processes.is_first():
            plot_run(self._run_dir)
            plot_experts(self._run_dir)


class Interrupted(UserError):
    """Ctrl-C; everything up to the step named is saved."""

    exit_code = 130


def _not_finite(squares: Any) -> str:
    """The gradients that are no numbers, by name. Backward from the loss, they are finite down to where it began."""
    leaves, _ = jax.tree.flatten_with_path(squares)
    names = [".".join(key.key for key in path) for path, square in leaves if not math.isfinite(square)]
    if len(names) == len(leaves):
        return "every gradient, so it began on the way to the loss"
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more if names else "the loss alone"


def _scalars(plan: StepPlan, config: Config) -> Scalars:
    dtype = np.float64 if config.model.precision == "float64" else np.float32
    scheduled = Scalars(*(dtype(x) for x in (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)))
    grows = config.train.batch_size_start not in (None, config.train.batch_size)
    return scheduled._replace(parts=np.int32(plan.batch_size // part_size(config.train)) if grows else None)

"""Train a model on text: `python -m deepseek_jax.train --config quickstart data.input=my.txt run_dir=RUN`.

The story of a run: read the config, fit it to the devices, turn text into tokens, make or restore the state, then step,
evaluate and save until the last step. RUN then holds config.yaml, tokenizer.json, metrics.jsonl, loss.png and
checkpoints. Of several processes the first alone talks and writes all but the checkpoints.
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, ConfigError, load_config, presets, to_yaml
from deepseek_jax.data.loader import Windows
from deepseek_jax.data.packing import PreparedData, is_prepared, open_prepared, prepare
from deepseek_jax.errors import UserError, run_command, write_atomically
from deepseek_jax.implementations import choose
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.mesh import resolve
from deepseek_jax.parallel.sharding import Division, place_batch
from deepseek_jax.parallel.summary import mesh_summary
from deepseek_jax.planning.figures import count_parameters
from deepseek_jax.precision.fp8 import require_fp8
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.evaluation import Evaluation
from deepseek_jax.training.metrics import METRICS_FILE, MetricsFile, Progress
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.plot import PLOT_FILE, plot_run
from deepseek_jax.training.schedules import StepPlan, plan_steps
from deepseek_jax.training.step import Scalars, StepMetrics, TrainState, init_state, make_step

CONFIG_FILE = "config.yaml"


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_jax.train",
        description="Train a DeepSeek-V3 on text.",
        epilog="example: python -m deepseek_jax.train --config quickstart data.input=my.txt train.steps=200 run_dir=my-run",
    )
    parser.add_argument("--config", help=f"a .yaml file or a preset ({', '.join(presets())})")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of run_dir")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes that SLURM, a TPU pod, Kubernetes or mpirun started; "
        "scripts/launch_local needs no such word",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields of the config to change")
    args = parser.parse_intermixed_args()
    run_command(lambda: start(args))


def start(args: argparse.Namespace) -> None:
    """Train as the command line says, in one process or as one of several."""
    processes.join(args.distributed)
    with processes.together():
        if not processes.is_first():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        train(read_config(args.config, args.resume, args.overrides), args.resume)


def read_config(source: str | None, resume: bool, overrides: list[str]) -> Config:
    """The config given; or that of the run to resume, found by its run_dir override."""
    if source is not None:
        return load_config(source, overrides)
    run_dir = next((word.partition("=")[2] for word in overrides if word.startswith("run_dir=")), None)
    if not resume or not run_dir:
        raise ConfigError("give --config FILE, or --resume run_dir=DIR to go on with the config of that run")
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: not there, so {run_dir} holds no run to resume")
    return load_config(path, overrides)


def train(config: Config, resume: bool = False, variables: Optional[dict[str, Any]] = None) -> TrainState:
    """Train `config` to its last step, and return the state then.

    Args:
        resume: go on from the run's last checkpoint.
        variables: what a new run starts from instead of fresh weights; they stay as they are.

    Raises:
        UserError: for anything the user can mend; the last checkpoint stays usable.
    """
    if config.model.precision == "fp8":
        require_fp8()
    # The default would cut float32 products down to bfloat16 or TF32 on a TPU or GPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    asked, config = config, dataclasses.replace(config, parallel=resolve(config, jax.device_count()))
    config = choose(config, jax.default_backend())
    fresh = jax.eval_shape(partial(init_state, config))
    division = Division(config.parallel, fresh.params) if jax.device_count() > 1 else None
    shardings = None if division is None else division.shardings(fresh, make_optimizer(config.train))
    run_dir = Path(config.run_dir)
    if not resume and (run_dir / METRICS_FILE).exists():
        raise ConfigError(f"{run_dir} already holds a run: add --resume to go on with it, or give another run_dir")
    if resume and config.data.tokenizer is None and not is_prepared(config, run_dir):
        raise ConfigError(
            f"data.input={config.data.input}: not the text that {run_dir} was trained on; to go on with other text "
            f"keep its tokenizer, data.tokenizer={run_dir}/tokenizer.json, or else start a new run_dir"
        )
    processes.first_alone(lambda: prepare(config, run_dir))
    data = open_prepared(config, run_dir)
    checkpoints = Checkpoints(run_dir, config, shardings)
    last_step = checkpoints.latest() if resume else None
    if last_step is None:
        state = jax.jit(partial(init_state, config), out_shardings=shardings)(variables)
    else:
        state = checkpoints.restore(last_step)
    _describe(config, data, last_step)
    if division is not None:
        print(mesh_summary(config, division, fresh, shardings), flush=True)
    processes.first_alone(lambda: write_atomically(run_dir / CONFIG_FILE, to_yaml(asked)))
    loop = _Loop(config, run_dir, data, checkpoints, last_step or 0, division)
    return loop.run(state)


def _describe(config: Config, data: PreparedData, last_step: int | None) -> None:
    count = count_parameters(config.model)
    print(f"{config.run_dir}: {'resuming after step ' + str(last_step) if last_step else 'a new run'}")
    mtp = f", and {count.mtp:,} in MTP modules" if count.mtp else ""
    print(f"model: {count.total:,} parameters, {count.active:,} active per token{mtp}; {config.model.precision}")
    print(f"data: {len(data.train):,} tokens to train on, {len(data.held_out):,} held out")
    tokens = sum(plan.batch_size for plan in plan_steps(config.train)) * config.train.sequence_length
    print(f"plan: {config.train.steps:,} steps, {tokens:,} tokens; device: {jax.devices()[0].device_kind}", flush=True)


class _Loop:
    """The steps of a run and what is written along the way."""

    def __init__(self, config: Config, run_dir: Path, data: PreparedData, checkpoints: Checkpoints, last_step: int,
                 division: Optional[Division]):  # fmt: skip
        train = config.train
        self._config, self._run_dir, self._checkpoints, self._last_step = config, run_dir, checkpoints, last_step
        depth = config.model.num_nextn_predict_layers
        self._windows = Windows(data.train, train.sequence_length + 1 + depth, train.sequence_length, config.data.seed)
        self._division = division
        self._evaluation = Evaluation(config, data, division)
        self._metrics = MetricsFile(run_dir, last_step, is_writer=processes.is_first())
        self._progress = Progress(last_step, train.steps, train.batch_size * train.sequence_length)
        self._step = make_step(config, division)
        self._interrupted = False
        self._any = jax.jit(jnp.any)

    def run(self, state: TrainState) -> TrainState:
        """Take every remaining step; the state that is given is used up."""
        train, saved = self._config.train, self._last_step
        previous = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            told: tuple[StepPlan, StepMetrics] | None = None
            asked: bool | jax.Array = False
            for plan in plan_steps(train):
                if plan.step <= self._last_step:
                    continue
                state, metrics = self._step(state, self._batch(plan), _scalars(plan, self._config))
                # Telling of the step before keeps the device busy while the host reads its metrics.
                self._tell(told)
                told = (plan, metrics)
                asked, stop = self._whether_to_stop(asked)
                end = plan.step == train.steps or stop
                if end or plan.step % train.eval_every == 0 or plan.step % train.checkpoint_every == 0:
                    self._tell(told)
                    told = None
                with self._progress.aside():
                    if plan.step % train.eval_every == 0 or plan.step == train.steps:
                        self._evaluate(plan, state)
                    if end or plan.step % train.checkpoint_every == 0:
                        self._checkpoints.save(plan.step, state)
                        saved = plan.step
                if end:
                    break
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._checkpoints.wait()
        if saved < train.steps:
            raise Interrupted(f"interrupted; step {saved} is saved: --resume run_dir={self._run_dir} goes on from it")
        self._plot()
        print(f"loss plot: {self._run_dir / PLOT_FILE}")
        return state

    def _whether_to_stop(self, asked: bool | jax.Array) -> tuple[bool | jax.Array, bool]:
        """What to pass in after the next step, and whether Ctrl-C ends the run now, on all processes after the same step."""
        if jax.process_count() == 1:
            return False, self._interrupted
        own = self._interrupted
        flags = place_batch(self._division, (jax.device_count(),), 0, lambda start, end: np.full(end - start, own))
        return self._any(flags), bool(asked)

    def _interrupt(self, signum: int, frame: object) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self._progress.note("stopping after this step and saving; press Ctrl-C again to stop at once")

    def _batch(self, plan: StepPlan) -> jax.Array | np.ndarray:
        """[A, B / A, ...]; a process reads the sequences of its own devices."""
        parts = self._config.train.gradient_accumulation_steps
        size = plan.batch_size // parts

        def read(start: int, end: int) -> np.ndarray:
            firsts = (plan.first_sequence + part * size + start for part in range(parts))
            return np.stack([self._windows.take(first, end - start) for first in firsts])

        return place_batch(self._division, (parts, size, self._windows.window), 1, read)

    def _tell(self, told: tuple[StepPlan, StepMetrics] | None) -> None:
        """Write and show a step's metrics."""
        if told is None:
            return
        plan, metrics = told
        metrics = jax.device_get(metrics)
        loss = float(metrics.loss)
        if not math.isfinite(loss):
            raise UserError(
                f"step {plan.step}: the loss is {loss}; lower train.learning_rate and go on from the last checkpoint"
            )
        first, *further = (float(nats) for nats in metrics.parts.cross_entropy)
        dropped = {} if metrics.parts.dropped is None else {"dropped": float(metrics.parts.dropped)}
        load = [float((counts / counts.mean(axis=-1, keepdims=True)).max()) for counts in metrics.parts.counts.values()]
        self._metrics.write(
            step=plan.step,
            tokens=(plan.first_sequence + plan.batch_size) * self._config.train.sequence_length,
            loss=loss,
            next_token_loss=first,
            mtp_losses=further,
            balance_loss=float(metrics.parts.balance_loss),
            grad_norm=float(metrics.grad_norm),
            learning_rate=plan.learning_rate,
            max_expert_load=max(load, default=1.0),
            **dropped,
        )
        self._progress.step(plan.step, loss=first, **dropped)

    def _evaluate(self, plan: StepPlan, state: TrainState) -> None:
        bits = self._evaluation.bits_per_byte(state)
        tokens = (plan.first_sequence + plan.batch_size) * self._config.train.sequence_length
        self._metrics.write(step=plan.step, tokens=tokens, bits_per_byte=bits)
        self._progress.note(f"step {plan.step}: {bits:.3f} bits per byte on the held-out text")
        self._plot()

    def _plot(self) -> None:
        if processes.is_first():
            plot_run(self._run_dir)


class Interrupted(UserError):
    """Ctrl-C; everything up to the step named is saved."""

    exit_code = 130


def _scalars(plan: StepPlan, config: Config) -> Scalars:
    dtype = np.float64 if config.model.precision == "float64" else np.float32
    return Scalars(*(dtype(x) for x in (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)))


if __name__ == "__main__":
    main()

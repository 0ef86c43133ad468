"""Train a model on text: `python -m deepseek_jax.train --config quickstart data.input=my.txt run_dir=RUN`.

The story of a run: read the config, fit it to the devices, turn text into tokens, make or restore the state, then step,
evaluate and save until the last step. RUN then holds config.yaml, tokenizer.json, metrics.jsonl, loss.png and
checkpoints. Of several processes the first alone talks and writes all but the checkpoints.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Optional

import jax
from flax.traverse_util import flatten_dict

from deepseek_jax.compilation import keep_programs
from deepseek_jax.config import Config, ConfigError, load_config, presets, to_yaml
from deepseek_jax.config.trainable import check_trainable, trainable
from deepseek_jax.data.conversations import keep_texts
from deepseek_jax.data.eval_sets import check_sets, make_sets, open_sets
from deepseek_jax.data.packing import PreparedData, open_prepared, prepare
from deepseek_jax.errors import report, run_command, write_atomically
from deepseek_jax.implementations import choose
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.mesh import resolve
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.parallel.summary import mesh_summary
from deepseek_jax.planning.figures import count_parameters
from deepseek_jax.precision.fp8 import require_fp8
from deepseek_jax.training import initial
from deepseek_jax.training.adapters import describe_adapters
from deepseek_jax.training.checkpoint import CHECKPOINTS, Checkpoints, DamagedCheckpoint
from deepseek_jax.training.goodput import Times, goodput, goodput_text
from deepseek_jax.training.local_checkpoint import LocalCheckpoints
from deepseek_jax.training.lock import sole_use
from deepseek_jax.training.loop import Loop
from deepseek_jax.training.metrics import METRICS_FILE, check_metrics
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.plot import plot_schedule
from deepseek_jax.training.resume import check_changes, check_same_text
from deepseek_jax.training.schedules import Position, plan_steps
from deepseek_jax.training.stages import CONFIG_FILE, train_stages
from deepseek_jax.training.step import TrainState, init_state


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m deepseek_jax.train",
        description="Train a DeepSeek-V3 on text.",
        epilog="examples: python -m deepseek_jax.train --config quickstart data.input=my.txt train.steps=200 run_dir=my-run; "
        "python -m deepseek_jax.train init_from=my-model data.input=my.txt train.steps=200 run_dir=tuned",
    )
    parser.add_argument("--config", help=f"a .yaml file or a preset ({', '.join(presets())})")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of run_dir")
    parser.add_argument(
        "--allow", metavar="FIELD", action="append", default=[],
        help="with --resume: go on although this field, such as train.steps, differs from the checkpoint's",
    )  # fmt: skip
    parser.add_argument(
        "--show-schedule", metavar="PNG", type=Path, help="draw batch, rate, gamma and lambda over the tokens, and do no more"
    )
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
    if args.show_schedule:
        config = read_config(args.config, args.resume, args.overrides)
        print(f"schedule: {plot_schedule(config.train, args.show_schedule)}")
        return
    processes.join(args.distributed)
    with processes.together():
        if not processes.is_first():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        config = read_config(args.config, args.resume, args.overrides)
        if config.stages:
            train_stages(train, config, args.resume, args.allow)
        else:
            train(config, args.resume, allowed=args.allow)


def read_config(source: str | None, resume: bool, overrides: list[str]) -> Config:
    """The config given; or that of the weights to start from, or of the run to resume, found by init_from= or run_dir=."""
    if source is not None:
        return load_config(source, overrides)
    if initial.is_named(overrides) and not resume:
        return initial.config_of(overrides)
    run_dir = next((word.partition("=")[2] for word in overrides if word.startswith("run_dir=")), None)
    if not resume or not run_dir:
        raise ConfigError(
            "give --config FILE, init_from=DIR to train the model there on, or --resume run_dir=DIR to go on with that run"
        )
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: not there, so {run_dir} holds no run to resume")
    return load_config(path, overrides)


def train(
    config: Config, resume: bool = False, variables: Optional[dict[str, Any]] = None, allowed: Collection[str] = ()
) -> TrainState:
    """Train `config` to its last step, and return the state then.

    Args:
        resume: go on from the run's last checkpoint.
        variables: what a new run starts from instead of fresh weights or those of init_from; they stay as they are.
        allowed: fields that may differ from the checkpoint's, as `--allow` names them.

    Raises:
        UserError: for anything the user can mend; the last checkpoint stays usable.
    """
    times = Times()
    if config.model.precision == "fp8":
        require_fp8()
    if config.model.precision == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise ConfigError("model.precision=float64: JAX computes in float32 unless JAX_ENABLE_X64=1 is in the environment")
    # The default would cut float32 products down to bfloat16 or TF32 on a TPU or GPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    keep_programs(config.compilation_cache)
    config = initial.with_tokenizer(config)
    asked, config = config, dataclasses.replace(config, parallel=resolve(config, jax.device_count()))
    config = choose(config, jax.default_backend())
    fresh = jax.eval_shape(partial(init_state, config))
    check_trainable(config.train.trainable, flatten_dict(fresh.params))
    division = Division(config.parallel, fresh.params) if jax.device_count() > 1 else None
    shardings = None if division is None else division.shardings(fresh, make_optimizer(config.train), trainable(config))
    run_dir = Path(config.run_dir)
    if not resume and (run_dir / METRICS_FILE).exists():
        raise ConfigError(f"{run_dir} already holds a run: add --resume to go on with it, or give another run_dir")
    with sole_use(run_dir) if processes.is_first() else nullcontext():
        local = LocalCheckpoints(config, run_dir, shardings)
        resumed = _resumed(config, run_dir, local, shardings, allowed) if resume else None
        if resumed is not None:
            check_metrics(run_dir, resumed[0].step, resumed[0].tokens)
        local.clear(after=resumed[0].step if resumed else 0)
        if resumed is None and config.init_from is not None:
            variables = initial.initial_variables(config) if variables is None else variables
            processes.first_alone(lambda: keep_texts(config))
        processes.first_alone(lambda: _prepare_data(config, run_dir))
        data = dataclasses.replace(open_prepared(config, run_dir), eval=open_sets(config, run_dir))
        position, state = resumed or (Position(), jax.jit(partial(init_state, config), out_shardings=shardings)(variables))
        checkpoints = Checkpoints(run_dir, config, shardings)
        _describe(config, data, position, fresh.params)
        if processes.is_first() and position.step and (seconds := goodput(run_dir, position.step)):
            print(goodput_text(seconds), flush=True)
        if division is not None:
            print(mesh_summary(config, division, fresh, shardings), flush=True)
        processes.first_alone(lambda: write_atomically(run_dir / CONFIG_FILE, to_yaml(asked)))
        # Known from the tokenizer, and no setting that a checkpoint keeps.
        known = dataclasses.replace(config, data=dataclasses.replace(config.data, end_of_document=data.end_of_document))
        return Loop(known, run_dir, data, checkpoints, position, local, division, times).run(state)


def _prepare_data(config: Config, run_dir: Path) -> None:
    """The tokens to train and to evaluate on."""
    check_sets(config)
    prepare(config, run_dir)
    make_sets(config, run_dir)


def _resumed(
    config: Config, run_dir: Path, local: LocalCheckpoints, shardings: Optional[TrainState], allowed: Collection[str]
) -> tuple[Position, TrainState] | None:
    """Where the last checkpoint of either tier that can be read left off, or None without any; later ones are set aside."""
    check_same_text(config, run_dir)
    shared = [Checkpoints(run_dir, config, shardings)] if (run_dir / CHECKPOINTS).is_dir() else []
    tiers: list[LocalCheckpoints | Checkpoints] = [local, *shared]
    damaged = None
    for step, number in sorted(((step, number) for number, tier in enumerate(tiers) for step in tier.steps()), reverse=True):
        tier = tiers[number]
        if damaged is not None and processes.is_first():
            report(f"{damaged}; going on from the one before")
        try:
            meta, position = tier.meta(step), tier.position(step)
            changes = check_changes(meta, config, allowed, position)
            state = tier.restore(step)
        except DamagedCheckpoint as error:
            damaged = error
            continue
        if tier is local:
            changes.append(f"step {step} is the local checkpoint's, from {config.train.local_checkpoint_dir}")
        for checkpoints in shared:
            changes += checkpoints.set_aside(after=step)
        print("\n".join(changes), end="\n" * bool(changes))
        return position, state
    if damaged is not None:
        raise damaged
    return None


def _describe(config: Config, data: PreparedData, position: Position, params: Any) -> None:
    count = count_parameters(config.model)
    print(f"{config.run_dir}: {f'resuming after step {position.step}' if position.step else 'a new run'}")
    mtp = f", and {count.mtp:,} in MTP modules" if count.mtp else ""
    print(f"model: {count.total:,} parameters, {count.active:,} active per token{mtp}; {config.model.precision}")
    if config.lora.rank:
        print(describe_adapters(config, params))
    print(f"data: {data.train_tokens:,} tokens to train on, {data.held_out_tokens:,} held out")
    if data.conversations:
        print(f"chat: {data.conversations.told()}")
    end = max((plan.tokens for plan in plan_steps(config.train, position)), default=position.tokens)
    print(f"plan: {config.train.steps:,} steps, {end:,} tokens; device: {jax.devices()[0].device_kind}", flush=True)


if __name__ == "__main__":
    main()

"""Train a model on text: `python -m deepseek_torch.train --config quickstart data.input=my.txt run_dir=RUN`.

The same config, tokens, batches and metrics.jsonl as `deepseek_jax.train`, step by step and without
compilation. RUN/models/STEP is the model after a step as a Hugging Face directory, RUN/states/STEP what `--resume` goes on
from, the last train.keep_checkpoints of each.
"""

import argparse
import shutil
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Optional

import torch

from deepseek_jax.checkpoint.hf_config import read_config_json
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.tokenizer_files import texts_directory
from deepseek_jax.config import HOW_COMPUTED, Config, ConfigError, from_mapping, load_config, presets, to_yaml
from deepseek_jax.config.sizes import to_go_on
from deepseek_jax.data.conversations import keep_texts
from deepseek_jax.data.eval_sets import check_sets, make_sets, open_sets
from deepseek_jax.data.loader import part_size, training_sequences
from deepseek_jax.data.packing import PreparedData, prepare
from deepseek_jax.errors import UserError, run_command, write_atomically
from deepseek_jax.training.lock import sole_use
from deepseek_jax.training.metrics import (
    METRICS_FILE,
    MetricsFile,
    check_metrics,
    evaluation_line,
    evaluation_text,
    expert_line,
)
from deepseek_jax.training.plot import PLOT_FILE, plot_experts, plot_run
from deepseek_jax.training.resume import check_same_text
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.trackers import make_trackers
from deepseek_jax.training.where import too_many_skips
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.pretrained import load_pretrained, save_pretrained
from deepseek_torch.training.checkpoint import STATES, restore_state, save_state, saved_steps
from deepseek_torch.training.culprit import find_culprit
from deepseek_torch.training.evaluation import Evaluation
from deepseek_torch.training.schedules import StepPlan, plan_steps
from deepseek_torch.training.step import StepMetrics, TrainState, init_state, train_step

CONFIG_FILE, MODELS = "config.yaml", "models"
SECONDS_BETWEEN_LINES = 5


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m deepseek_torch.train", description="Train a DeepSeek-V3 on text.")
    parser.add_argument("--config", help=f"a .yaml file or a preset ({', '.join(presets())})")
    parser.add_argument("--resume", action="store_true", help="go on from the last state of run_dir")
    parser.add_argument(
        "--allow", metavar="FIELD", action="append", default=[],
        help="with --resume: go on although this field, such as train.steps, differs from the state's",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields of the config to change")
    args = parser.parse_intermixed_args()
    run_command(lambda: train(read_config(args.config, args.overrides, args.resume), resume=args.resume, allowed=args.allow))


def read_config(source: str | None, overrides: list[str], resume: bool = False) -> Config:
    """The config given; or that of the run to resume, or of the weights that init_from= among the overrides names."""
    if source is not None:
        return load_config(source, overrides)
    if resume:
        run_dir = next((word.partition("=")[2] for word in overrides if word.startswith("run_dir=")), "")
        if not (Path(run_dir) / CONFIG_FILE).is_file():
            raise ConfigError(f"--resume: give run_dir=DIR of a run; there is no {Path(run_dir) / CONFIG_FILE}")
        return load_config(Path(run_dir) / CONFIG_FILE, overrides)
    named = next((word.partition("=")[2] for word in overrides if word.startswith("init_from=")), None)
    if named is None:
        raise ConfigError("give --config FILE, or init_from=DIR to train the model there on")
    model = read_config_json(local_directory(named))
    return from_mapping({"model": asdict(model), "train": asdict(to_go_on(model))}, overrides, where=named)


def train(config: Config, model: Optional[DeepseekV3] = None, resume: bool = False, allowed: Collection[str] = ()) -> None:
    """Train `config` to its last step.

    Args:
        model: what to train instead of fresh weights.
        resume: go on from the run's last state.
        allowed: fields that may differ from the state's, as `--allow` names them.

    Raises:
        UserError: for anything the user can mend; models saved before stay usable.
    """
    if config.stages:
        raise ConfigError(
            "stages: this sibling trains one at a time; give stages=[], and to the next init_from=RUN/models/STEP"
        )
    if config.train.ema_decay:
        raise ConfigError(f"train.ema_decay={config.train.ema_decay}: this sibling keeps no average of weights; give 0")
    run_dir = Path(config.run_dir)
    if config.train.local_checkpoint_dir is not None:
        raise ConfigError("train.local_checkpoint_dir: the PyTorch sibling keeps its states in run_dir alone; leave it out")
    if not resume and (run_dir / METRICS_FILE).exists():
        raise ConfigError(f"{run_dir} already holds a run: add --resume to go on with it, or give another run_dir")
    with sole_use(run_dir):
        _train(config, run_dir, resume, model, allowed)


def _train(config: Config, run_dir: Path, resume: bool, model: Optional[DeepseekV3], allowed: Collection[str]) -> None:
    """`train`, once the directory is this run's alone."""
    if resume:
        check_same_text(config, run_dir)
    if config.init_from is not None:
        if model is None and not (resume and saved_steps(run_dir / STATES)):
            model = initial_model(config)
        tokenizer = config.data.tokenizer or str(local_directory(config.init_from))
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
        keep_texts(config)
    check_sets(config)
    data = prepare(config, run_dir)
    make_sets(config, run_dir)
    data = replace(data, eval=open_sets(config, run_dir))
    asked = config
    config = replace(config, data=replace(config.data, end_of_document=data.end_of_document))
    state = init_state(config, model)
    position = restore_state(asked, state, allowed) if resume else Position()
    check_metrics(run_dir, position.step, position.tokens)
    write_atomically(run_dir / CONFIG_FILE, to_yaml(asked))
    parameters = sum(p.numel() for p in state.model.parameters())
    print(f"{run_dir}: {parameters:,} parameters with MTP; {data.train_tokens:,} tokens to train on", flush=True)
    if position.step:
        print(f"resuming after step {position.step}", flush=True)
    _run(config, run_dir, data, state, position)


def initial_model(config: Config) -> DeepseekV3:
    """The weights of the Hugging Face directory that `config.init_from` names; MTP modules that are not asked for stay behind.

    Raises:
        UserError: one line naming the field that does not fit.
    """
    found = load_pretrained(local_directory(str(config.init_from)))
    for name, value in asdict(found.config).items():
        wanted = asdict(config.model)[name]
        if name not in HOW_COMPUTED and value != wanted and not (name == "num_nextn_predict_layers" and wanted < value):
            raise ConfigError(f"init_from={config.init_from}: its model.{name} is {value}, and here it is {wanted}")
    model = DeepseekV3(config.model)
    model.load_state_dict({name: tensor for name, tensor in found.state_dict().items() if name in model.state_dict()})
    return model


def _run(config: Config, run_dir: Path, data: PreparedData, state: TrainState, position: Position) -> None:
    """Take every step after `position`, and tell, evaluate and save along the way."""
    train = config.train
    windows = training_sequences(config, data.sets)
    evaluation, trackers = Evaluation(config, data), make_trackers(config, run_dir, position.step)
    metrics_file = MetricsFile(run_dir, position.step, trackers=trackers)
    told = saved_at = time.monotonic()
    skipped = 0
    with _interruptible() as interrupted:
        for plan in plan_steps(train, position):
            tokens = torch.from_numpy(windows.take(plan.first_sequence, plan.batch_size)).long()
            batch = tokens.view(-1, part_size(train), tokens.shape[1])
            metrics = train_step(state, batch, plan, config)
            position = Position(
                plan.step, plan.first_sequence + plan.batch_size, plan.tokens, position.epochs + plan.batch_size / len(windows)
            )
            skipped = skipped + 1 if metrics.skipped else 0
            if skipped:
                metrics_file.write(step=plan.step, tokens=plan.tokens, skipped=skipped)
                print(f"step {plan.step}: no update: {_numbers(metrics)}", flush=True)
                if skipped >= train.max_skips:
                    where = find_culprit(state, batch, plan.mtp_loss_weight, config)
                    raise UserError(too_many_skips(plan.step, _numbers(metrics), where, skipped))
            else:
                line = metrics_line(plan, metrics, config)
                metrics_file.write(**line)
            last, now = plan.step == train.steps, time.monotonic()
            if not skipped and (last or now - told >= SECONDS_BETWEEN_LINES):
                told = now
                dropped = f"  dropped {line['dropped']:.4g}" if "dropped" in line else ""
                print(f"step {plan.step}/{train.steps}  loss {line['next_token_loss']:.4g}{dropped}", flush=True)
            if last or plan.step % train.eval_every == 0:
                bits = evaluation.by_set(state.model)
                metrics_file.write(step=plan.step, tokens=plan.tokens, **evaluation_line(bits))
                print(evaluation_text(plan.step, bits), flush=True)
                plot_run(run_dir)
                plot_experts(run_dir)
            late = train.checkpoint_minutes is not None and now - saved_at >= 60 * train.checkpoint_minutes
            if last or late or interrupted or plan.step % train.checkpoint_every == 0:
                _save(config, run_dir, state, position)
                saved_at = now
            if interrupted and not last:
                raise Interrupted(f"interrupted; step {plan.step} is saved: --resume run_dir={run_dir} goes on from it")
    metrics_file.close()
    print(f"loss plot: {run_dir / PLOT_FILE}")


def _numbers(metrics: StepMetrics) -> str:
    return f"loss {metrics.loss:.4g}, gradient norm {metrics.grad_norm:.4g}"


class Interrupted(UserError):
    """Ctrl-C; everything up to the step named is saved."""

    exit_code = 130


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list in which the first Ctrl-C or SIGTERM appears; the second ends at once."""
    came: list[int] = []

    def note(signum: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(signum)
        print("stopping after this step and saving; press Ctrl-C again to stop at once", flush=True)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _save(config: Config, run_dir: Path, state: TrainState, position: Position) -> None:
    """The model for Hugging Face and the state to go on from; of both those go that train.keep_checkpoints does not keep."""
    train = config.train
    model = run_dir / MODELS / str(position.step)
    shutil.rmtree(model, ignore_errors=True)  # of a run that was killed before its state was whole
    save_pretrained(model, state.model, tokenizer=texts_directory(run_dir))
    save_state(config, position, state)
    for folder in (run_dir / MODELS, run_dir / STATES):
        for step in saved_steps(folder)[: -train.keep_checkpoints]:
            if train.keep_every is None or step % train.keep_every:
                shutil.rmtree(folder / str(step))


def metrics_line(plan: StepPlan, metrics: StepMetrics, config: Config) -> dict[str, Any]:
    """What metrics.jsonl says of a step, as `deepseek_jax.train` does."""
    first, *further = metrics.parts.cross_entropy.tolist()
    dropped, scores = metrics.parts.dropped, metrics.parts.largest_scores
    limited = {"dropped": dropped, "max_attention_score": None if scores is None else scores.max()}
    return {
        "step": plan.step,
        "tokens": plan.tokens,
        "loss": metrics.loss.item(),
        "next_token_loss": first,
        "mtp_losses": further,
        "balance_loss": metrics.parts.balance_loss.item(),
        "grad_norm": metrics.grad_norm.item(),
        "learning_rate": plan.learning_rate,
        **expert_line({stack: counts.numpy() for stack, counts in metrics.parts.counts.items()}),
    } | {name: value.item() for name, value in limited.items() if value is not None}


if __name__ == "__main__":
    main()

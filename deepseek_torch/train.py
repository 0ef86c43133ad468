"""Train a model on text: `python -m deepseek_torch.train --config quickstart data.input=my.txt run_dir=RUN`.

The same config, tokens, batches and metrics.jsonl as `deepseek_jax.train`, step by step and without
compilation. RUN/models/STEP is the model after a step as a Hugging Face directory, the last
train.keep_checkpoints of them. Optimizer state is not kept, so a run cannot be resumed.
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Optional

import torch

from deepseek_jax.checkpoint.hf_config import read_config_json
from deepseek_jax.config import HOW_COMPUTED, Config, ConfigError, from_mapping, load_config, presets, to_yaml
from deepseek_jax.config.sizes import to_go_on
from deepseek_jax.data.eval_sets import check_sets, make_sets, open_sets
from deepseek_jax.data.loader import training_sequences
from deepseek_jax.data.packing import PreparedData, prepare
from deepseek_jax.errors import UserError, run_command, write_atomically
from deepseek_jax.training.metrics import evaluation_line, evaluation_text
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.pretrained import load_pretrained, save_pretrained
from deepseek_torch.training.evaluation import Evaluation
from deepseek_torch.training.schedules import StepPlan, plan_steps
from deepseek_torch.training.step import StepMetrics, TrainState, init_state, train_step

CONFIG_FILE, METRICS_FILE, MODELS = "config.yaml", "metrics.jsonl", "models"
SECONDS_BETWEEN_LINES = 5


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m deepseek_torch.train", description="Train a DeepSeek-V3 on text.")
    parser.add_argument("--config", help=f"a .yaml file or a preset ({', '.join(presets())})")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="fields of the config to change")
    args = parser.parse_intermixed_args()
    run_command(lambda: train(read_config(args.config, args.overrides)))


def read_config(source: str | None, overrides: list[str]) -> Config:
    """The config given; or that of the weights that init_from= among the overrides names."""
    if source is not None:
        return load_config(source, overrides)
    named = next((word.partition("=")[2] for word in overrides if word.startswith("init_from=")), None)
    if named is None:
        raise ConfigError("give --config FILE, or init_from=DIR to train the model there on")
    model = read_config_json(Path(named))
    return from_mapping({"model": asdict(model), "train": asdict(to_go_on(model))}, overrides, where=named)


def train(config: Config, model: Optional[DeepseekV3] = None) -> None:
    """Train `config` to its last step.

    Args:
        model: what to train instead of fresh weights.

    Raises:
        UserError: for anything the user can mend; models saved before stay usable.
    """
    run_dir = Path(config.run_dir)
    if (run_dir / METRICS_FILE).exists():
        raise ConfigError(f"{run_dir} already holds a run: give another run_dir")
    if config.init_from is not None and model is None:
        model = initial_model(config)
        tokenizer = config.data.tokenizer or config.init_from
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    check_sets(config)
    data = prepare(config, run_dir)
    make_sets(config, run_dir)
    data = replace(data, eval=open_sets(config, run_dir))
    asked = config
    config = replace(config, data=replace(config.data, end_of_document=data.end_of_document))
    state = init_state(config, model)
    write_atomically(run_dir / CONFIG_FILE, to_yaml(asked))
    parameters = sum(p.numel() for p in state.model.parameters())
    print(f"{run_dir}: {parameters:,} parameters with MTP; {data.train_tokens:,} tokens to train on", flush=True)
    _run(config, run_dir, data, state)


def initial_model(config: Config) -> DeepseekV3:
    """The weights of the Hugging Face directory that `config.init_from` names; MTP modules that are not asked for stay behind.

    Raises:
        UserError: one line naming the field that does not fit.
    """
    found = load_pretrained(str(config.init_from))
    for name, value in asdict(found.config).items():
        wanted = asdict(config.model)[name]
        if name not in HOW_COMPUTED and value != wanted and not (name == "num_nextn_predict_layers" and wanted < value):
            raise ConfigError(f"init_from={config.init_from}: its model.{name} is {value}, and here it is {wanted}")
    model = DeepseekV3(config.model)
    model.load_state_dict({name: tensor for name, tensor in found.state_dict().items() if name in model.state_dict()})
    return model


def _run(config: Config, run_dir: Path, data: PreparedData, state: TrainState) -> None:
    """Take every step, and tell, evaluate and save along the way."""
    train = config.train
    windows = training_sequences(config, data.sets)
    evaluation = Evaluation(config, data)
    told = time.monotonic()
    for plan in plan_steps(train):
        tokens = torch.from_numpy(windows.take(plan.first_sequence, plan.batch_size)).long()
        metrics = train_step(state, tokens.view(train.gradient_accumulation_steps, -1, tokens.shape[1]), plan, config)
        line = metrics_line(plan, metrics, config)
        _append(run_dir, line)
        if not math.isfinite(line["loss"]):
            raise UserError(f"step {plan.step}: the loss is {line['loss']}; lower train.learning_rate")
        last = plan.step == train.steps
        if last or time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            dropped = f"  dropped {line['dropped']:.4g}" if "dropped" in line else ""
            print(f"step {plan.step}/{train.steps}  loss {line['next_token_loss']:.4g}{dropped}", flush=True)
        if last or plan.step % train.eval_every == 0:
            bits = evaluation.by_set(state.model)
            _append(run_dir, {"step": plan.step, "tokens": line["tokens"]} | evaluation_line(bits))
            print(evaluation_text(plan.step, bits), flush=True)
        if last or plan.step % train.checkpoint_every == 0:
            save_pretrained(run_dir / MODELS / str(plan.step), state.model, tokenizer=run_dir)
            for step in saved_steps(run_dir)[: -train.keep_checkpoints]:
                shutil.rmtree(run_dir / MODELS / str(step))


def metrics_line(plan: StepPlan, metrics: StepMetrics, config: Config) -> dict[str, Any]:
    """What metrics.jsonl says of a step, as `deepseek_jax.train` does."""
    first, *further = metrics.parts.cross_entropy.tolist()
    load = [(counts / counts.mean(-1, True, dtype=torch.float64)).max() for counts in metrics.parts.counts.values()]
    return {
        "step": plan.step,
        "tokens": plan.tokens,
        "loss": metrics.loss.item(),
        "next_token_loss": first,
        "mtp_losses": further,
        "balance_loss": metrics.parts.balance_loss.item(),
        "grad_norm": metrics.grad_norm.item(),
        "learning_rate": plan.learning_rate,
        "max_expert_load": max((value.item() for value in load), default=1.0),
    } | ({} if metrics.parts.dropped is None else {"dropped": metrics.parts.dropped.item()})


def saved_steps(run_dir: Path) -> list[int]:
    """Steps whose model is there whole, in order."""
    return sorted(int(path.name) for path in (run_dir / MODELS).glob("*") if path.name.isdecimal())


def _append(run_dir: Path, line: dict[str, Any]) -> None:
    with (run_dir / METRICS_FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

"""What a resumed run may change: fields that differ from the checkpoint's are named, never taken over in silence."""

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config, ConfigError, TrainConfig, from_mapping
from deepseek_jax.data.packing import changed_files, is_prepared
from deepseek_jax.training.schedules import Position, StepPlan, plan_step, plan_steps

FREE = (
    "model.remat", "model.grouped_matmul", "model.attention",
    "data.eval", "train.gradient_accumulation_steps", "train.loss_chunk_tokens", "train.eval_every", "train.eval_sequences",
    "train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints", "train.keep_every", "train.max_skips",
    "train.ema_on_host",
    "train.hang_after", "train.profile",
    "train.tensorboard", "train.wandb", "train.local_checkpoint_dir", "train.local_checkpoint_every",
)  # fmt: skip
"""Fields that may change without a word: where and how a step is computed, what is saved and told. So may the mesh."""
FIXED = ("train.trainable", "lora.rank", "lora.alpha", "lora.modules")
"""Fields that a run keeps: they are what learns, and what it means."""
SCHEDULED = ("learning_rate", "bias_update_speed", "mtp_loss_weight", "batch_size")
MOST_FILES = 3
"""That are named."""
SECTIONS = ("model", "data", "train", "lora")


def check_same_text(config: Config, run_dir: Path) -> None:
    """Say if a run's tokens are not of this text, or no longer, and the files that changed.

    Raises:
        ConfigError: they are not, and the tokenizer would be another, too.
    """
    if is_prepared(config, run_dir):
        return
    given = f"data.path={config.data.path}" if config.data.path else f"data.input={config.data.input}"
    files = changed_files(config, run_dir)
    changes = f" ({', '.join(files[:MOST_FILES])}{', ...' * (len(files) > MOST_FILES)})" if files else ""
    told = f"{given}: not the text that {run_dir} was trained on{changes}"
    if config.data.tokenizer is None:
        raise ConfigError(
            f"{told}; to go on with other text keep its tokenizer, data.tokenizer={run_dir}/tokenizer.json, or else start a "
            f"new run_dir"
        )
    print(f"{told}; from now on it is trained on what is there", flush=True)


def saved_sections(config: Config) -> dict[str, Any]:
    """What a checkpoint keeps of its config for `changed_fields`, apart from the model, which it keeps anyway."""
    return {name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS if name != "model"}


def changed_fields(saved: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Fields `section.name` that are not `FREE` and differ, each with its values then and now.

    Args:
        saved: sections as mappings; a field that it lacks, of an older version, had its default.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for section in SECTIONS:
        now, defaults = (dataclasses.asdict(getattr(each, section)) for each in (config, Config()))
        known = saved.get(section, {} if section == "lora" and "train" in saved else now)  # older runs have no adapters
        then = defaults | known
        fields = (f"{section}.{name}" for name in now if then[name] != now[name])
        changed |= {name: (then[name.split(".")[1]], now[name.split(".")[1]]) for name in fields if name not in FREE}
    return changed


def check_changes(saved: dict[str, Any], config: Config, allowed: Collection[str], position: Position) -> list[str]:
    """A line for each change that `allowed` names, and for each scheduled number that moves with them.

    Raises:
        ConfigError: a field differs that `allowed` does not name; it tells of scheduled numbers, too.
    """
    if position.step == 0:  # a converted model: nothing was trained here
        return []
    changed = changed_fields(saved, config)
    for name in FIXED:
        if name in changed:
            then, now = changed[name]
            raise ConfigError(f"{config.run_dir}: {name} was {then} and is {now}, which a run keeps; begin another from its "
                              f"weights, by init_from={config.run_dir}")  # fmt: skip
    moved = list(_moved(saved, config, position))
    refused = [name for name in changed if name not in allowed]
    if refused:
        told = ", ".join(f"{name} was {changed[name][0]} and is {changed[name][1]}" for name in refused)
        effect = f" ({'; '.join(moved)})" if moved else ""
        options = " ".join(f"--allow {name}" for name in refused)
        raise ConfigError(f"{config.run_dir}: {told}{effect}; give what was, or go on with what is by {options}")
    return [f"{name}: {then} until now, {now} from now on" for name, (then, now) in changed.items()] + moved


def _moved(saved: dict[str, Any], config: Config, position: Position) -> Iterable[str]:
    """Scheduled numbers whose next value is not what it would have been."""
    if "train" not in saved:
        return
    earlier = from_mapping({"train": saved["train"]}, where="the checkpoint").train
    then, now = _next(earlier, position), _next(config.train, position)
    for name in SCHEDULED:
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            yield f"{name} of step {now.step}: {after:.4g}, where the schedule as it was had come to {before:.4g}"


def _next(train: TrainConfig, position: Position) -> StepPlan:
    """The next step as `train` plans it; after its last one, with the values that it ended at."""
    end = plan_step(train, position, train.batch_size, position.tokens)
    return next(plan_steps(train, position), end)

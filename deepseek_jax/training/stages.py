"""A run that goes through its stages, one after the other, and on from wherever it was interrupted."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.config import Config, ConfigError, to_yaml
from deepseek_jax.config.stages import stage_configs, stage_directory
from deepseek_jax.errors import write_atomically
from deepseek_jax.parallel import processes
from deepseek_jax.parallel.mesh import resolve
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.loop import Interrupted
from deepseek_jax.training.metrics import METRICS_FILE

CONFIG_FILE = "config.yaml"


def train_stages(train: Callable[..., Any], config: Config, resume: bool, allowed: Collection[str]) -> Any:
    """Train every stage that is not yet at its end; what the last one returns.

    Args:
        train: of one stage's config, `resume` and `allowed`, as `deepseek_jax.train.train`.

    Raises:
        UserError: as `train`; and, before anything runs, for a stage that cannot work.
    """
    stages, run_dir, result = stage_configs(config), Path(config.run_dir), None
    for number, stage in enumerate(stages[1:]):
        try:
            resolve(stage, jax.device_count())
        except ConfigError as error:
            raise ConfigError(f"stages.{number}: {error}") from None
    if not resume and (stage_directory(run_dir, 1) / METRICS_FILE).exists():
        raise ConfigError(f"{run_dir} already holds a run: add --resume to go on with it, or give another run_dir")
    processes.first_alone(lambda: _write_config(run_dir, config))
    for number, stage in enumerate(stages, start=1):
        begun = (Path(stage.run_dir) / METRICS_FILE).exists()
        if begun and number < len(stages) and Checkpoints(Path(stage.run_dir), stage).latest() == stage.train.steps:
            continue
        print(f"stage {number} of {len(stages)}: {stage.train.steps:,} steps of {stage.train.batch_size:,} sequences of "
              f"{stage.train.sequence_length:,} tokens, rate {stage.train.learning_rate:g}", flush=True)  # fmt: skip
        try:
            result = train(stage, resume and begun, allowed=allowed)
        except Interrupted:
            raise Interrupted(
                f"interrupted in stage {number} of {len(stages)}, which is saved: --resume run_dir={run_dir} goes on"
            ) from None
    return result


def _write_config(run_dir: Path, config: Config) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / CONFIG_FILE, to_yaml(config))

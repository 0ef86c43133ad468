"""Runs that a measurement is made of: trained once, read ever after."""

import shutil
from pathlib import Path

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.packing import prepare
from deepseek_jax.errors import UserError
from deepseek_jax.train import train
from deepseek_jax.training.metrics import METRICS_FILE, read_metrics

MEMORY = 0.9
"""Share of the past in the exponential moving average that smooths a curve, as in the report."""


def trained(config: Config) -> list[dict]:
    """Metrics of a run, step by step, which is first brought to its end if it is not there yet."""
    run_dir = Path(config.run_dir)
    if not _is_complete(config):
        train(config, resume=(run_dir / METRICS_FILE).exists())
    if not _is_complete(config):
        raise UserError(f"{run_dir}: holds other steps than the {config.train.steps} of now; give another --out")
    return _steps(run_dir)


def share_tokens(config: Config, home: Path) -> None:
    """Give a run that is to begin the tokens of its text from `home`, where all runs of the same text have them made once."""
    run_dir = Path(config.run_dir)
    if not run_dir.exists():
        prepare(config, home)
        shutil.copytree(home, run_dir)


def _is_complete(config: Config) -> bool:
    """Whether the last step is kept: its checkpoint, and all that was told of it."""
    run_dir, steps = Path(config.run_dir), config.train.steps
    return len(_steps(run_dir)) == steps and (run_dir / "checkpoints" / str(steps)).is_dir()


def _steps(run_dir: Path) -> list[dict]:
    return [line for line in read_metrics(run_dir) if "next_token_loss" in line]


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Exponential moving average, from the first loss on."""
    average, averages = losses[0], []
    for loss in losses:
        average = MEMORY * average + (1 - MEMORY) * loss
        averages.append(average)
    return np.array(averages)

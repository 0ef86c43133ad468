"""Others that a run's metrics go to as they are written: TensorBoard's event files, Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from deepseek_jax.config import Config, ConfigError

EVENTS = "events"
"""Folder of a run directory, for `tensorboard --logdir`."""
NOT_SHOWN = ("step", "tokens")


class Tracker(Protocol):
    """Takes numbers by name."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """What was told of a step."""

    def close(self) -> None:
        """Leave nothing unwritten."""


def make_trackers(config: Config, run_dir: Path, last_step: int) -> list[Tracker]:
    """Those that `train.tensorboard` and `train.wandb` ask for; what was told after `last_step` is told again.

    Raises:
        ConfigError: the package that it takes is not installed, or nobody is logged in, or the project cannot be.
    """
    trackers: list[Tracker] = []
    if config.train.tensorboard:
        trackers.append(TensorBoard(run_dir / EVENTS, last_step))
    if config.train.wandb is not None:
        trackers.append(Wandb(config, run_dir))
    return trackers


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a line of metrics.jsonl, each by a name of its own: `mtp_losses/1`, `eval/wiki`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": float(number) for key, number in value.items()}
        elif isinstance(value, list):
            found |= {f"{name}/{index}": float(number) for index, number in enumerate(value, start=1)}
        elif name not in NOT_SHOWN:
            found[name] = float(value)
    return found


class TensorBoard:
    """Event files."""

    def __init__(self, folder: Path, last_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError("train.tensorboard=true: needs tensorboardX; pip install -e '.[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Leave nothing unwritten."""
        self._writer.close()


class Wandb:
    """A run of a project of Weights & Biases, the same one when the run goes on."""

    def __init__(self, config: Config, run_dir: Path):
        try:
            import wandb
        except ImportError:
            raise ConfigError(f"train.wandb={config.train.wandb}: needs wandb; pip install -e '.[wandb]'") from None
        import dataclasses
        import hashlib

        name = str(run_dir.resolve())
        try:
            self._run = wandb.init(
                project=config.train.wandb, name=run_dir.name, id=hashlib.sha256(name.encode()).hexdigest()[:16],
                resume="allow", dir=str(run_dir), config=dataclasses.asdict(config),
            )  # fmt: skip
        except wandb.Error as error:
            told = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(f"train.wandb={config.train.wandb}: {told}; or set WANDB_MODE=offline, and sync later") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """All of a step at once."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()

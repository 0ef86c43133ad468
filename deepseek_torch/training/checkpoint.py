"""What a run needs to go on exactly: RUN/states/STEP, whole or absent, of which a changed bit is noticed.

A step's folder holds `state/training.safetensors`, weights and moments as they are in memory; `state/meta.json`, the
config and the run's position; and the sums of both files.
"""

import dataclasses
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deepseek_jax.checkpoint.digests import DIGESTS, damaged_file, write_digests
from deepseek_jax.checkpoint.staging import disk_errors, staged_directory
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import read_object
from deepseek_jax.config import Config, TrainConfig
from deepseek_jax.errors import report
from deepseek_jax.training.resume import check_changes, saved_sections
from deepseek_jax.training.schedules import Position
from deepseek_torch.training.step import TrainState

STATES, ITEM, TENSORS, META = "states", "state", "training.safetensors", "meta.json"


def save_state(config: Config, position: Position, state: TrainState) -> None:
    """Write the state as of `position`; raises `CheckpointError` if the disk fails, with nothing half-written."""
    tensors = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for moment, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    sections = {"model": dataclasses.asdict(config.model)} | saved_sections(config)
    with staged_directory(folder_of(config, position.step)) as folder, disk_errors(folder):
        (folder / ITEM).mkdir()
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ITEM / TENSORS)
        except SafetensorError as error:  # as it tells of a disk that is full
            raise CheckpointError(f"{folder / ITEM / TENSORS}: cannot be written: {str(error).splitlines()[0]}") from None
        meta = json.dumps(sections | {"position": dataclasses.asdict(position)})
        (folder / ITEM / META).write_text(meta, encoding="utf-8")
        write_digests(folder)


def restore_state(config: Config, state: TrainState, allowed: Collection[str]) -> Position:
    """Fill `state` from the last step that can be read, and say where it left off; the start if none was saved.

    Steps after it, which cannot be read, are named and go.

    Raises:
        ConfigError: a field differs from the checkpoint's that `allowed` does not name.
        CheckpointError: none of those that were saved can be read, or it is of another model.
    """
    damaged = None
    for step in reversed(saved_steps(Path(config.run_dir) / STATES)):
        folder = folder_of(config, step)
        try:
            if changed := damaged_file(folder, ITEM) or (None if (folder / DIGESTS).is_file() else DIGESTS):
                raise CheckpointError(f"{folder}: {changed} is not as it was written")
            meta, tensors = read_object(folder / ITEM / META), load_file(folder / ITEM / TENSORS)
        except (CheckpointError, SafetensorError, OSError) as error:
            damaged = damaged or error
            report(f"{error}; going on from the one before")
            shutil.rmtree(folder)
            continue
        position = Position(**meta["position"])
        for line in check_changes(meta, config, allowed, position):
            print(line)
        if meta["train"].get("optimizer", TrainConfig.optimizer) != config.train.optimizer:  # another's moments
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}
        _fill(state, tensors, folder)
        return position
    if damaged is not None:
        raise damaged
    return Position()


def _fill(state: TrainState, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    moments: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        moments.setdefault(name, {})[kind] = tensor
    weights = {name: kinds.pop("model") for name, kinds in moments.items() if "model" in kinds}
    try:
        state.model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: checkpoint of another model: {str(error).splitlines()[-1].strip()}") from None
    for name, parameter in state.model.named_parameters():
        if moments.get(name):
            state.optimizer.state[parameter] = moments[name]


def saved_steps(folder: Path) -> list[int]:
    """Steps of which something is there whole, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def folder_of(config: Config, step: int) -> Path:
    """Where the state of a step is kept."""
    return Path(config.run_dir) / STATES / str(step)

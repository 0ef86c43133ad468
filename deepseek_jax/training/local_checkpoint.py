"""The fast tier of checkpoints: each process keeps its own part of the state on a disk, or in the memory, of its host.

A run that comes back on the same hosts with the same mesh goes on from there; else from the run directory's checkpoints,
which are written less often and serve any mesh. Whatever is not whole in every process counts in none.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deepseek_jax.checkpoint.digests import DIGESTS, damaged_file, write_digests
from deepseek_jax.checkpoint.staging import staged_directory
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import read_object
from deepseek_jax.config import Config
from deepseek_jax.training.checkpoint import DamagedCheckpoint
from deepseek_jax.training.resume import saved_sections
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.step import TrainState, init_state

KEPT = 2
"""Steps; while the newer one is written the older one is whole."""
ITEM, TENSORS, META = "state", "part.safetensors", "meta.json"


class LocalCheckpoints:
    """This process's folder in `train.local_checkpoint_dir`, one numbered folder in it per saved step.

    All processes call the same methods in the same order.
    """

    def __init__(self, config: Config, run_dir: Path, shardings: Optional[TrainState] = None):
        """`shardings` says where restored arrays go; null is one device. In a null directory there is nothing."""
        self._config, self._shardings, self._folder = config, shardings, None
        if config.train.local_checkpoint_dir is not None:
            known = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
            place = Path(config.train.local_checkpoint_dir).expanduser().absolute()
            self._folder = place / f"{run_dir.name}-{known}" / f"process-{jax.process_index()}"

    def steps(self) -> list[int]:
        """Those that every process has, the last one first; a line tells of a later one that not all have."""
        if self._folder is None:
            return []
        of_all = [set(row.tolist()) - {0} for row in _gathered(_padded(self._own_steps()))]
        common, last = set.intersection(*of_all), max(set.union(*of_all), default=0)
        if last > max(common, default=0):
            lacking = ", ".join(str(process) for process, steps in enumerate(of_all) if last not in steps)
            print(f"train.local_checkpoint_dir: step {last} is not in the part of process {lacking}, and counts in none")
        return sorted(common, reverse=True)

    def clear(self, after: int = 0) -> None:
        """Forget steps after that one, which an earlier run in the same directory left, or which cannot be read."""
        for step in self._own_steps():
            if step > after:
                shutil.rmtree(self._place(step), ignore_errors=True)

    def save(self, position: Position, state: TrainState) -> None:
        """Write the state as of `position`; a disk that is full, or cannot be written, costs a line and not the run."""
        if self._folder is None:
            return
        try:
            for step in self._own_steps()[: 1 - KEPT]:
                shutil.rmtree(self._folder / str(step))
            with staged_directory(self._folder / str(position.step)) as folder:
                (folder / ITEM).mkdir()
                save_file(dict(_parts(state)), folder / ITEM / TENSORS)
                meta = self._sections() | {"mesh": self._mesh(), "position": dataclasses.asdict(position)}
                (folder / ITEM / META).write_text(json.dumps(meta), encoding="utf-8")
                write_digests(folder)
        except (CheckpointError, OSError, SafetensorError) as error:
            told = f"train.local_checkpoint_dir: step {position.step} is not kept: {error}"
            print(" ".join(told.split()), file=sys.stderr, flush=True)

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the numbers: the config's sections and the run's position.

        Raises:
            DamagedCheckpoint: in all processes, if it is damaged in one, or of another mesh.
        """
        meta, folder = {}, self._place(step)
        try:
            damaged = damaged_file(folder, ITEM) or (None if (folder / DIGESTS).is_file() else DIGESTS)
            meta = read_object(folder / ITEM / META)
            known = None if meta.get("mesh") == self._mesh() else f"{folder}: is of another mesh, {meta.get('mesh')}"
            problem = f"{folder}: {damaged} is not as it was written" if damaged else known
        except (CheckpointError, OSError) as error:
            problem = str(error)
        if _gathered(np.array([problem is not None])).any():
            raise DamagedCheckpoint(problem or f"{folder}: what another process has of it cannot be read")
        return meta

    def position(self, step: int) -> Position:
        """How far the run had come at a step whose `meta` was read."""
        return Position(**read_object(self._place(step) / ITEM / META)["position"])

    def restore(self, step: int) -> TrainState:
        """The state saved at a step whose `meta` was read."""
        fresh = jax.eval_shape(lambda: init_state(self._config))
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = self._shardings or jax.tree.map(lambda _: one, fresh)
        with safe_open(self._place(step) / ITEM / TENSORS, framework="numpy") as file:

            def read(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
                shape, parts = sharding.shard_shape(leaf.shape), []
                for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
                    raw = file.get_tensor(_name(path, index or (), leaf.shape))
                    parts.append(jax.device_put(raw.view(leaf.dtype).reshape(shape), device))
                return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

            return jax.tree_util.tree_map_with_path(read, fresh, placed)

    def _own_steps(self) -> list[int]:
        if self._folder is None:
            return []
        return sorted(int(path.name) for path in self._folder.glob("*") if path.name.isdecimal())

    def _place(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / str(step)

    def _mesh(self) -> dict[str, Any]:
        return dataclasses.asdict(self._config.parallel) | {"processes": jax.process_count()}

    def _sections(self) -> dict[str, Any]:
        return {"model": dataclasses.asdict(self._config.model)} | saved_sections(self._config)


def _parts(state: TrainState) -> Iterator[tuple[str, np.ndarray]]:
    """Bytes of what this process holds of every array, each part once."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for shard in {_name(path, shard.index, leaf.shape): shard for shard in leaf.addressable_shards}.items():
            name, part = shard
            yield name, np.ascontiguousarray(part.data).reshape(-1).view(np.uint8)


def _name(path: tuple[Any, ...], index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    bounds = ",".join("{}:{}".format(*part.indices(size)[:2]) for part, size in zip(index, shape))
    return f"{jax.tree_util.keystr(path)}[{bounds}]"


def _padded(steps: list[int]) -> np.ndarray:
    return np.array([0] * KEPT + steps, np.int32)[-KEPT:]


def _gathered(own: np.ndarray) -> np.ndarray:
    """Of every process, [processes, ...]."""
    return own[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(own))

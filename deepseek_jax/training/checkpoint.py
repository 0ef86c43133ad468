"""Checkpoints of a run through orbax: each is whole or absent, and belongs to one model config."""

import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import jax
import orbax.checkpoint as ocp

from deepseek_jax.checkpoint.adapters import without_adapters
from deepseek_jax.checkpoint.digests import damaged_file, write_digests
from deepseek_jax.checkpoint.orbax_source import OrbaxSource
from deepseek_jax.checkpoint.orbax_step import (
    ADAPTER,
    AVERAGE,
    META,
    VARIABLES,
    first_line,
    read_meta,
    stacked_arrays,
    step_meta,
)
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.config import HOW_COMPUTED, Config, ModelConfig, RopeScaling, TrainConfig
from deepseek_jax.config.trainable import ADAPTERS, learning_part, trainable, with_part
from deepseek_jax.parallel import processes
from deepseek_jax.training.adapters import with_adapters
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.resume import saved_sections
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.step import TrainState, init_state

CHECKPOINTS = "checkpoints"
"""Folder of a run directory."""

UNFINISHED = ".orbax-checkpoint-tmp"
"""End of a step's folder's name until it is whole."""

OPTIMIZER = "optimizer"
"""Item of a step: the moments, which no one but training needs."""

SMALLEST_TARGET = 2**20
"""Bytes of a piece that are always allowed; orbax warns of less."""


SPARE_ROOM = 2**24
"""Bytes that must be free beside a checkpoint's numbers, for its many small files and the run's own."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that cannot be read; another may do."""


class Checkpoints:
    """The `checkpoints` folder of a run directory, one numbered folder per saved step.

    A step's folder holds the items `variables` (all that the model is), `optimizer` and `meta`; one that was
    converted has no `optimizer`.
    """

    def __init__(self, run_dir: Path, config: Config, shardings: Optional[TrainState] = None):
        """`shardings` says where restored arrays go; null is one device."""
        self._config, self._shardings = config, shardings
        self._folder = (run_dir / CHECKPOINTS).resolve()
        train = config.train
        options = ocp.CheckpointManagerOptions(
            max_to_keep=train.keep_checkpoints,
            keep_period=train.keep_every,
            create=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._take_digests),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The last step saved whole, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All that were saved to their end, the last one first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the numbers: the config's sections and the run's position.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        try:
            return read_meta(self._folder / str(step))
        except CheckpointError as error:
            raise DamagedCheckpoint(str(error)) from None

    def position(self, step: int) -> Position:
        """How far the run had come at `step`; a converted model's begins anew. Raises as `meta` does."""
        saved = self.meta(step).get("position", {"step": step} if step == 0 else {})
        fields = dataclasses.asdict(Position())
        if "step" not in saved or any(type(saved.get(name, value)) is not type(value) for name, value in fields.items()):
            raise CheckpointError(
                f"{self._folder / str(step)}: does not say how many tokens were seen; it is of an older version: "
                f"convert it to Hugging Face's form and back, and train from there"
            )
        return Position(**{name: saved[name] for name in fields if name in saved})

    def set_aside(self, after: int) -> list[str]:
        """Move later checkpoints, which cannot be read, out of the way, for a person to look at; a line for each."""
        told = []
        for step in self.steps():
            if step > after:
                names = itertools.chain([f"damaged-{step}"], (f"damaged-{step}-{number}" for number in itertools.count(2)))
                place = next(path for path in map(self._folder.parent.joinpath, names) if not path.exists())
                processes.first_alone(partial(os.rename, self._folder / str(step), place))
                told.append(f"step {step} is now in {place}")
        self._manager.reload()
        return told

    def _take_digests(self) -> None:
        """Of the step that is whole but for its name, in the thread that writes it."""
        if processes.is_first():
            for unfinished in self._folder.glob(f"*{UNFINISHED}"):
                write_digests(unfinished)

    def save(self, position: Position, state: TrainState, average: Any = None) -> None:
        """Write `state` as of `position`; returns while the files are still being written.

        Args:
            average: of the parameters, if one is kept.

        Raises:
            CheckpointError: what went wrong here or in the save before, and the last good step.
        """
        self._check_room((state, average))
        variables = {"params": without_adapters(state.params), "router_state": state.router_state}
        adapters = learning_part([ADAPTERS], state.params)
        items = ocp.args.Composite(**{
            VARIABLES: ocp.args.StandardSave(variables, save_args=_piecewise(self._config, variables)),
            **({ADAPTER: ocp.args.StandardSave(adapters)} if adapters else {}),
            OPTIMIZER: ocp.args.StandardSave(state.optimizer),
            **({} if average is None else {AVERAGE: self._saved_average(average, state)}),
            META: ocp.args.JsonSave(
                step_meta(self._config.model, position.step)
                | saved_sections(self._config)
                | {"position": dataclasses.asdict(position)}
            ),
        })  # fmt: skip
        self._guarded(lambda: self._manager.save(position.step, args=items, force=True))

    def _saved_average(self, average: Any, state: TrainState) -> ocp.args.StandardSave:
        """Whole variables, so that what reads a model reads them."""
        variables = {"params": average, "router_state": state.router_state}
        return ocp.args.StandardSave(variables, save_args=_piecewise(self._config, variables))

    def wait(self) -> None:
        """Return when all that was saved is on disk; raises as `save` does."""
        self._guarded(self._manager.wait_until_finished)

    def _check_room(self, state: Any) -> None:
        """Refuse before anything is written; orbax' threads complain at length when a disk is full."""
        numbers, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self._folder).free
        needed = numbers + numbers // 10 + SPARE_ROOM
        if needed > free:
            self.wait()
            reason = f"no space left on the disk: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
            raise self._failure(reason)

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # orbax and tensorstore raise many kinds for a disk that is full
            for unfinished in self._folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise self._failure("no space left on the disk" if "No space left" in str(error) else first_line(error)) from None

    def _failure(self, reason: str) -> CheckpointError:
        last = self.latest()
        good = f"step {last} is the last good checkpoint" if last is not None else "no checkpoint is complete"
        return CheckpointError(f"{self._folder}: could not save: {reason}; {good}")

    def restore(self, step: int) -> TrainState:
        """The training state saved at `step`; fresh moments (and adapters) if only a model was saved, or another optimizer's.

        Raises:
            CheckpointError: if it is of another model or cannot be read.
        """
        fresh = jax.eval_shape(lambda: init_state(self._config))
        if self._config.train.ema_decay and (self._folder / str(step) / AVERAGE).is_dir():
            self._check_files(step, AVERAGE)  # or another step serves
        variables, shardings = self.restore_variables(step), self._shardings and self._shardings.optimizer
        trained_by = self.meta(step).get("train", {}).get("optimizer", TrainConfig.optimizer)
        if (self._folder / str(step) / OPTIMIZER).is_dir() and trained_by == self._config.train.optimizer:
            optimizer = self._read(step, OPTIMIZER, fresh.optimizer, shardings)
        else:
            init = make_optimizer(self._config.train).init
            learning = learning_part(trainable(self._config), variables["params"])
            optimizer = jax.jit(init, out_shardings=shardings)(learning)
        return TrainState(variables["params"], variables["router_state"], optimizer)

    def restore_variables(self, step: int) -> dict[str, Any]:
        """Only what the model needs, {"params": ..., "router_state": ...}; raises as `restore` does."""
        self._check_model(step)
        fresh = jax.eval_shape(lambda: init_state(self._config))
        variables, shardings = (tree and {"params": without_adapters(tree.params), "router_state": tree.router_state}
                                for tree in (fresh, self._shardings))  # fmt: skip
        restored = self._read(step, VARIABLES, variables, shardings)
        if not self._config.lora.rank:
            return restored
        adapters, shardings = (tree and learning_part([ADAPTERS], tree.params) for tree in (fresh, self._shardings))
        if (self._folder / str(step) / ADAPTER).is_dir():
            adapters = self._read(step, ADAPTER, adapters, shardings)
        else:
            fresh_ones = partial(with_adapters, self._config, {})
            adapters = jax.jit(fresh_ones, out_shardings=shardings)()
        return restored | {"params": with_part(restored["params"], adapters)}

    def restore_average(self, step: int, places: Any) -> Any:
        """The average of the parameters saved at `step`, put where `places` says, or None if none was kept."""
        if not (self._folder / str(step) / AVERAGE).is_dir():
            return None
        fresh = jax.eval_shape(lambda: init_state(self._config))
        biases = jax.tree.map(lambda _: jax.tree.leaves(places)[0].with_memory_kind("device"), fresh.router_state)
        variables = {"params": fresh.params, "router_state": fresh.router_state}
        return self._read(step, AVERAGE, variables, {"params": places, "router_state": biases})["params"]

    def source(self, step: int) -> OrbaxSource:
        """The same, to be read tensor by tensor; raises as `restore` does."""
        self._check_model(step)
        self._check_files(step, VARIABLES)
        return OrbaxSource(self._folder / str(step))

    def _check_files(self, step: int, name: str) -> None:
        damaged = damaged_file(self._folder / str(step), name) if processes.is_first() else None
        if processes.of_first(damaged is not None):
            raise DamagedCheckpoint(f"{self._folder / str(step)}: {damaged or 'a file'} is not as it was written")

    def _read(self, step: int, name: str, abstract: Any, shardings: Any) -> Any:
        """One item of a checkpoint, given an abstract tree of it and where its arrays go."""
        if shardings is None:
            shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract)
        self._check_files(step, name)
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
        try:
            items = ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)})
            return self._manager.restore(step, args=items)[name]
        except Exception as error:
            raise DamagedCheckpoint(f"{self._folder / str(step)}: cannot be read: {first_line(error)}") from None

    def _check_model(self, step: int) -> None:
        saved = self.meta(step)["model"]
        saved = dataclasses.asdict(ModelConfig()) | saved  # before a field was there, its default was all there was
        if isinstance(saved["rope_scaling"], dict):
            saved["rope_scaling"] = dataclasses.asdict(RopeScaling()) | saved["rope_scaling"]
        for name, value in dataclasses.asdict(self._config.model).items():
            if name not in HOW_COMPUTED and saved[name] != value:
                raise CheckpointError(
                    f"{self._folder / str(step)}: checkpoint of another config: model.{name} is {saved[name]} "
                    f"there and {value} here"
                )


def _piecewise(config: Config, variables: dict[str, Any]) -> dict[str, Any]:
    """Save each layer's, and each expert's, part of a stack as a piece of its own, so that it can be read alone."""
    stacks = stacked_arrays(config.model)

    def save_args(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> ocp.SaveArgs:
        stack = stacks[tuple(key.key for key in path)]
        piece = max(math.prod(stack.trailing) * leaf.dtype.itemsize, SMALLEST_TARGET)
        # Orbax cuts along these axes as far as it goes, and along others only beyond that size.
        return ocp.SaveArgs(chunk_byte_size=piece, shard_axes=tuple(range(len(stack.leading))))

    return jax.tree_util.tree_map_with_path(save_args, variables)

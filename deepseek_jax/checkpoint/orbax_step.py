"""What a step's folder among a run's checkpoints holds, and how the model's arrays lie in it."""

import dataclasses
from pathlib import Path
from typing import Any

import tensorstore as ts

from deepseek_jax.checkpoint.forms import FORMS
from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import file_inside, read_object, shown
from deepseek_jax.config import ModelConfig

VARIABLES, META, SCALES, ADAPTER, AVERAGE = "variables", "meta", "fp8_scales", "adapter", "average"
"""Items of a step: what the model is; its config; scales that the weights came with, as a safetensors directory; and what
of a model that has adapters is theirs."""
CAME_AS = "came_as"
"""In `meta`: how weights that were converted were stored."""


def step_meta(config: ModelConfig, step: int, came_as: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the item `meta` of a step holds.

    Args:
        came_as: the `form` that converted weights were in, and the `dtypes` that differed from it; see `source.Source`.
    """
    return {"model": dataclasses.asdict(config), "step": step} | ({CAME_AS: came_as} if came_as else {})


def read_came_as(meta: dict[str, Any], step: Path) -> tuple[str | None, dict[str, str]]:
    """What `step_meta` was told of the form, and of dtypes that differ from it.

    Raises:
        CheckpointError: if it is nothing that this file writes.
    """
    came_as = meta.get(CAME_AS, {"form": None, "dtypes": {}})
    form, dtypes = (came_as.get(name) for name in ("form", "dtypes")) if isinstance(came_as, dict) else (None, None)
    known = {"F8_E8M0", *FORMS.values()}
    if not isinstance(dtypes, dict) or not set(dtypes.values()) <= known or not (form is None or form in FORMS):
        raise CheckpointError(f"{step / META / 'metadata'}: {CAME_AS} is {shown(came_as)}; it is damaged")
    return form, dtypes


def read_meta(step: Path) -> dict[str, Any]:
    """The item `meta` of a step.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    folder = step / META
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing; choose another checkpoint")
    meta = read_object(file_inside(folder, "metadata", str(step)))
    if not isinstance(meta.get("model"), dict):
        raise CheckpointError(f"{folder / 'metadata'}: model is {shown(meta.get('model'))}; an object is expected")
    return meta


@dataclasses.dataclass(frozen=True)
class StackedArray:
    """An array of the JAX model's variables: matrices or vectors under leading axes of layers and experts."""

    path: tuple[str, ...]
    leading: tuple[int, ...]
    trailing: tuple[int, ...]
    is_bias: bool

    @property
    def name(self) -> str:
        """As orbax names it."""
        return ".".join(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return self.leading + self.trailing


def stacked_arrays(config: ModelConfig) -> dict[tuple[str, ...], StackedArray]:
    """The arrays that hold all that `layout` lists, by path."""
    arrays = {}
    for place in layout(config):
        # The last of each array's places has its highest index.
        trailing = place.shape[::-1] if place.transposed else place.shape
        leading = tuple(index + 1 for index in place.index)
        if not place.is_copy:
            arrays[place.path] = StackedArray(place.path, leading, trailing, place.is_bias)
    return arrays


def uncached() -> ts.Context:
    """For tensorstore: what is read or written once is not kept in memory."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


def first_line(error: Exception) -> str:
    """The beginning of what orbax or tensorstore, which write pages, say of an error."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.partition(". See full TensorStore")[0][:200]

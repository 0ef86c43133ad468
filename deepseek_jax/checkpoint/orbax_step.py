"""What a step's folder among a run's checkpoints holds, and how the model's arrays lie in it."""

import dataclasses
from pathlib import Path
from typing import Any

import tensorstore as ts

from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import file_inside, read_object, shown
from deepseek_jax.config import ModelConfig

VARIABLES, META, SCALES = "variables", "meta", "fp8_scales"
"""Items of a step: what the model is; its config; scales that the weights came with, as a safetensors directory."""


def step_meta(config: ModelConfig, step: int) -> dict[str, Any]:
    """What the item `meta` of a step holds."""
    return {"model": dataclasses.asdict(config), "step": step}


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

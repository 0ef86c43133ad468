"""Load a Hugging Face directory into the JAX model's variables, and save one from them, all in memory.

For models that fit; `deepseek_jax.convert` streams. The PyTorch sibling has the same two functions.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.finite import count_not_finite
from deepseek_jax.checkpoint.forms import FORMS
from deepseek_jax.checkpoint.hf_source import HuggingFaceSource
from deepseek_jax.checkpoint.hf_writer import SHARD_BYTES, write_huggingface
from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.checkpoint.orbax_step import stacked_arrays
from deepseek_jax.checkpoint.staging import staged_directory
from deepseek_jax.checkpoint.tensors import CheckpointError, fill
from deepseek_jax.config import ModelConfig


def load_pretrained(directory: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and variables, {"params": ..., "router_state": ...} as float32 numpy arrays, of a Hugging Face directory.

    Raises:
        UserError: one line naming file and tensor.
    """
    source = HuggingFaceSource(directory)
    arrays = {path: np.empty(array.shape, np.float32) for path, array in stacked_arrays(source.config).items()}
    for place in layout(source.config):
        if not place.is_copy:
            weights = source.read(place)
            fill(arrays[place.path][place.index], weights.T if place.transposed else weights)
    variables: dict[str, Any] = {"params": {}, "router_state": {}}
    for path, array in arrays.items():
        node = variables
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return source.config, variables


def save_pretrained(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    variables: Mapping[str, Any],
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory, which appears whole or not at all.

    Args:
        variables: as the model's `init` gives them and `load_pretrained` does.
        dtype: float32, bfloat16, float16 or fp8.
        tokenizer: a directory with a tokenizer.json, to go with it.

    Raises:
        UserError: one line naming file and tensor; what was at `directory` is then as it was.
    """
    if dtype not in FORMS:
        raise CheckpointError(f"dtype={dtype}: choose one of {', '.join(FORMS)}")
    source = VariablesSource(config, variables, dtype)
    with staged_directory(directory) as partial:
        write_huggingface(partial, source, dtype, None if tokenizer is None else Path(tokenizer), max_shard_bytes)


class VariablesSource:
    """See `source.Source`; of what is in memory already."""

    summary = "variables in memory"

    def __init__(self, config: ModelConfig, variables: Mapping[str, Any], form: str = "float32"):
        self.config, self.form = config, form
        self.dtypes: dict[str, str] = {}
        self._arrays = {}
        for path, array in stacked_arrays(config).items():
            node: Any = variables
            for key in path:
                node = node.get(key) if isinstance(node, Mapping) else None
            if node is None or node.shape != array.shape:
                found = "missing" if node is None else f"of shape {list(node.shape)}"
                raise CheckpointError(f"variables: {'/'.join(path)}: {found}; {list(array.shape)} is expected")
            self._arrays[path] = node

    def read(self, place: TensorPlace) -> np.ndarray:
        """See `Source.read`."""
        array = np.asarray(self._arrays[place.path][place.index])
        if broken := count_not_finite(array):
            raise CheckpointError(f"variables: {place.name}: {broken:,} of {array.size:,} numbers are NaN or infinite")
        return array.T if place.transposed else array

    def scales(self, place: TensorPlace) -> np.ndarray | None:
        """See `Source.scales`."""
        return None

    def quantized(self) -> set[str] | None:
        """See `Source.quantized`."""
        return None

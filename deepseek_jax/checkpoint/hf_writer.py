"""Write a Hugging Face directory that `transformers` loads as `deepseek_v3`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from deepseek_jax.checkpoint.forms import encode, stored_as, tensor_specs
from deepseek_jax.checkpoint.hf_config import CONFIG_JSON, to_config_json
from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.checkpoint.safetensors_writer import write_tensors
from deepseek_jax.checkpoint.source import Source
from deepseek_jax.checkpoint.tensors import TensorSpec
from deepseek_jax.checkpoint.tokenizer_files import write_json, write_tokenizer

SHARD_BYTES = 5 * 10**9
"""Largest file, unless told otherwise."""


def planned(source: Source, form: str) -> list[TensorSpec]:
    """The tensors that `write_huggingface` writes, in order."""
    return tensor_specs(source.config, form, source.quantized())


def encoded(source: Source, form: str) -> Iterator[np.ndarray]:
    """Their numbers, each read when it is asked for."""
    quantized = source.quantized()
    for place in layout(source.config):
        specs = stored_as(place, form, quantized)
        yield from encode(specs, source.read(place), source.scales(place) if len(specs) > 1 else None)


def write_huggingface(
    directory: Path,
    source: Source,
    form: str,
    tokenizer: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write weights, config.json, generation_config.json and the tokenizer's files.

    Args:
        directory: empty; see `staged_directory`.
        form: one of `forms.FORMS`.
        tokenizer: a directory that holds tokenizer.json and what else belongs to it, or none.
        progress: called with the number of bytes written since the call before.

    Raises:
        UserError: one line, if anything cannot be read or written.
    """
    write_tensors(directory, planned(source, form), encoded(source, form), max_shard_bytes, progress)
    token_ids = write_tokenizer(directory, tokenizer, source.config.max_position_embeddings)
    write_json(directory / CONFIG_JSON, to_config_json(source.config, form, token_ids))

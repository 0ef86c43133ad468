"""Write a Hugging Face directory that `transformers` loads as `deepseek_v3`."""

import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from deepseek_jax.checkpoint.ahead import ahead
from deepseek_jax.checkpoint.forms import NO_OTHERS, encode, stored_as, tensor_specs
from deepseek_jax.checkpoint.hf_config import CONFIG_JSON, carried_content, to_config_json
from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.checkpoint.safetensors_writer import write_tensors
from deepseek_jax.checkpoint.source import Source
from deepseek_jax.checkpoint.tensors import TensorSpec
from deepseek_jax.checkpoint.tokenizer_files import write_json, write_tokenizer
from deepseek_jax.checkpoint.transposing import in_rows
from deepseek_jax.checkpoint.untrusted import read_object

SHARD_BYTES = 5 * 10**9
"""Largest file, unless told otherwise."""


def planned(source: Source, form: str) -> list[TensorSpec]:
    """The tensors that `write_huggingface` writes, in order."""
    return tensor_specs(source.config, form, source.quantized(), _dtypes(source, form))


def encoded(source: Source, form: str) -> Generator[np.ndarray, None, None]:
    """Their numbers; what comes next is read meanwhile."""
    quantized, dtypes = source.quantized(), _dtypes(source, form)

    def arrays(place: TensorPlace) -> list[np.ndarray]:
        specs = stored_as(place, form, quantized, dtypes)
        return encode(specs, in_rows(source.read(place)), source.scales(place) if len(specs) > 1 else None)

    def nbytes(place: TensorPlace) -> int:
        return sum(spec.nbytes for spec in stored_as(place, form, quantized, dtypes))

    with closing(ahead(arrays, layout(source.config), nbytes)) as made:
        for of_one in made:
            yield from of_one


def _dtypes(source: Source, form: str) -> Mapping[str, str]:
    """Those that differ from the form, where it is the one that they came in."""
    return source.dtypes if form == source.form else NO_OTHERS


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
        tokenizer: a directory that holds tokenizer.json and what else belongs to it, such as the config.json that came
            with the weights; or none.
        progress: called with the number of bytes written since the call before.

    Raises:
        UserError: one line, if anything cannot be read or written.
    """
    with closing(encoded(source, form)) as arrays:
        write_tensors(directory, planned(source, form), arrays, max_shard_bytes, progress)
    token_ids = write_tokenizer(directory, tokenizer, source.config.max_position_embeddings)
    carried = carried_content(tokenizer, source.config)
    content = to_config_json(source.config, form, token_ids, carried, keeps_scales=source.quantized() is not None)
    if tokenizer is not None and carried is not None and content == read_object(tokenizer / CONFIG_JSON):
        shutil.copyfile(tokenizer / CONFIG_JSON, directory / CONFIG_JSON)  # to the byte
    else:
        write_json(directory / CONFIG_JSON, content)

"""A Hugging Face `deepseek_v3` directory as a source of weights."""

import dataclasses
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from deepseek_jax.checkpoint.finite import require_finite
from deepseek_jax.checkpoint.forms import FORMS, SCALE_SUFFIX, compare, stored_as
from deepseek_jax.checkpoint.fp8_blocks import dequantize_blocks
from deepseek_jax.checkpoint.hf_config import read_config_json
from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.source import summarize
from deepseek_jax.checkpoint.tensors import CheckpointError, TensorSpec
from deepseek_jax.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"


class HuggingFaceSource:
    """See `source.Source`. What is float8 goes by each tensor's dtype, never by its name.

    Attributes:
        notes: lines for people on what is not as its config.json says and yet no fault.
    """

    def __init__(self, path: str | os.PathLike[str], allow_non_finite: bool = False):
        """Read config.json and all headers and compare them.

        Args:
            allow_non_finite: let NaN and infinity pass, so that what is left of a broken model can be had.

        Raises:
            UserError: one line naming file and key or tensors.
        """
        path = Path(path)
        self._allow_non_finite = allow_non_finite
        self._tensors = SafetensorsDirectory(path)
        self.config, self.notes = _without_absent_mtp(read_config_json(path), self._tensors)
        float8 = {name for name, entry in self._tensors.entries.items() if entry.dtype == "F8_E4M3"}
        self.form = "fp8" if float8 else _form(self._tensors)
        self._float8 = float8
        compare(str(path), self._expected(), self._tensors.entries)
        self._check_copies()
        dtypes = Counter(entry.dtype for entry in self._tensors.entries.values())
        self.summary = summarize(f"{path}: Hugging Face, {self.form}", dtypes, self._tensors.nbytes)

    def _expected(self) -> list[TensorSpec]:
        specs = []
        for place in layout(self.config):
            is_linear = place.index and len(place.shape) == 2
            stored = stored_as(place, self.form, self._float8 if is_linear else ())
            if place.is_bias and place.name in self._tensors.entries:
                # Some writers cut them down with the rest; they are widened again.
                dtype = self._tensors.entries[place.name].dtype
                stored = [dataclasses.replace(stored[0], dtype=dtype if dtype == FORMS[self.form] else "F32")]
            specs += stored
        return specs

    def _check_copies(self) -> None:
        """MTP layers repeat the main model's embedding and head; ours has one of each, so they must be equal."""
        places = layout(self.config)
        originals = {place.path: place for place in places if not place.is_copy}
        for place in places:
            if place.is_copy:
                original = originals[place.path]
                if not np.array_equal(self.read(place).view(np.uint8), self.read(original).view(np.uint8)):
                    file = self._tensors.entries[place.name].file
                    raise CheckpointError(f"{file}: {place.name}: is not equal to {original.name}")

    def read(self, place: TensorPlace) -> np.ndarray:
        """See `Source.read`; float8 is dequantised to float32."""
        weights = self._stored(place.name)
        if place.name not in self._float8:
            return weights
        where = f"{self._tensors.entries[place.name].file}: {place.name}"
        return dequantize_blocks(weights, self._stored(place.name + SCALE_SUFFIX), where, self._allow_non_finite)

    def _stored(self, name: str) -> np.ndarray:
        """A tensor as it lies in its file, with nothing in it that is not finite."""
        array = self._tensors.read(name)
        if not self._allow_non_finite:
            require_finite(array, f"{self._tensors.entries[name].file}: {name}")
        return array

    def scales(self, place: TensorPlace) -> np.ndarray | None:
        """See `Source.scales`."""
        return self._stored(place.name + SCALE_SUFFIX) if place.name in self._float8 else None

    def quantized(self) -> set[str] | None:
        """See `Source.quantized`."""
        return self._float8 or None


def _without_absent_mtp(config: ModelConfig, tensors: SafetensorsDirectory) -> tuple[ModelConfig, list[str]]:
    """Depth 0 where config.json speaks of MTP layers and there is no tensor of any: transformers writes such."""
    layers = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in tensors.names)
    present = any(match and int(match[1]) >= config.num_hidden_layers for match in layers)
    if present or not config.num_nextn_predict_layers:
        return config, []
    note = (
        f"{tensors.path}: num_nextn_predict_layers is {config.num_nextn_predict_layers} and there are no tensors of "
        "MTP layers; it is taken as 0"
    )
    return dataclasses.replace(config, num_nextn_predict_layers=0), [note]


def _form(tensors: SafetensorsDirectory) -> str:
    """The form of a checkpoint without float8; its embedding's dtype is what all others must have."""
    entry = tensors.entries.get(EMBEDDING)
    if entry is None:
        raise CheckpointError(f"{tensors.path}: {EMBEDDING}: missing")
    form = next((form for form, dtype in FORMS.items() if dtype == entry.dtype), None)
    if form is None:
        raise CheckpointError(f"{entry.file}: {EMBEDDING}: {entry.dtype}; only {', '.join(FORMS)} are supported")
    return form

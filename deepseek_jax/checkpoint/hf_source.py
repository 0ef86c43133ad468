"""A Hugging Face directory as a source of weights."""

import dataclasses
import os
from collections import Counter
from pathlib import Path

import numpy as np

from deepseek_jax.checkpoint.finite import require_finite
from deepseek_jax.checkpoint.forms import FORMS, SCALE_SUFFIX, compare, stored_as
from deepseek_jax.checkpoint.fp8_blocks import dequantize_blocks
from deepseek_jax.checkpoint.hf_config import read_hf_config
from deepseek_jax.checkpoint.hf_files import model_tensors, mtp_depth, weight_files
from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.source import summarize
from deepseek_jax.checkpoint.tensors import CheckpointError, TensorSpec
from deepseek_jax.checkpoint.torch_reader import TorchDirectory

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("F32", "BF16", "F16")
"""What weights may be stored in, each by itself, beside float8."""


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
        came = read_hf_config(path)
        self._tensors = _opened(path)
        names, left_out = model_tensors(came, self._tensors.names, str(path))
        self._entries = {name: self._tensors.entries[stored] for name, stored in names.items()}
        depth, absent = mtp_depth(came.model, names, str(path))
        self.config = dataclasses.replace(came.model, num_nextn_predict_layers=depth)
        self.notes = [*came.notes, *left_out, *absent]
        self._float8 = {name for name, entry in self._entries.items() if entry.dtype == "F8_E4M3"}
        self.form = "fp8" if self._float8 else self._form()
        if self.config.tie_word_embeddings and HEAD in self._entries:
            self._leave_out_tied_head()
        compare(str(path), self._expected(), self._entries)
        self._check_copies()
        dtypes = Counter(entry.dtype for entry in self._entries.values())
        nbytes = sum(entry.nbytes for entry in self._entries.values())
        self.summary = summarize(f"{path}: Hugging Face, {self.form}", dtypes, nbytes)
        usual = {spec.name: spec.dtype for place in layout(self.config) for spec in self._usual(place)}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items() if entry.dtype != usual[name]}

    def _usual(self, place: TensorPlace) -> list[TensorSpec]:
        """As the form has it; what is float8 is so by its dtype."""
        is_linear = place.index and len(place.shape) == 2
        return stored_as(place, self.form, self._float8 if is_linear else ())

    def _expected(self) -> list[TensorSpec]:
        """The same in any of the dtypes that are allowed, where one of them is found."""

        def found(spec: TensorSpec) -> TensorSpec:
            dtype = self._entries[spec.name].dtype if spec.name in self._entries else spec.dtype
            allowed = ("F32", "F8_E8M0") if spec.name.endswith(SCALE_SUFFIX) else FLOATS
            is_codes = spec.dtype == "F8_E4M3"
            return dataclasses.replace(spec, dtype=dtype) if dtype in allowed and not is_codes else spec

        return [found(spec) for place in layout(self.config) for spec in self._usual(place)]

    def _form(self) -> str:
        """The form of a checkpoint without float8: that of its embedding."""
        entry = self._entries.get(EMBEDDING)
        if entry is None:
            raise CheckpointError(f"{self._tensors.path}: {EMBEDDING}: missing")
        form = next((form for form, dtype in FORMS.items() if dtype == entry.dtype), None)
        if form is None:
            raise CheckpointError(f"{entry.file}: {EMBEDDING}: {entry.dtype}; only {', '.join(FORMS)} are supported")
        return form

    def _leave_out_tied_head(self) -> None:
        """A head that repeats the embedding, with which it is tied."""
        if EMBEDDING in self._entries and not _equal(self._stored(HEAD), self._stored(EMBEDDING)):
            raise CheckpointError(
                f"{self._entries[HEAD].file}: {HEAD}: is not equal to {EMBEDDING}, though tie_word_embeddings is true"
            )
        del self._entries[HEAD]
        self.notes.append(f"{self._tensors.path}: {HEAD} is left out, for tie_word_embeddings makes it the embedding")

    def _check_copies(self) -> None:
        """MTP layers repeat the main model's embedding and head; ours has one of each, so they must be equal."""
        places = layout(self.config)
        originals = {place.path: place for place in places if not place.is_copy}
        for place in places:
            if place.is_copy:
                original = originals[place.path]
                if not _equal(self.read(place), self.read(original)):
                    file = self._entries[place.name].file
                    raise CheckpointError(f"{file}: {place.name}: is not equal to {original.name}")

    def read(self, place: TensorPlace) -> np.ndarray:
        """See `Source.read`; float8 is dequantised to float32."""
        weights = self._stored(place.name)
        if place.name not in self._float8:
            return weights
        where = f"{self._entries[place.name].file}: {place.name}"
        return dequantize_blocks(weights, self._scales(place.name), where, self._allow_non_finite)

    def _stored(self, name: str) -> np.ndarray:
        """A tensor as it lies in its file, with nothing in it that is not finite."""
        entry = self._entries[name]
        array = self._tensors.read(entry.name)
        if not self._allow_non_finite:
            require_finite(array, f"{entry.file}: {entry.name}")
        return array

    def _scales(self, name: str) -> np.ndarray:
        return self._stored(name + SCALE_SUFFIX).astype(np.float32, copy=False)

    def scales(self, place: TensorPlace) -> np.ndarray | None:
        """See `Source.scales`."""
        return self._scales(place.name) if place.name in self._float8 else None

    def quantized(self) -> set[str] | None:
        """See `Source.quantized`."""
        return self._float8 or None


def _opened(path: Path) -> SafetensorsDirectory | TorchDirectory:
    """The tensors of a directory, by what kind of files it has."""
    files, _ = weight_files(path)
    return SafetensorsDirectory(path) if files[0].suffix == ".safetensors" else TorchDirectory(path)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.view(np.uint8), other.view(np.uint8))

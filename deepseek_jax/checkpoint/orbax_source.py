"""A step of a run's checkpoints as a source of weights, tensor by tensor.

Orbax restores whole trees. Here the arrays that it wrote are opened where they lie, so that an expert
is read without its neighbours: all of them in memory would be the model several times over.
"""

import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from deepseek_jax.checkpoint.adapters import adapter_layout, merged
from deepseek_jax.checkpoint.finite import require_finite
from deepseek_jax.checkpoint.forms import FORMS, SCALE_SUFFIX, compare, dtype_name
from deepseek_jax.checkpoint.fp8_blocks import check_scales
from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.checkpoint.orbax_step import (
    ADAPTER,
    AVERAGE,
    META,
    SCALES,
    VARIABLES,
    StackedArray,
    first_line,
    read_came_as,
    read_meta,
    stacked_arrays,
    uncached,
)
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.source import summarize
from deepseek_jax.checkpoint.tensors import CheckpointError, TensorSpec
from deepseek_jax.checkpoint.untrusted import file_inside, model_config, read_object, shown
from deepseek_jax.config import ConfigError, LoraConfig, ModelConfig, from_mapping


class OrbaxSource:
    """See `source.Source`."""

    def __init__(self, step: str | os.PathLike[str], allow_non_finite: bool = False, item: str = VARIABLES):
        """Open every array of a step's folder and compare it with the config saved beside them.

        Args:
            item: AVERAGE reads the weights' average instead.
            allow_non_finite: let NaN and infinity pass, so that what is left of a broken model can be had.

        Raises:
            UserError: one line naming the step and what is missing or not as it should be.
        """
        step = Path(step)
        self._allow_non_finite = allow_non_finite
        meta = read_meta(step)
        came_as, self.dtypes = read_came_as(meta, step)
        self.config = model_config(meta["model"], str(step / META / "metadata"))
        self.lora = _lora(meta, step)
        arrays = stacked_arrays(self.config)
        if not (step / item).is_dir() and item == AVERAGE:
            raise CheckpointError(f"{step}: holds no average of the weights; a run keeps one by train.ema_decay=0.999")
        self._stores = _open_arrays(step / item, arrays)
        dtypes = Counter(dtype_name(store.dtype.numpy_dtype) for store in self._stores.values())
        self._adapters = _adapters(self.config, self.lora)
        if self._adapters:
            halves = [half for both in self._adapters.values() for half in both]
            self._stores |= _open_halves(step / ADAPTER, halves)
        self._scales = _kept_scales(step, self.config)
        stored = next((form for form, dtype in FORMS.items() if dtype in dtypes and form != "float32"), "float32")
        self.form = came_as or ("fp8" if self._scales else stored)
        nbytes = sum(store.size * store.dtype.numpy_dtype.itemsize for store in self._stores.values())
        adapter = f", {len(self._adapters)} adapters of rank {self.lora.rank}" if self._adapters else ""
        came = ", from FP8 with its scales kept" if self._scales else ""
        self.summary = summarize(f"{step}: orbax{came}{adapter}", dtypes, nbytes)
        self._where = str(step)
        self._pieces = _Pieces()

    def read(self, place: TensorPlace) -> np.ndarray:
        """See `Source.read`; float64 stays so. An adapter is merged into its weight."""
        array = self._read(place)
        halves = self._adapters.get(place.name)
        if halves is not None:
            a, b = (self._read(half) for half in halves)
            array = merged(array.T, a.T, b.T, self.lora.alpha / self.lora.rank).T
        if not self._allow_non_finite:
            require_finite(array, f"{self._where}: {place.name}")
        return array

    def adapter(self) -> Iterator[tuple[TensorPlace, np.ndarray]]:
        """A and B of every adapter, in the checkpoint's layout."""
        for place in (half for halves in self._adapters.values() for half in halves):
            yield place, self._read(place)

    def _read(self, place: TensorPlace) -> np.ndarray:
        store = self._stores[place.path]
        try:
            array = self._pieces.read(place.path, store, place.index)
        except Exception as error:  # tensorstore raises ValueError for most, and OSError
            raise CheckpointError(f"{self._where}: {place.name}: cannot be read: {first_line(error)}") from None
        return array.T if place.transposed else array

    def scales(self, place: TensorPlace) -> np.ndarray | None:
        """See `Source.scales`."""
        name = place.name + SCALE_SUFFIX
        if not self._scales or name not in self._scales.entries:
            return None
        scales = self._scales.read(name)
        if not self._allow_non_finite:
            require_finite(scales, f"{self._scales.entries[name].file}: {name}")
        return scales

    def quantized(self) -> set[str] | None:
        """See `Source.quantized`."""
        return {name.removesuffix(SCALE_SUFFIX) for name in self._scales.names} if self._scales else None


class _Pieces:
    """Reads a part of an array; where the array was saved in larger pieces, keeps the last ones read.

    Training saves one piece for each layer and expert, so that nothing is kept; of what others saved in
    one piece, reading it anew for every expert would take forever.
    """

    LIMIT = 4
    """As many as are read in turn: an expert has three matrices."""

    def __init__(self):
        self._kept: dict[tuple, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, path: tuple[str, ...], store: Any, index: tuple[int, ...]) -> np.ndarray:
        """The part of `store` at the leading `index`."""
        chunk = store.chunk_layout.read_chunk.shape[: len(index)]
        if math.prod(chunk) == 1:
            return np.asarray(store[index].read().result())
        corner = tuple(i // size * size for i, size in zip(index, chunk))
        with self._lock:  # several threads ask for parts of one piece, which is read once
            if (path, corner) not in self._kept:
                while len(self._kept) >= self.LIMIT:
                    del self._kept[next(iter(self._kept))]
                ends = (min(start + size, end) for start, size, end in zip(corner, chunk, store.shape))
                box = tuple(slice(start, end) for start, end in zip(corner, ends))
                self._kept[path, corner] = np.asarray(store[box].read().result())
            return self._kept[path, corner][tuple(i - start for i, start in zip(index, corner))]


def _kept_scales(step: Path, config: ModelConfig) -> SafetensorsDirectory | None:
    if not (step / SCALES).is_dir():
        return None
    scales = SafetensorsDirectory(step / SCALES)
    shapes = {place.name + SCALE_SUFFIX: place.shape for place in layout(config) if not place.is_copy}
    for name, entry in scales.entries.items():
        if name not in shapes:
            raise CheckpointError(f"{entry.file}: {shown(name)}: scales of no weight that the model has")
        # Their shape and dtype; the scales themselves are looked at when they are used.
        stand_in = np.broadcast_to(np.ones((), entry.numpy_dtype), entry.shape)
        check_scales(stand_in, shapes[name], f"{entry.file}: {name}")
    return scales


def _open_arrays(folder: Path, arrays: dict[tuple[str, ...], StackedArray]) -> dict[tuple[str, ...], Any]:
    """Every array of `folder` by path, checked to be those of the config: all of one dtype but for the biases."""
    saved = _saved_names(folder)
    stores = {path: _open(folder, array.name) for path, array in arrays.items() if array.name in saved}
    dtypes = {path: dtype_name(store.dtype.numpy_dtype) for path, store in stores.items()}
    weights = [dtype for path, dtype in dtypes.items() if not arrays[path].is_bias]
    dtype = next((dtype for dtype in ("BF16", "F16", "F64") if dtype in weights[:1]), "F32")
    expected = []
    for array in arrays.values():
        widened = array.is_bias and dtype in ("BF16", "F16")
        expected.append(TensorSpec(array.name, "F32" if widened else dtype, array.shape))
    found = {name: TensorSpec(name, "", ()) for name in saved}
    for path, store in stores.items():
        found[arrays[path].name] = TensorSpec(arrays[path].name, dtypes[path], tuple(store.shape))
    compare(str(folder), expected, found)
    return stores


def _lora(meta: dict[str, Any], step: Path) -> LoraConfig:
    """The adapters that a step has, by what was saved beside it."""
    try:
        return from_mapping({"lora": meta.get("lora", {}), "train": {"sequence_length": 1}}, where="lora").lora
    except ConfigError as error:
        raise CheckpointError(f"{step / META / 'metadata'}: {error}") from None


def _adapters(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[TensorPlace, TensorPlace]]:
    """A and B by the name of the weight that they stand beside."""
    places = adapter_layout(config, lora)
    return {f"{a.name.rpartition('.')[0]}.weight": (a, b) for a, b in zip(places[::2], places[1::2])}


def _open_halves(folder: Path, halves: list[TensorPlace]) -> dict[tuple[str, ...], Any]:
    """The arrays of adapters, checked to be those of the config."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing; choose another checkpoint")
    shapes = {half.path: (*(index + 1 for index in half.index), *half.shape[::-1]) for half in halves}
    names = {path: ".".join(path[1:]) for path in shapes}
    saved = _saved_names(folder)
    stores = {path: _open(folder, name) for path, name in names.items() if name in saved}
    expected = [TensorSpec(names[path], "F32", shape) for path, shape in shapes.items()]
    found = {name: TensorSpec(name, "", ()) for name in saved}
    for path, store in stores.items():
        dtype = dtype_name(store.dtype.numpy_dtype)
        found[names[path]] = TensorSpec(names[path], "F32" if dtype == "F64" else dtype, tuple(store.shape))
    compare(str(folder), expected, found)
    return stores


def _open(folder: Path, name: str) -> Any:
    home: dict[str, Any] = {"driver": "file", "path": f"{folder.absolute()}/"}
    if (folder / "manifest.ocdbt").exists():
        kvstore = {"driver": "ocdbt", "base": home, "path": f"{name}/"}
    else:
        kvstore = home | {"path": f"{home['path']}{name}/"}
    # A piece that is not there was lost: it does not stand for zeros.
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    try:
        return ts.open(spec, read=True, context=uncached()).result()
    except Exception as error:  # tensorstore raises ValueError for most, and OSError
        raise CheckpointError(f"{folder}: {name}: cannot be opened: {first_line(error)}") from None


def _saved_names(folder: Path) -> list[str]:
    """Names of the arrays that orbax says it saved."""
    path = file_inside(folder, "_METADATA", str(folder.parent))
    content = read_object(path)
    try:
        # An empty mapping, such as the state of no router, is listed too.
        entries = [value for value in content["tree_metadata"].values() if value["value_metadata"]["value_type"] != "Dict"]
        return [".".join(part["key"] for part in entry["key_metadata"]) for entry in entries]
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path}: tree_metadata is not as orbax writes it") from None

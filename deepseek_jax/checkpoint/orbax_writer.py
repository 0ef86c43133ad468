"""Write a step that training goes on from, tensor by tensor.

Orbax saves whole trees. Here it saves one of the same structure with a single number in each array, in
whose place the real arrays are then put, an expert at a time; so orbax, not this file, decides what
else belongs into a checkpoint.
"""

import logging
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from deepseek_jax.checkpoint.ahead import ahead
from deepseek_jax.checkpoint.forms import stored_as
from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.checkpoint.orbax_step import (
    META,
    SCALES,
    VARIABLES,
    StackedArray,
    first_line,
    stacked_arrays,
    step_meta,
)
from deepseek_jax.checkpoint.safetensors_writer import write_tensors
from deepseek_jax.checkpoint.source import Source
from deepseek_jax.checkpoint.staging import disk_errors
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.transposing import in_rows
from deepseek_jax.config import ModelConfig

Write = tuple[TensorPlace, int, Any]
"""A place, its bytes, and tensorstore's promise to write it."""

BYTES_IN_FLIGHT = 32 * 2**20
"""Of begun writes, beside the last."""


def write_step(
    step: Path,
    source: Source,
    dtype: str,
    progress: Callable[[int], None] = lambda nbytes: None,
    keep_form: bool = True,
) -> None:
    """Write a step's folder that training goes on from: the weights of `source`, with no optimizer state.

    Args:
        step: to be made; its name is the step's number. Write it within a `staged_directory`.
        dtype: float32, bfloat16 or float16; routers' biases are float32 in any case.
        progress: called with the number of bytes written since the call before.
        keep_form: note how the weights were stored, so that by themselves they go out the same.

    Raises:
        CheckpointError: one line, if it cannot be read or written.
    """
    arrays = stacked_arrays(source.config)
    _check_room(step, arrays, dtype)
    with disk_errors(step):
        _save_template(step, arrays, source if keep_form else None, source.config)
    stores = {}
    for path, array in arrays.items():
        chunk = (1,) * len(array.leading) + array.trailing
        stores[path] = _create(step / VARIABLES, array, chunk, np.float32 if array.is_bias else dtype)
    for place, nbytes, write in _in_flight(_writes(source, stores)):
        try:
            write.result()
        except Exception as error:  # tensorstore raises ValueError for most, and OSError
            reason = "the disk is full" if "No space left" in str(error) else first_line(error)
            raise CheckpointError(f"{step}: {place.name}: cannot be written: {reason}") from None
        progress(nbytes)
    _write_scales(step / SCALES, source)


def _check_room(step: Path, arrays: dict[tuple[str, ...], StackedArray], dtype: str) -> None:
    total = sum(math.prod(array.shape) for array in arrays.values()) * ts.dtype(dtype).numpy_dtype.itemsize
    free = shutil.disk_usage(next(folder for folder in step.parents if folder.exists())).free
    if total > free:
        raise CheckpointError(f"{step}: the disk has {free:,} bytes free and {total:,} are to be written")


def _writes(source: Source, stores: dict[tuple[str, ...], Any]) -> Iterator[Write]:
    """Begin the write of one place after the other."""

    def part(place: TensorPlace) -> tuple[TensorPlace, np.ndarray]:
        weights = source.read(place).astype(stores[place.path].dtype.numpy_dtype, copy=False)
        return place, in_rows(weights.T if place.transposed else weights)

    def nbytes(place: TensorPlace) -> int:
        return math.prod(place.shape) * stores[place.path].dtype.numpy_dtype.itemsize

    own = (place for place in layout(source.config) if not place.is_copy)
    with closing(ahead(part, own, nbytes)) as parts:
        for place, weights in parts:
            yield place, weights.nbytes, stores[place.path][place.index].write(weights)


def _in_flight(writes: Iterator[Write]) -> Iterator[Write]:
    """The same in the same order, a little later, so that the disk writes some while others are prepared."""
    begun: deque[Write] = deque()
    for write in writes:
        begun.append(write)
        while sum(nbytes for _, nbytes, _ in begun) > BYTES_IN_FLIGHT:
            yield begun.popleft()
    yield from begun


def _write_scales(folder: Path, source: Source) -> None:
    quantized = source.quantized()
    if not quantized:
        return
    places = [place for place in layout(source.config) if place.name in quantized]
    specs = [stored_as(place, "fp8", quantized)[1] for place in places]
    with disk_errors(folder):
        folder.mkdir()
    kept = (source.scales(place) for place in places)
    write_tensors(folder, specs, (scales for scales in kept if scales is not None))


def _save_template(
    step: Path, arrays: dict[tuple[str, ...], StackedArray], source: Source | None, config: ModelConfig
) -> None:
    import orbax.checkpoint as ocp  # takes half a second, which the way out of a run need not wait for

    came_as = None if source is None else {"form": source.form, "dtypes": source.dtypes}
    tree: dict[str, Any] = {"params": {}, "router_state": {}}
    for path in arrays:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.zeros(1, np.float32)
    handlers = {VARIABLES: ocp.StandardCheckpointHandler(use_ocdbt=False), META: ocp.JsonCheckpointHandler()}
    items = {
        VARIABLES: ocp.args.StandardSave(tree),
        META: ocp.args.JsonSave(step_meta(config, int(step.name), came_as)),
    }
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # It warns that there is nothing for it to merge.
    try:
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        with ocp.CheckpointManager(step.parent, options=options, item_handlers=handlers) as manager:
            manager.save(int(step.name), args=ocp.args.Composite(**items), force=True)
    finally:
        log.setLevel(level)


def _create(folder: Path, array: StackedArray, chunk: tuple[int, ...], dtype: Any) -> Any:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder / array.name}/"},
        "metadata": {"compressor": None, "chunks": chunk, "shape": array.shape},
        # A piece of zeros is written as well: one that is not there is one that was lost.
        "store_data_equal_to_fill_value": True,
    }
    # `staged_directory` waits for the disk once, at the end.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
    return ts.open(spec, dtype=ts.dtype(dtype), create=True, delete_existing=True, context=context).result()

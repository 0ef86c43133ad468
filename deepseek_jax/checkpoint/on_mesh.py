"""Weights straight from a checkpoint to the devices of a mesh that writes or scores, for models that no device holds.

Of each array one layer at a time is in the host's memory, and of experts those of one device: what a host needs hangs
neither on the model's depth nor on its number of devices.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.checkpoint.orbax_step import StackedArray, stacked_arrays
from deepseek_jax.checkpoint.source import Source
from deepseek_jax.checkpoint.tensors import fill
from deepseek_jax.config import ConfigError, ModelConfig, from_mapping
from deepseek_jax.model.layers import param_dtype
from deepseek_jax.parallel.mesh import make_mesh, resolve_serving
from deepseek_jax.parallel.sharding import Division, Place
from deepseek_jax.parallel.summary import readable_bytes
from deepseek_jax.parallel.weights import product_type


class Layers:
    """A stack of layers of which each is an array of its own; indexed as if it were one."""

    def __init__(self, arrays: Sequence[jax.Array]):
        self.arrays = arrays

    def __getitem__(self, layer: int) -> jax.Array:
        return self.arrays[layer]


def serving_division(
    config: ModelConfig, fields: Sequence[str], devices: Optional[Sequence[jax.Device]] = None
) -> Optional[Division]:
    """The mesh that the user asks for by `parallel.NAME=VALUE`; null, one device, by no field.

    Args:
        devices: null takes all that there are.

    Raises:
        ConfigError: one line naming the field at fault.
    """
    if not fields:
        return None
    for field in fields:
        if not field.startswith("parallel."):
            raise ConfigError(f"{field!r}: only fields such as parallel.expert=8 are expected here")
    devices = jax.devices() if devices is None else devices
    parallel = resolve_serving(from_mapping({}, fields, where="command line").parallel, config, len(devices))
    params: dict[str, Any] = {}
    for path, array in stacked_arrays(config).items():
        if path[0] == "params":
            _enter(params, path[1:], jax.ShapeDtypeStruct(array.shape, param_dtype(config)))
    return Division(parallel, params, make_mesh(parallel, devices), served=True)


def load_on_mesh(source: Source, config: ModelConfig, division: Division, stacked: bool = False) -> dict[str, Any]:
    """Variables {"params": ..., "router_state": ...} on their devices, products' weights in the type that those take.

    Args:
        config: the source's, maybe computed otherwise.
        stacked: give each stack of layers as one array, as `DeepseekV3` takes it, and not as `Layers`.

    Raises:
        UserError: one line naming the tensor that cannot be read.
    """
    tensors: dict[tuple[str, ...], dict[tuple[int, ...], TensorPlace]] = {}
    for tensor in layout(source.config):
        if not tensor.is_copy:
            tensors.setdefault(tensor.path, {})[tensor.index] = tensor
    variables: dict[str, Any] = {"params": {}, "router_state": {}}
    for path, array in stacked_arrays(source.config).items():
        place, dtype = _place(division, path), param_dtype(config)
        if path[0] == "params":
            dtype = product_type(config, path[1:], dtype)
        layers = _layers(source, array, tensors[path], division, place, dtype)
        if not array.leading:
            _enter(variables, path, next(layers))
        else:
            _enter(variables, path, _stack(layers, array, division, place) if stacked else Layers(list(layers)))
    return variables


def summary(division: Division, variables: dict[str, Any]) -> str:
    """A line for a person: the mesh, and what the fullest device holds of what `load_on_mesh` gave."""
    held: Counter[jax.Device] = Counter()
    for leaf in jax.tree.leaves(variables):
        for array in leaf.arrays if isinstance(leaf, Layers) else [leaf]:
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
    axes = " x ".join(f"{axis} {size}" for axis, size in division.mesh.shape.items() if axis in ("data", "fsdp", "expert"))
    return f"mesh: {axes} = {division.mesh.size} devices; each holds {readable_bytes(max(held.values()))} of weights"


def _enter(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _place(division: Division, path: tuple[str, ...]) -> Place:
    """Of an array by its path; a router's bias is whole everywhere."""
    if path[0] != "params":
        return Place(())
    place = division.places
    for key in path[1:]:
        place = place[key]
    return place


def _layers(
    source: Source, array: StackedArray, tensors: dict[tuple[int, ...], TensorPlace], division: Division, place: Place,
    dtype: jnp.dtype,
) -> Iterator[jax.Array]:  # fmt: skip
    """A stack's layers one by one, or the one array that is in no stack."""
    has_layers, has_experts = len(array.leading) > 0, len(array.leading) > 1
    within = Place(tuple((axis, dim - has_layers) for axis, dim in place.cuts))
    sharding = NamedSharding(division.mesh, within.spec())
    for layer in range(array.leading[0] if has_layers else 1):

        def read(expert: int, layer: int = layer) -> np.ndarray:
            tensor = tensors[(layer, expert)[: len(array.leading)]]
            weights = source.read(tensor)
            return weights.T if tensor.transposed else weights

        yield _placed(read, array.shape[has_layers:], has_experts, sharding, dtype)


def _placed(
    read: Callable[[int], np.ndarray], shape: tuple[int, ...], has_experts: bool, sharding: NamedSharding, dtype: jnp.dtype
) -> jax.Array:
    """An array on its devices; each tensor is read once.

    Args:
        read: gives an expert by its number; where the first axis is no experts', the whole array.
    """
    indices = sharding.addressable_devices_indices_map(shape)
    of_experts: dict[tuple[int, int], list[tuple[jax.Device, tuple[slice, ...]]]] = {}
    for device, index in indices.items():
        assert index is not None
        first, end = index[0].indices(shape[0])[:2] if has_experts else (0, 1)
        of_experts.setdefault((first, end), []).append((device, index[has_experts:]))
    parts = {}
    for (first, end), places in of_experts.items():
        weights = np.empty((end - first, *shape[has_experts:]), dtype)
        for expert in range(first, end):
            fill(weights[expert - first], read(expert))
        for device, index in places:
            part = np.ascontiguousarray(weights[:, *index])
            parts[device] = jax.device_put(part if has_experts else part[0], device)
    return jax.make_array_from_single_device_arrays(shape, sharding, [parts[device] for device in indices])


def _stack(layers: Iterator[jax.Array], array: StackedArray, division: Division, place: Place) -> jax.Array:
    """The layers as one array, which is filled in place."""
    sharding = NamedSharding(division.mesh, place.spec())
    fill = jax.jit(jax.lax.dynamic_update_index_in_dim, static_argnums=3, donate_argnums=0)
    first = next(layers)
    stack = jax.jit(partial(jnp.zeros, array.shape, first.dtype), out_shardings=sharding)()
    for number, layer in enumerate(chain([first], layers)):
        stack = fill(stack, layer, number, 0)
    return stack

"""What each axis of the mesh divides: the one table, and where it puts every array of a training state.

A weight, its gradient's sum and its moments are divided over all devices of the mesh, each axis cutting one of the
array's own. A step puts back together what it needs when it needs it (`parallel.weights`). So an array looks the same
to a checkpoint whatever the mesh, any number of layers fits any number of stages, and each device holds 1/N of the state.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import ParallelConfig
from deepseek_jax.config.trainable import learning_part
from deepseek_jax.parallel.mesh import make_mesh, readers

PIPELINED = "moe_layers"
"""The stack of layers that pipeline stages share out."""


class Row(NamedTuple):
    """A logical axis of an array: the mesh axes that may cut it, the outermost cut first, and why."""

    mesh_axes: tuple[str, ...]
    reason: str


TABLE = {
    "batch": Row(("pipe", "data", "fsdp", "expert"), "every device reads sequences of its own, so that attention needs no "
                                                     "communication"),
    "sequence": Row(("context",), "one that a device does not hold is divided; its ids are whole on all of them, and the "
                                  "model takes its own"),
    "experts": Row(("expert", "fsdp", "context"), "an expert's weights stay where they are and tokens travel to it: of many "
                                                  "experts' weights and their tokens, these are the smaller load; what is "
                                                  "gathered layer by layer lies in one piece if it is whole experts"),
    "features": Row(("fsdp", "context", "pipe", "data", "expert"), "inputs and outputs are the only axes that all weights "
                                                                   "have; what a step gathers last, layer by layer, is cut "
                                                                   "first"),
    "layers": Row((), "any number of layers must fit; a step deals them out to the pipeline's stages"),
    "served": Row(("fsdp",), "features of a model that only writes or scores: it has no moments, and what `data` and `expert` "
                             "cut would be gathered for every token"),
}  # fmt: skip
"""Logical axis -> mesh axes. A mesh axis cuts the first axis of an array that allows it and that it divides."""


@dataclass(frozen=True)
class Place:
    """How one array is cut: (mesh axis, axis of the array), the outermost cut first."""

    cuts: tuple[tuple[str, int], ...]

    def dim(self, mesh_axis: str) -> int | None:
        """The axis of the array that `mesh_axis` cuts."""
        return dict(self.cuts).get(mesh_axis)

    def spec(self) -> PartitionSpec:
        """For JAX."""
        last = max((dim for _, dim in self.cuts), default=-1)
        dims = (tuple(axis for axis, cut in self.cuts if cut == dim) for dim in range(last + 1))
        return PartitionSpec(*(axes or None for axes in dims))


class Division:
    """A mesh and how a model's parameters are cut over it.

    Args:
        parallel: as `resolve` gives it.
        params: tree of the parameters or of their shapes.
        mesh: null makes it of this program's devices.
        served: whether the model only writes or scores; see `TABLE`.
    """

    def __init__(self, parallel: ParallelConfig, params: Any, mesh: Mesh | None = None, served: bool = False):
        self.parallel = parallel
        self._features = "served" if served else "features"
        self.mesh = make_mesh(parallel) if mesh is None else mesh
        self.places = jax.tree_util.tree_map_with_path(lambda path, leaf: self._place(names(path), leaf.shape), params)

    def _place(self, path: tuple[str, ...], shape: tuple[int, ...]) -> Place:
        rest, cuts = list(shape), []
        logical_of = logical_axes(path, len(shape))
        axes = [TABLE[self._features if logical == "features" else logical].mesh_axes for logical in logical_of]
        first = (*(("expert",) if "experts" in path else ()), *self.layer_axes(path))
        for mesh_axis in (*first, *(axis for axis in TABLE["features"].mesh_axes if axis not in first)):
            size = self.mesh.shape[mesh_axis]
            dim = next((d for d, allowed in enumerate(axes) if mesh_axis in allowed and rest[d] % size == 0), None)
            if size > 1 and dim is not None:
                rest[dim] //= size
                cuts.append((mesh_axis, dim))
        return Place(tuple(cuts))

    def layer_axes(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """Mesh axes over which a parameter is gathered where it is used, and no earlier.

        Of a layer's weights that both `fsdp` and `expert` cut, that is the larger axis: what is gathered over the smaller once
        a step, and the sums of gradients that await it, is then the least; and on a torus a larger axis has more links.
        """
        if self.is_dealt(path):
            return ("fsdp", "context")
        by_both = self._features != "served" and path[0].endswith("_layers") and "experts" not in path
        return ("expert" if by_both and 1 < self.parallel.fsdp <= self.parallel.expert else "fsdp", "context", "pipe")

    def is_dealt(self, path: tuple[str, ...]) -> bool:
        """Whether a parameter is of the layers that pipeline stages share out."""
        return self.parallel.pipe > 1 and path[0] == PIPELINED

    def param_specs(self) -> Any:
        """Of the parameters, for `shard_map`."""
        return jax.tree.map(lambda place: place.spec(), self.places)

    def shardings(self, state: Any, optimizer: optax.GradientTransformation, trainable: Optional[Sequence[str]] = None) -> Any:
        """Shardings of a training state, given its shapes; what is no weight or moment is whole on every device.

        Args:
            trainable: names of the parameters that have moments, as for `learning_part`.
        """
        of_params = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.param_specs())
        whole = NamedSharding(self.mesh, PartitionSpec())
        moments = optax.tree.map_params(
            optimizer, lambda moment, sharding: moment if _is_left_out(moment) else sharding, state.optimizer,
            learning_part(trainable, of_params), transform_non_params=lambda _: whole, is_leaf=_is_left_out,
        )  # fmt: skip
        biases = jax.tree.map(lambda _: whole, state.router_state)
        return state._replace(params=of_params, router_state=biases, optimizer=moments)

    def batch_spec(self, axis: int) -> PartitionSpec:
        """Of arrays whose `axis` holds sequences."""
        return PartitionSpec(*(None,) * axis, TABLE["batch"].mesh_axes)

    def batch_unit(self) -> int:
        """Sequences of which a batch must be a multiple."""
        return readers(self.parallel) * (self.parallel.microbatch_size if self.parallel.pipe > 1 else 1)

    def map(self, function: Callable[..., Any], tree: Any, *others: Any) -> Any:
        """`function(path, place, leaf, ...)` over trees like the parameters, or like a part of them."""

        def one(path: tuple[Any, ...], *leaves: Any) -> Any:
            place = self.places
            for name in names(path):
                place = place[name]
            return function(names(path), place, *leaves)

        return jax.tree_util.tree_map_with_path(one, tree, *others)


def _is_left_out(moment: Any) -> bool:
    """Whether it stands for a parameter that another rule moves."""
    return isinstance(moment, optax.MaskedNode)


def place_batch(
    division: Optional[Division],
    shape: tuple[int, ...],
    axis: int,
    read: Callable[[int, int], np.ndarray],
    axes: tuple[str, ...] = TABLE["batch"].mesh_axes,
) -> jax.Array | np.ndarray:
    """An array whose `axis` holds sequences; every process reads its own alone.

    Args:
        read: (first, end) -> the array's part for these sequences.
        axes: of the mesh, that divide `axis`.
    """
    if division is None:
        return read(0, shape[axis])
    sharding = NamedSharding(division.mesh, PartitionSpec(*(None,) * axis, axes))

    def part(index: Any) -> np.ndarray:
        return read(*index[axis].indices(shape[axis])[:2])

    return jax.make_array_from_callback(shape, sharding, part)


def logical_axes(path: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    """Of a parameter, by its path: keys of `TABLE`."""
    leading: tuple[str, ...] = ("layers",) if path[0].endswith("_layers") else ()
    if "experts" in path:
        leading += ("experts",)
    return leading + ("features",) * (ndim - len(leading))


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A tree path of dictionaries as their keys."""
    return tuple(key.key for key in path)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes of one device's part of arrays or shapes."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )

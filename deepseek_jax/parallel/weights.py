"""Weights put together for a step, and their gradients taken apart again; all inside `shard_map` over the whole mesh.

Once a step, `collect` gathers what `data` (ZeRO-1) and `expert` cut, and deals the pipelined stack's layers to their
stages. What `fsdp` and `context` (ZeRO-3) cut, `gather_layer` puts together layer by layer, and the backward pass again;
where `expert` is larger than `fsdp`, the two change places. Outside the pipelined stack the axis `pipe` is one more of that
kind, so that no stage alone carries embedding and head.
Weights are gathered in the type that products take them in, gradients are summed in the parameters' own, those of many
experts slab by slab (`parallel.slabs`).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig, expert_layers
from deepseek_jax.parallel import slabs
from deepseek_jax.parallel.pipeline import ABSENT, assign_layers
from deepseek_jax.parallel.sharding import PIPELINED, Division, Place
from deepseek_jax.precision.narrow import narrow

Cuts = tuple[tuple[str, int], ...]


def collect(division: Division, config: ModelConfig, params: Any, router_state: Any) -> tuple[Any, Any]:
    """This device's copy of the variables for a step: parameters whole but for what `gather_layer` does, and dealt."""

    def one(path: tuple[str, ...], place: Place, leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(step_type(division, config, path, place, leaf.dtype))
        for axis, dim in reversed(_cuts(place, _step_axes(division, path))):
            leaf = jax.lax.all_gather(leaf, axis, axis=dim, tiled=True)
        if not division.is_dealt(path):
            return leaf
        return _deal(division, config, place, leaf, absent=0 if {"o_proj", "down_proj"} & set(path) else 1)

    params = division.map(one, params)
    if division.parallel.pipe > 1 and PIPELINED in router_state:
        whole = Place(())
        dealt = jax.tree.map(lambda leaf: _deal(division, config, whole, leaf, absent=1), router_state[PIPELINED])
        router_state = router_state | {PIPELINED: dealt}
    return params, router_state


def deliver(division: Division, config: ModelConfig, gradients: Any) -> Any:
    """Sums over all devices of the gradients by what `collect` returned, cut as the parameters are."""

    def one(path: tuple[str, ...], place: Place, leaf: jax.Array) -> jax.Array:
        own = ("expert",) if "experts" in path else ()  # tokens came to it from all of them
        if division.is_dealt(path):
            leaf, own = _undeal(division, config, place, leaf), (*own, "pipe")
        for axis, dim in place.cuts:
            if axis not in (*own, *division.layer_axes(path)):
                leaf = _scatter(leaf, axis, dim)
        for axis, size in division.mesh.shape.items():
            if size > 1 and place.dim(axis) is None and axis not in own:
                leaf = jax.lax.psum(leaf, axis)
        return leaf

    return division.map(one, gradients)


def gather_layer(division: Division, config: ModelConfig, path: tuple[str, ...], params: Any, stacked: bool) -> Any:
    """Whole weights of the parameters at `path`, for one layer of a stack if `stacked`; differentiable."""
    places = division.places
    for name in path:
        places = places[name]

    def one(key_path: tuple, place: Place, leaf: jax.Array) -> jax.Array:
        names = (*path, *(key.key for key in key_path))
        cuts = tuple((axis, dim - stacked) for axis, dim in _cuts(place, division.layer_axes(names)))
        return _gather(leaf, cuts, product_type(config, names, leaf.dtype)) if cuts else leaf

    with jax.named_scope("weights"):
        return jax.tree_util.tree_map_with_path(one, places, params)


def gradient_type(division: Division | None, config: ModelConfig, path: tuple[str, ...], dtype: jnp.dtype) -> jnp.dtype:
    """In which the gradient of a layer's parameter comes out of the layer: as products make it, unless it is summed there.

    Args:
        path: of a parameter in a stack of layers, of type `dtype`.
    """
    if division is not None:
        place = division.places
        for name in path:
            place = place[name]
        if _cuts(place, division.layer_axes(path)):
            return dtype
    return jnp.dtype("bfloat16") if config.precision == "fp8" and _is_product(path) else product_type(config, path, dtype)


def gather_unstacked(division: Division, config: ModelConfig, params: Any, tokens: int) -> Any:
    """The parameters with those that belong to no stack of layers whole; differentiable.

    The embedding stays as it is if `parallel.embedding` looks up so many tokens of each device.
    """

    def one(name: str, tree: Any) -> Any:
        stays = name.endswith("_layers") or (name == "embed_tokens" and _vectors_travel(division, config, tokens))
        return tree if stays else gather_layer(division, config, (name,), tree, stacked=False)

    return {name: one(name, tree) for name, tree in params.items()}


def _vectors_travel(division: Division, config: ModelConfig, tokens: int) -> bool:
    """Whether tokens' vectors are a smaller load than the embedding's rows, of which every device has its own."""
    place, axes = division.places["embed_tokens"]["weight"], division.layer_axes(("embed_tokens",))
    devices = math.prod(division.mesh.shape[axis] for axis in axes)
    in_rows = math.prod(division.mesh.shape[axis] for axis, dim in place.cuts if axis in axes and dim == 0) == devices
    return devices > 1 and in_rows and devices * tokens < config.vocab_size and not config.tie_word_embeddings


def product_type(config: ModelConfig, path: tuple[str, ...], dtype: jnp.dtype) -> jnp.dtype:
    """The type in which a parameter is next used: products with weights are all that narrow them.

    float8 codes are made from the master weights themselves. Embeddings are narrow when used, but the gradient of one
    that many tokens share is a sum.
    """
    if path[0] == "lm_head" and config.precision == "fp8":
        return jnp.dtype("bfloat16")
    return jnp.dtype("bfloat16") if _is_product(path) and config.precision == "bfloat16" else dtype


def step_type(division: Division, config: ModelConfig, path: tuple[str, ...], place: Place, dtype: jnp.dtype) -> jnp.dtype:
    """In which `collect` returns a parameter: as products take it, if it travels and is whole then."""
    travels = division.is_dealt(path) or _cuts(place, _step_axes(division, path))
    whole = not _cuts(place, division.layer_axes(path))
    return product_type(config, path, dtype) if travels and whole else dtype


def sum_of_layers(division: Division, config: ModelConfig, dealt: jax.Array) -> jax.Array:
    """Statistics of the pipelined layers, [own layers, ...] -> [all layers, ...], summed over sequences."""
    return jax.lax.psum(_undeal(division, config, Place(()), dealt), ("data", "fsdp", "context", "expert"))


def largest_of_layers(division: Division, config: ModelConfig, dealt: jax.Array) -> jax.Array:
    """As `sum_of_layers`, the largest of each statistic."""
    return jax.lax.pmax(_undeal(division, config, Place(()), dealt), ("data", "fsdp", "context", "expert"))


def _step_axes(division: Division, path: tuple[str, ...]) -> tuple[str, ...]:
    later = division.layer_axes(path) + (("expert",) if "experts" in path else ())
    return tuple(axis for axis in ("fsdp", "data", "expert") if axis not in later)


def _cuts(place: Place, axes: tuple[str, ...]) -> Cuts:
    return tuple(cut for cut in place.cuts if cut[0] in axes)


def _is_product(path: tuple[str, ...]) -> bool:
    """Whether a parameter is the weight of a product in the type of activations."""
    is_gate = not {"gate", "shared_expert_gate"}.isdisjoint(path)
    return not (path[0] == "embed_tokens" or path[-1] == "bias" or is_gate or any("norm" in name for name in path))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, cuts: Cuts, dtype: jnp.dtype) -> jax.Array:
    x = narrow(x, dtype)
    for axis, dim in reversed(cuts):
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return x


def _gather_backward(cuts: Cuts, dtype: jnp.dtype, kept: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    def one(gradient: jax.Array) -> jax.Array:
        gradient = gradient.astype(kept.dtype)
        for axis, dim in cuts:
            gradient = _scatter(gradient, axis, dim)
        return gradient

    # Of what is cut along the slabs' side itself, a slab is no whole number of devices' parts.
    side = slabs.side(gradient.shape) if slabs.are_many(gradient.shape) else None
    if side is None or side in dict(cuts).values():
        return (one(gradient),)
    return (jnp.concatenate([one(slab) for slab in slabs.cut(gradient, side)], side),)


_gather.defvjp(lambda x, cuts, dtype: (_gather(x, cuts, dtype), jnp.zeros((), x.dtype)), _gather_backward)


def _scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def _deal(division: Division, config: ModelConfig, place: Place, leaf: jax.Array, absent: int) -> jax.Array:
    """[all layers, ...], cut over `pipe` or whole, -> [own layers, ...], no longer cut over it.

    An absent layer is the last one times `absent`: without what writes to the state it leaves it as it is, and routes
    tokens no less evenly than a real one.
    """
    layers = _layers(division, config)
    places = layers.reshape(-1)
    is_real = (places != ABSENT).reshape(-1, *(1,) * (leaf.ndim - 1))
    padded = jnp.where(is_real, leaf[places], absent * leaf[-1])
    dim = place.dim("pipe")
    if dim is not None:
        return jax.lax.all_to_all(padded, "pipe", split_axis=0, concat_axis=dim, tiled=True)
    return padded.reshape(layers.shape[0], -1, *leaf.shape[1:])[jax.lax.axis_index("pipe")]


def _undeal(division: Division, config: ModelConfig, place: Place, leaf: jax.Array) -> jax.Array:
    """Inverse of `_deal`; what stands for absent layers is left out."""
    dim = place.dim("pipe")
    if dim is not None:
        leaf = jax.lax.all_to_all(leaf, "pipe", split_axis=dim, concat_axis=0, tiled=True)
    else:
        leaf = jax.lax.all_gather(leaf, "pipe", axis=0, tiled=True)
    places = _layers(division, config).reshape(-1)
    return leaf[np.argsort(places)[np.sum(places == ABSENT) :]]


def _layers(division: Division, config: ModelConfig) -> np.ndarray:
    """Layers by stage, [pipe, own layers]."""
    return assign_layers(expert_layers(config), division.parallel).reshape(division.parallel.pipe, -1)

"""Low-rank adapters in training: made beside the weights that they change, and scaled where the model reads them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from deepseek_jax.checkpoint.adapters import LORA_B, adapter_layout, is_adapter
from deepseek_jax.config import Config, LoraConfig
from deepseek_jax.model.layers import param_dtype


def with_adapters(config: Config, params: Any) -> Any:
    """The parameters of a model and beside them fresh adapters, which change nothing yet: B is zero.

    A is uniform within +-1 / sqrt(in), as peft draws it.
    """
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for place in adapter_layout(config.model, config.lora):
        shapes[place.path[1:]] = (*(index + 1 for index in place.index), *place.shape[::-1])
    dtype, found = param_dtype(config.model), flatten_dict(params)
    for number, (path, shape) in enumerate(sorted(shapes.items())):
        key, bound = jax.random.fold_in(jax.random.key(config.train.seed), number), 1 / math.sqrt(shape[-2])
        is_b = path[-1].endswith(LORA_B)
        found[path] = jnp.zeros(shape, dtype) if is_b else jax.random.uniform(key, shape, dtype, -bound, bound)
    return unflatten_dict(found) if shapes else params


def scaled(params: Any, lora: LoraConfig) -> Any:
    """The parameters with every B times alpha / rank, as the model takes them."""
    if not lora.rank:
        return params

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf * (lora.alpha / lora.rank) if path[-1].key.endswith(LORA_B) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def describe_adapters(config: Config, params: Any) -> str:
    """A line for a person: how many numbers learn, beside which Linears."""
    modules = dict.fromkeys(place.name.split(".")[-2] for place in adapter_layout(config.model, config.lora))
    sizes = sum(leaf.size for path, leaf in flatten_dict(params).items() if is_adapter(path[-1]))
    moves = any(phase.to for phase in config.train.bias_update_speed)
    biases = "; the routers' biases move, give train.bias_update_speed=0 to export the adapter alone" if moves else ""
    return f"lora: {sizes:,} numbers of rank {config.lora.rank} learn beside {', '.join(modules)}{biases}"

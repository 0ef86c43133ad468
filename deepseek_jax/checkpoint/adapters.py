"""Low-rank adapters (LoRA, arXiv 2106.09685): beside which Linears they stand, and where their numbers lie.

A Linear `x W` that has one is `x W + (alpha / rank) x A B`; A and B lie beside `weight` in the JAX model's parameters, stacked
over layers as that is, and beside it in the sibling. Names are Hugging Face's, so that peft knows them. Free of any framework.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.config import ConfigError, LoraConfig, ModelConfig

LORA_A, LORA_B = "lora_A", "lora_B"


def adapter_layout(model: ModelConfig, lora: LoraConfig) -> list[TensorPlace]:
    """A [rank, in] and B [out, rank] of every Linear that has an adapter, in the order of `layout`; none without a rank.

    Raises:
        ConfigError: a pattern that names no Linear, or not all of those that the model stacks.
    """
    linears = {
        place.name.removesuffix(".weight"): place
        for place in layout(model)
        if place.quantized and "experts" not in place.path
    }  # fmt: skip
    chosen = {name for name in linears if any(is_meant(pattern, name) for pattern in lora.modules)} if lora.rank else set()
    for pattern in lora.modules if lora.rank else ():
        if not any(is_meant(pattern, name) for name in linears):
            some = ", ".join(dict.fromkeys(name.split(".", 3)[3] for name in linears))
            raise ConfigError(
                f"lora.modules={pattern}: no Linear that can have an adapter has that name (routed experts are no Linears "
                f"to peft, and have none); choose of {some}"
            )
    paths = {linears[name].path for name in chosen}
    for name, place in linears.items():
        if place.path in paths and name not in chosen:
            other = next(found for found in chosen if linears[found].path == place.path)
            raise ConfigError(
                f"lora.modules={','.join(lora.modules)}: {other} is chosen and {name} is not; they are stacked, choose both"
            )
    return [half for name in linears if name in chosen for half in _halves(name, linears[name], lora.rank)]


def _halves(name: str, place: TensorPlace, rank: int) -> tuple[TensorPlace, TensorPlace]:
    features, in_features = place.shape
    of_a, of_b = ((*place.path[:-1], half) for half in (LORA_A, LORA_B))
    return (
        TensorPlace(f"{name}.{LORA_A}", (rank, in_features), of_a, place.index, True),
        TensorPlace(f"{name}.{LORA_B}", (features, rank), of_b, place.index, True),
    )


def is_meant(pattern: str, module: str) -> bool:
    """Whether a name of `lora.modules`, which may be the end of a module's, means that module."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def without_adapters(tree: Any) -> Any:
    """A tree of parameters, or of one like it, but for A and B."""
    if not isinstance(tree, Mapping):
        return tree
    return {key: without_adapters(node) for key, node in tree.items() if key not in (LORA_A, LORA_B)}


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """The weight [..., in, out] with what its adapter adds, in its type; summed in float64.

    Args:
        a, b: [..., in, rank] and [..., rank, out].
        scale: alpha / rank.
    """
    wide = np.asarray(weight, np.float64) + scale * (np.asarray(a, np.float64) @ np.asarray(b, np.float64))
    return wide.astype(weight.dtype)


def with_adapters_merged(params: Any, lora: LoraConfig) -> Any:
    """A tree of parameters in which every adapter has gone into its weight: the model as others know it."""
    if not isinstance(params, Mapping):
        return params
    if LORA_A not in params:
        return {key: with_adapters_merged(node, lora) for key, node in params.items()}
    weight = merged(params["weight"], params[LORA_A], params[LORA_B], lora.alpha / lora.rank)
    return without_adapters(params) | {"weight": weight}

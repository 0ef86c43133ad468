"""Low-rank adapters (LoRA, arXiv 2106.09685): beside which Linears they stand, and where their numbers lie.

A Linear `x W` that has one is `x W + (alpha / rank) x A B`; A and B lie beside `weight` in the JAX model's parameters, stacked
over layers (and experts) as that is, and beside it in the sibling. Names are Hugging Face's, so that peft knows them. Free of
any framework.
"""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.config import ConfigError, LoraConfig, ModelConfig

LORA_A, LORA_B = "lora_A", "lora_B"


def halves_of(weight: str) -> tuple[str, str]:
    """Keys of A and B beside a weight's, which for a Linear is `weight` and for routed experts a projection's name."""
    prefix = "" if weight == "weight" else f"{weight}_"
    return f"{prefix}{LORA_A}", f"{prefix}{LORA_B}"


def is_adapter(key: str) -> bool:
    """Whether a parameter of this key is an A or a B."""
    return key.endswith((LORA_A, LORA_B))


def adapter_layout(model: ModelConfig, lora: LoraConfig) -> list[TensorPlace]:
    """A [rank, in] and B [out, rank] of every Linear that has an adapter, in the order of `layout`; none without a rank.

    Raises:
        ConfigError: a pattern that names no Linear, or not all of those that the model stacks or peft takes together.
    """
    linears = {place.name.removesuffix(".weight"): place for place in layout(model) if place.quantized}
    chosen = {name for name in linears if any(is_meant(pattern, name) for pattern in lora.modules)} if lora.rank else set()
    for pattern in lora.modules if lora.rank else ():
        if not any(is_meant(pattern, name) for name in linears):
            some = ", ".join(dict.fromkeys(re.sub(r"\d+", "*", name.split(".", 3)[3]) for name in linears))
            raise ConfigError(f"lora.modules={pattern}: no Linear that can have an adapter has that name; choose of {some}")
    together = {_together(linears[name]): name for name in chosen}
    for name, place in linears.items():
        if name not in chosen and (other := together.get(_together(place))):
            why = "peft takes routed experts whole" if "experts" in place.path else "they are stacked"
            raise ConfigError(
                f"lora.modules={','.join(lora.modules)}: {other} is chosen and {name} is not; {why}, choose both"
            )
    return [half for name in linears if name in chosen for half in _halves(name, linears[name], lora.rank)]


def _together(place: TensorPlace) -> tuple[str, ...]:
    """What is the same for Linears that have adapters all together or not at all."""
    return place.path[:-1] if "experts" in place.path else place.path


def _halves(name: str, place: TensorPlace, rank: int) -> tuple[TensorPlace, TensorPlace]:
    features, in_features = place.shape
    of_a, of_b = ((*place.path[:-1], half) for half in halves_of(place.path[-1]))
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
    return {key: without_adapters(node) for key, node in tree.items() if not is_adapter(key)}


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
    whole = {key: with_adapters_merged(node, lora) for key, node in params.items() if not is_adapter(key)}
    for key in whole:
        a, b = (params.get(half) for half in halves_of(key))
        if a is not None and b is not None:
            whole[key] = merged(params[key], a, b, lora.alpha / lora.rank)
    return whole

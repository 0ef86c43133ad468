"""Weights from one sibling to the other, through the table of the released checkpoint's tensors.

The PyTorch sibling's state dict has the checkpoint's names and layout, so a transposition and an index
are all there is: no number changes. The same goes for gradients, which is how they are compared.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.config import ModelConfig


def to_torch(variables: Mapping[str, Any], config: ModelConfig) -> dict[str, torch.Tensor]:
    """State dict of `deepseek_torch`'s model from the variables of `deepseek_jax`'s.

    Args:
        variables: {"params": ..., "router_state": ...}, or "params" alone, such as a tree of gradients.
    """
    variables = jax.device_get(variables)
    places = [place for place in _own_places(config) if place.path[0] in variables]
    return {place.name: _tensor(variables, place, place.path, place.index) for place in places}


def from_torch(state_dict: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, Any]:
    """Variables of `deepseek_jax`'s model, as NumPy arrays, from a state dict of `deepseek_torch`'s.

    Raises:
        KeyError: when a tensor is missing or left over.
    """
    places = _own_places(config)
    if unknown := set(state_dict) - {place.name for place in places}:
        raise KeyError(f"tensors that the model has no place for: {', '.join(sorted(unknown))}")
    parts: dict[tuple[str, ...], dict[tuple[int, ...], np.ndarray]] = {}
    for place in places:
        matrix = state_dict[place.name].detach().numpy()
        parts.setdefault(place.path, {})[place.index] = matrix.T if place.transposed else matrix
    variables: dict[str, Any] = {}
    for path, by_index in parts.items():
        node = variables
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _stacked(by_index)
    return variables


def module_variables(variables: Mapping[str, Any], stack: str, layer: int, *module: str) -> dict[str, Any]:
    """What one layer of a stack has for a module of its own, given by its path: {"params": ..., ...}."""
    found = {}
    for collection, node in variables.items():
        for key in (stack, *module):
            node = node.get(key, {})
        if node:
            found[collection] = jax.tree.map(lambda leaf: leaf[layer], node)
    return found


def module_tensors(params: Any, config: ModelConfig, stack: str, layer: int, *module: str) -> dict[str, torch.Tensor]:
    """Tensors by their names in the state dict, from the "params" of `module_variables` or their gradients."""
    params, prefix = jax.device_get(params), ("params", stack, *module)
    return {
        place.name: _tensor(params, place, place.path[len(prefix) :], place.index[1:])
        for place in _own_places(config)
        if place.path[: len(prefix)] == prefix and place.index[0] == layer
    }


def _own_places(config: ModelConfig) -> list[TensorPlace]:
    return [place for place in layout(config) if not place.is_copy]


def _tensor(tree: Any, place: TensorPlace, path: tuple[str, ...], index: tuple[int, ...]) -> torch.Tensor:
    for key in path:
        tree = tree[key]
    array = np.asarray(tree[index])
    return torch.from_numpy(np.array(array.T if place.transposed else array, order="C"))


def _stacked(by_index: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """One array whose leading axes are the indices."""
    axes = tuple(size + 1 for size in max(by_index))
    array = np.empty((*axes, *next(iter(by_index.values())).shape), next(iter(by_index.values())).dtype)
    for index, part in by_index.items():
        array[index] = part
    return array

"""Low-rank adapters in training: made beside the weights that they change, and merged into them for others to read."""

import math

import torch
from torch import nn

from deepseek_jax.checkpoint.adapters import LORA_A, LORA_B, adapter_layout
from deepseek_jax.config import Config
from deepseek_torch.model.layers import param_dtype
from deepseek_torch.model.transformer import DeepseekV3


def add_adapters(config: Config, model: DeepseekV3) -> None:
    """Give the model's chosen Linears fresh adapters, which change nothing yet: B is zero.

    A is uniform within +-1 / sqrt(in), as peft draws it.
    """
    for place in adapter_layout(config.model, config.lora):
        module, _, half = place.name.rpartition(".")
        numbers = torch.zeros(place.shape, dtype=param_dtype(config.model))
        if half == LORA_A:
            bound = 1 / math.sqrt(place.shape[1])
            numbers.uniform_(-bound, bound)
        linear = model.get_submodule(module)
        setattr(linear, half, nn.Parameter(numbers))
        linear.lora_scale = config.lora.alpha / config.lora.rank


def merged_state_dict(model: DeepseekV3) -> dict[str, torch.Tensor]:
    """The model's state dict with every adapter in its weight, summed in float64: the model as others know it."""
    state = model.state_dict()
    for name in [name for name in state if name.endswith(LORA_A)]:
        module = name.rpartition(".")[0]
        a, b = (state.pop(f"{module}.{half}").double() for half in (LORA_A, LORA_B))
        weight, scale = state[f"{module}.weight"], model.get_submodule(module).lora_scale
        state[f"{module}.weight"] = (weight.double() + scale * (b @ a)).to(weight.dtype)
    return state

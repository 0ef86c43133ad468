"""The small layers everything else is made of: linear map, norm, embedding and feed-forward."""

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.products import products

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Type of activations; under fp8 the products with weights narrow them further."""
    return DTYPES[config.precision]


def param_dtype(config: ModelConfig) -> torch.dtype:
    """Type of stored parameters: at least float32, whatever the compute type."""
    return widen(compute_dtype(config))


def widen(dtype: torch.dtype) -> torch.dtype:
    """The type for sums that must not lose digits: float32, or float64 where that is in use."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normal_parameter(config: ModelConfig, *shape: int) -> nn.Parameter:
    """A matrix drawn from a normal distribution of standard deviation initializer_range (report 4.2)."""
    return nn.Parameter(torch.randn(shape, dtype=param_dtype(config)) * config.initializer_range)


class Linear(nn.Module):
    """`W x`, plus `bias` if it has one; `weight` is [features, in_features].

    With an adapter plus `(alpha / rank) B A x`, in the type of activations; see `training.adapters`.
    """

    lora_A: Optional[nn.Parameter]
    """[rank, in_features]."""
    lora_B: Optional[nn.Parameter]
    """[features, rank]."""
    lora_scale = 1.0

    def __init__(self, config: ModelConfig, in_features: int, features: int, has_bias: bool = False):
        super().__init__()
        self.config = config
        self.weight = normal_parameter(config, features, in_features)
        self.bias = nn.Parameter(torch.zeros(features, dtype=param_dtype(config))) if has_bias else None
        self.lora_A = self.lora_B = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., features]."""
        return self.completed(x, products(self.config, x, self.weight)[0])

    def completed(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`y`, the product of x with the weight, plus what an adapter adds, plus the bias."""
        if self.lora_A is not None and self.lora_B is not None:
            y = y + x @ self.lora_A.to(x.dtype).T @ (self.lora_B * self.lora_scale).to(x.dtype).T
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in at least float32."""

    def __init__(self, config: ModelConfig, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=param_dtype(config)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> the same."""
        wide = x.to(widen(x.dtype))
        root_mean_square = torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide / root_mean_square * self.weight).to(x.dtype)


class Embedding(nn.Module):
    """Table of token vectors; `weight` is [vocab_size, hidden_size]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dtype = compute_dtype(config)
        self.weight = normal_parameter(config, config.vocab_size, config.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> vectors [..., hidden_size]."""
        return self.weight[tokens].to(self.dtype)


class FeedForwardForm(NamedTuple):
    """What comes before a feed-forward's down projection."""

    projections: tuple[str, ...]
    """Linear maps of the input."""
    activation: Callable[..., torch.Tensor]
    """Of their results."""


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """A gate on every hidden unit."""
    return gate * torch.sigmoid(gate) * up


def gelu(up: torch.Tensor) -> torch.Tensor:
    """Without a gate; the exact function, by erf."""
    return F.gelu(up)


FEED_FORWARD_FORMS = {
    "swiglu": FeedForwardForm(("gate_proj", "up_proj"), swiglu),
    "gelu": FeedForwardForm(("up_proj",), gelu),
}
"""By `ModelConfig.feed_forward`."""


class FeedForward(nn.Module):
    """Of the dense layers, the shared experts and each routed one, in the form that the config names."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.config, self.form = config, FEED_FORWARD_FORMS[config.feed_forward]
        for name in self.form.projections:
            setattr(self, name, Linear(config, config.hidden_size, width))
        self.down_proj = Linear(config, width, config.hidden_size)

    def forward(self, x: torch.Tensor, factors: Optional[torch.Tensor] = None) -> torch.Tensor:
        """[..., hidden_size] -> the same; `factors`, [..., width] or [..., 1], act on the hidden units.

        Before the down projection, which is linear, so that float8 rounds there what the JAX sibling's rounds.
        """
        entering = [getattr(self, name) for name in self.form.projections]
        entered = products(self.config, x, *(linear.weight for linear in entering))
        activated = self.form.activation(*(linear.completed(x, y) for linear, y in zip(entering, entered)))
        return self.down_proj(activated if factors is None else activated * factors.to(x.dtype))

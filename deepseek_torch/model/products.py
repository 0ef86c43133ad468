"""Products with weights in the arithmetic that the config names: where float8 enters the model, and only there."""

import torch

from deepseek_jax.config import ModelConfig
from deepseek_torch.precision.fp8_matmul import fp8_matmul


def products(config: ModelConfig, x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    """x [..., K] times each of the weights [M, K] transposed: a list of [..., M] in x's type.

    What several weights make of the same input is asked for together, so that float8 adds their gradients of the
    input before it rounds them.
    """
    if config.precision == "fp8":
        return list(fp8_matmul(x, tuple(_GradientLike.apply(weight, x).T for weight in weights)))
    return [x @ weight.to(x.dtype).T for weight in weights]


class _GradientLike(torch.autograd.Function):
    """A master weight as it is, whose gradient is rounded to x's type, in which that of a narrowed weight would come."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.dtype = x.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.to(ctx.dtype).to(gradient.dtype), None

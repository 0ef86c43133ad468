"""The linear map whose three products run on float8 operands (report 3.3), emulated in float32.

Every operand is quantised as the report quantises it, dequantised, and multiplied.
"""

from functools import reduce

import torch

from deepseek_torch.precision.fp8 import (
    SMALLEST_GRADIENT_AMAX,
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_tiles,
)

Weights = torch.Tensor | tuple[torch.Tensor, ...]


def fp8_matmul(x: torch.Tensor, w: Weights) -> Weights:
    """`x w` with both operands in float8, and so its two gradients; sums in float32.

    Args:
        x: [..., K] in any float type.
        w: [K, M], the master weight itself: it is quantised here, and its gradient is float32 before it
            takes w's type. Or a tuple of such that all read x, which is then quantised and kept once.

    Returns:
        [..., M] in x's type, or a tuple of such. The gradient of x has x's type too.
    """
    weights = (w,) if isinstance(w, torch.Tensor) else w
    outputs = _Matmul.apply(x.reshape(-1, x.shape[-1]), *(each.float() for each in weights))
    outputs = tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)
    return outputs[0] if isinstance(w, torch.Tensor) else outputs


class _Matmul(torch.autograd.Function):
    """Keeps codes and scales for the backward pass; x's stored tiles are dequantised and re-tiled (report 3.5.2)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_tiles = quantize_tiles(x, axis=1)
        blocks = [quantize_blocks(w) for w in weights]
        ctx.save_for_backward(*x_tiles, *(tensor for block in blocks for tensor in block))
        return tuple((dequantize_tiles(*x_tiles, axis=1) @ dequantize_blocks(*block)).to(x.dtype) for block in blocks)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x_codes, x_scales, *blocks = ctx.saved_tensors
        weights = [dequantize_blocks(*block) for block in zip(blocks[::2], blocks[1::2])]
        dx = reduce(torch.add, (_rounded_gradient(dy, axis=1) @ w.T for dy, w in zip(gradients, weights)))
        x = dequantize_tiles(x_codes, x_scales, axis=1)
        x = dequantize_tiles(*quantize_tiles(x, axis=0), axis=0)
        return dx.to(gradients[0].dtype), *(x.T @ _rounded_gradient(dy, axis=0) for dy in gradients)


def _rounded_gradient(dy: torch.Tensor, axis: int) -> torch.Tensor:
    """dy as float8 tiles along `axis` represent it, in float32."""
    return dequantize_tiles(*quantize_tiles(dy, axis, smallest_amax=SMALLEST_GRADIENT_AMAX), axis)

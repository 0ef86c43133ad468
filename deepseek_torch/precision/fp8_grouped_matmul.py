"""`fp8_matmul` for the routed experts: every group of rows has its own weight."""

from collections.abc import Sequence

import torch

from deepseek_torch.precision.fp8_matmul import Weights, fp8_matmul


def fp8_grouped_matmul(x: torch.Tensor, w: Weights, group_sizes: torch.Tensor | Sequence[int]) -> Weights:
    """Each group of rows times its own weight: one `fp8_matmul` an expert.

    Args:
        x: [N, K] rows sorted by group.
        w: [E, K, M] master weights, or a tuple of such that all read x.
        group_sizes: [E], together at most N.

    Returns:
        [N, M] in x's type, or a tuple of such; rows past the last group are zero.
    """
    weights = (w,) if isinstance(w, torch.Tensor) else w
    sizes = [int(size) for size in group_sizes]
    groups = x.split([*sizes, x.shape[0] - sum(sizes)])
    products = [fp8_matmul(rows, tuple(each[e] for each in weights)) for e, rows in enumerate(groups[:-1])]
    rest = tuple(x.new_zeros(groups[-1].shape[0], each.shape[-1]) for each in weights)
    outputs = tuple(torch.cat(parts) for parts in zip(*products, rest))
    return outputs[0] if isinstance(w, torch.Tensor) else outputs

"""AdamW as the report sets it (4.2), or Muon beside it: clipped by global norm, decayed where a weight is a matrix."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from deepseek_jax.config import TrainConfig
from deepseek_torch.training.muon import Muon, is_orthogonalised, muon_group


def make_optimizer(train: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """PyTorch's own AdamW, with Muon for the matrices where asked for; the learning rate is set by each step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    if train.optimizer == "muon":
        groups.append(muon_group(model, named, momentum=train.muon_momentum, weight_decay=train.weight_decay))
        named = [(name, p) for name, p in named if not is_orthogonalised(name)]
    matrices = [p for name, p in named if decays(name)]
    norms = [p for name, p in named if not decays(name)]
    groups += [{"params": matrices, "weight_decay": train.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    kind = Muon if train.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(groups, lr=0.0, betas=(train.beta1, train.beta2), eps=train.adam_eps)
    if train.adam_moment_dtype == "bfloat16":
        optimizer.register_step_pre_hook(lambda *_: _keep_moments_in(None, optimizer))
        optimizer.register_step_post_hook(lambda *_: _keep_moments_in(torch.bfloat16, optimizer))
    return optimizer


def _keep_moments_in(dtype: torch.dtype | None, optimizer: torch.optim.AdamW) -> None:
    """Convert all moments to `dtype` (report 3.3.3), or to their parameters' where that is None, for a step."""
    for parameter, state in optimizer.state.items():
        for moment in {"exp_avg", "exp_avg_sq", "momentum"} & state.keys():
            state[moment] = state[moment].to(dtype or parameter.dtype)


def decays(name: str) -> bool:
    """Weight decay acts on everything but norms and biases."""
    *_, module, kind = name.split(".")
    return kind != "bias" and not module.endswith("norm")


def clip_by_global_norm(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale all gradients so that their norm as one vector is at most `limit`.

    PyTorch's own adds 1e-6 to the norm, which float64 would show.

    Returns:
        The norm before.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
    return norm

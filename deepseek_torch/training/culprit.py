"""Where a step's numbers stopped being numbers: its micro-batches made again, module by module, after the fact."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from deepseek_jax.config import Config
from deepseek_jax.training.where import Found, backward_modules, describe
from deepseek_torch.training.loss import training_loss
from deepseek_torch.training.step import TrainState


def find_culprit(state: TrainState, batch: torch.Tensor, mtp_weight: float, config: Config) -> str:
    """The micro-batch, the pass and the modules where a batch's loss or gradients stopped being finite, in words.

    Args:
        state: as it was before that batch.
        batch: [A, B / A, T + 1 + D].
        mtp_weight: lambda.
    """
    model = state.model.train()
    for number, part in enumerate(batch, start=1):
        with torch.no_grad(), _watching(model) as seen:
            loss, _ = training_loss(model, part, config, mtp_weight)
        if seen or _is_bad(loss):
            return describe(Found("forward", number, len(batch), [*seen, "lm_head or the loss"][:1]))
    for number, part in enumerate(batch, start=1):
        state.optimizer.zero_grad()
        training_loss(model, part, config, mtp_weight)[0].backward()
        tensors = [name for name, p in model.named_parameters() if p.grad is not None and _is_bad(p.grad)]
        if tensors:
            return describe(Found("backward", number, len(batch), backward_modules(tensors)))
    return describe(None)


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose results are not finite, in the order in which they come up."""
    seen: list[str] = []

    def enter(name: str, module: nn.Module, args: Any) -> None:
        if _is_bad(args):  # what was made between modules is their parent's
            seen.append(name.rpartition(".")[0])

    def leave(name: str, module: nn.Module, args: Any, result: Any) -> None:
        if _is_bad(result):
            seen.append(name)

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles.append(module.register_forward_hook(partial(leave, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_bad(values: Any) -> bool:
    """Whether any number among tensors is none."""
    if isinstance(values, torch.Tensor):
        return bool(values.is_floating_point() and not torch.isfinite(values).all())
    return isinstance(values, tuple) and any(_is_bad(value) for value in values)

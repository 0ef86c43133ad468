"""One optimizer step: gradients, AdamW, and the routers' biases."""

from typing import NamedTuple, Optional

import torch

from deepseek_jax.checkpoint.adapters import adapter_layout
from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.config import Config
from deepseek_jax.config.trainable import check_trainable, learns, trainable
from deepseek_jax.data.marks import read_marks
from deepseek_torch.model.router import updated_bias
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.training.adapters import add_adapters
from deepseek_torch.training.loss import LossParts, counted_targets, training_loss
from deepseek_torch.training.optimizer import clip_by_global_norm, make_optimizer
from deepseek_torch.training.qk_clip import clip_heads
from deepseek_torch.training.schedules import StepPlan


class TrainState(NamedTuple):
    """What training changes; a step changes it in place."""

    model: DeepseekV3
    """Parameters, and the routers' biases as buffers."""
    optimizer: torch.optim.Optimizer


class StepMetrics(NamedTuple):
    """What a step tells."""

    loss: torch.Tensor
    parts: LossParts
    grad_norm: torch.Tensor
    """Global, before clipping."""
    skipped: bool
    """Whether loss or gradients were no numbers, so that the state stayed as it was."""


def init_state(config: Config, model: Optional[DeepseekV3] = None) -> TrainState:
    """Zero moments beside fresh parameters from train.seed and zero biases, or beside those of `model`; and fresh adapters."""
    if model is None:
        torch.manual_seed(config.train.seed)
        model = DeepseekV3(config.model)
    add_adapters(config, model)
    choose_trainable(config, model)
    return TrainState(model, make_optimizer(config.train, model))


def choose_trainable(config: Config, model: DeepseekV3) -> None:
    """Let only adapters and those parameters learn that train.trainable names; raises `ConfigError` for a name of nothing."""
    places = layout(config.model) + adapter_layout(config.model, config.lora)
    paths = {place.name: place.path[1:] for place in places}
    parameters = dict(model.named_parameters())
    check_trainable(config.train.trainable, [paths[name] for name in parameters])
    for name, parameter in parameters.items():
        parameter.requires_grad_(learns(trainable(config), paths[name]))


def train_step(state: TrainState, tokens: torch.Tensor, plan: StepPlan, config: Config) -> StepMetrics:
    """Advance by one batch.

    Args:
        tokens: [A, B / A, T + 1 + D] ids of the batch in its A accumulation parts.
        plan: the scheduled numbers.
    """
    loss, parts = _accumulated(state, tokens, plan.mtp_loss_weight, config)
    grad_norm = clip_by_global_norm(state.model.parameters(), config.train.gradient_clip)
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        return StepMetrics(loss, parts, grad_norm, skipped=True)
    for group in state.optimizer.param_groups:
        group["lr"] = plan.learning_rate
    state.optimizer.step()
    if config.train.qk_clip is not None and parts.largest_scores is not None:
        clip_heads(state.model, config.train.qk_clip, parts.largest_scores)
    for stack, counts in parts.counts.items():
        for layer, of_layer in zip(getattr(state.model, stack), counts, strict=True):
            bias = layer.mlp.gate.e_score_correction_bias
            if bias is not None:
                bias.copy_(updated_bias(bias, of_layer, plan.bias_update_speed))
    return StepMetrics(loss, parts, grad_norm, skipped=False)


def _accumulated(state: TrainState, tokens: torch.Tensor, mtp_weight: float, config: Config) -> tuple[torch.Tensor, LossParts]:
    """Leave the whole batch's gradients in the parameters: means over its parts, but sums of the expert counts."""
    state.model.train()
    state.optimizer.zero_grad()
    losses, parts = [], []
    depth = config.model.num_nextn_predict_layers
    counted = counted_targets(read_marks(config.data, tokens.flatten(0, 1)), tokens.shape[-1] - 1 - depth, config)
    whole = [which.sum().item() / len(tokens) for which in counted]
    for part in tokens:
        loss, of_part = training_loss(state.model, part, config, mtp_weight, whole)
        (loss / len(tokens)).backward()
        losses.append(loss.detach())
        parts.append(of_part)
    cross_entropy = torch.stack([part.cross_entropy for part in parts]).mean(dim=0)
    balance_loss = torch.stack([part.balance_loss for part in parts]).mean()
    counts = {stack: torch.stack([part.counts[stack] for part in parts]).sum(dim=0) for stack in parts[0].counts}
    shares = [part.dropped for part in parts if part.dropped is not None]
    dropped = torch.stack(shares).mean() if shares else None
    scores = [part.largest_scores for part in parts if part.largest_scores is not None]
    largest = torch.stack(scores).amax(dim=0) if scores else None
    return torch.stack(losses).mean(), LossParts(cross_entropy, balance_loss, counts, dropped, largest)

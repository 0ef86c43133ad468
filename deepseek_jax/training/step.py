"""One optimizer step as a pure function: gradients, AdamW, and the routers' biases."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import Config
from deepseek_jax.model.router import updated_bias
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.training.loss import LossParts, training_loss
from deepseek_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """All that a checkpoint must hold to go on."""

    params: Any
    router_state: Any
    optimizer: Any
    """Adam's moments and counter."""


class Scalars(NamedTuple):
    """The scheduled numbers of a step."""

    learning_rate: jax.Array
    bias_update_speed: jax.Array
    mtp_loss_weight: jax.Array


class StepMetrics(NamedTuple):
    """What a step tells."""

    loss: jax.Array
    parts: LossParts
    grad_norm: jax.Array
    """Global, before clipping."""


def init_state(config: Config) -> TrainState:
    """Fresh parameters from train.seed, zero biases and moments."""
    tokens = jnp.zeros((1, 1 + config.model.num_nextn_predict_layers), jnp.int32)
    variables = DeepseekV3(config.model).init(jax.random.key(config.train.seed), tokens)
    params = variables["params"]
    return TrainState(params, variables.get("router_state", {}), make_optimizer(config.train).init(params))


def train_step(state: TrainState, tokens: jax.Array, scalars: Scalars, config: Config) -> tuple[TrainState, StepMetrics]:
    """Advance by one batch.

    Args:
        tokens: [A, B / A, T + 1 + D] ids of the batch in its A accumulation parts.
        config: static.
    """
    gradients, metrics = _accumulated(state, tokens, scalars, config)
    updates, optimizer = make_optimizer(config.train).update(gradients, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p - scalars.learning_rate.astype(p.dtype) * u, state.params, updates)
    speed = scalars.bias_update_speed
    router_state = {
        name: jax.tree.map(lambda bias, c=metrics.parts.counts[name]: updated_bias(bias, c, speed), biases)
        for name, biases in state.router_state.items()
    }
    return TrainState(params, router_state, optimizer), metrics


def _accumulated(state: TrainState, tokens: jax.Array, scalars: Scalars, config: Config) -> tuple[Any, StepMetrics]:
    """Gradients and metrics of the whole batch: means over its parts, but sums of the expert counts."""

    def one(part: jax.Array) -> tuple[Any, jax.Array, LossParts]:
        loss_of = partial(training_loss, config=config, mtp_weight=scalars.mtp_loss_weight)
        (loss, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params, state.router_state, part)
        return gradients, loss, parts

    count = tokens.shape[0]
    if count == 1:
        gradients, loss, parts = one(tokens[0])
    else:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, tokens[0]))
        totals, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, one(part)), None), zeros, tokens)
        gradients, loss, parts = totals
        mean = partial(jax.tree.map, lambda total: total / count)
        gradients, loss = mean(gradients), mean(loss)
        parts = LossParts(mean(parts.cross_entropy), mean(parts.balance_loss), parts.counts)
    return gradients, StepMetrics(loss, parts, optax.global_norm(gradients))

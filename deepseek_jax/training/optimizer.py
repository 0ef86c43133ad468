"""AdamW as the report sets it (4.2), or Muon beside it: clipped by global norm, decayed where a weight is a matrix."""

from typing import Any, Optional

import jax
import optax

from deepseek_jax.config import ModelConfig, TrainConfig
from deepseek_jax.parallel.sharding import Division, names
from deepseek_jax.training.muon import is_orthogonalised, scale_by_muon


def make_optimizer(
    train: TrainConfig, model: Optional[ModelConfig] = None, division: Optional[Division] = None
) -> optax.GradientTransformation:
    """Everything but the learning rate, which the step applies: it changes with the schedule.

    It is of the parameters that learn, as `learning_part` gives them, and knows of no others.

    Args:
        model, division: for Muon's updates; what only makes or describes the state does without.
    """
    adam = _moments_kept_in(train, optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.adam_eps))
    rules = {"adamw": adam, "muon": scale_by_muon(train, model, division)}
    return optax.chain(
        optax.clip_by_global_norm(train.gradient_clip),
        adam if train.optimizer == "adamw" else optax.partition(rules, _rules_of),
        optax.add_decayed_weights(train.weight_decay, mask=decays),
    )


def _rules_of(params: Any) -> Any:
    """By which rule each parameter moves where train.optimizer is muon."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_orthogonalised(names(path)) else "adamw", params)


def _moments_kept_in(train: TrainConfig, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`adam` with both moments in train.adam_moment_dtype between steps (report 3.3.3).

    Within a step they are in the gradients' type.
    """
    if train.adam_moment_dtype == "float32":
        return adam

    def narrowed(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        mu, nu = (optax.tree.cast(moment, train.adam_moment_dtype) for moment in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        mu, nu = (optax.tree.cast_like(moment, gradients) for moment in (state.mu, state.nu))
        updates, state = adam.update(gradients, state._replace(mu=mu, nu=nu), params)
        return updates, narrowed(state)

    return optax.GradientTransformation(lambda params: narrowed(adam.init(params)), update)


def decays(params: Any) -> Any:
    """Tree of booleans: weight decay acts on everything but norms and biases."""

    def is_matrix(path: tuple, leaf: jax.Array) -> bool:
        names = [key.key for key in path]
        return names[-1] != "bias" and not any(name.endswith("norm") for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, params)

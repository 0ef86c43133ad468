"""AdamW as the report sets it (4.2): clipped by global norm, decayed where a weight is a matrix."""

from typing import Any

import jax
import optax

from deepseek_jax.config import TrainConfig


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """Everything but the learning rate, which the step applies: it changes with the schedule."""
    return optax.chain(
        optax.clip_by_global_norm(train.gradient_clip),
        optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.adam_eps),
        optax.add_decayed_weights(train.weight_decay, mask=decays),
    )


def decays(params: Any) -> Any:
    """Tree of booleans: weight decay acts on everything but the norms."""

    def is_matrix(path: tuple, leaf: jax.Array) -> bool:
        return not any(key.key.endswith("norm") for key in path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)

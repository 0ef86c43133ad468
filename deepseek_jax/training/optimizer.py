"""AdamW as the report sets it (4.2), or Muon beside it: clipped by global norm, decayed where a weight is a matrix."""

from typing import Any, Optional

import jax
import optax

from deepseek_jax.config import ModelConfig, TrainConfig
from deepseek_jax.parallel.sharding import Division, names
from deepseek_jax.training.adam import scale_by_adam
from deepseek_jax.training.muon import is_orthogonalised, scale_by_muon


def make_optimizer(
    train: TrainConfig, model: Optional[ModelConfig] = None, division: Optional[Division] = None
) -> optax.GradientTransformationExtraArgs:
    """Everything but the learning rate, which the step applies: it changes with the schedule.

    It is of the parameters that learn, as `learning_part` gives them, and knows of no others. Its update takes `skipped`,
    whether the state is to stay as it was.

    Args:
        model, division: for Muon's updates; what only makes or describes the state does without.
    """
    adam = scale_by_adam(train)
    rules = {"adamw": adam, "muon": scale_by_muon(train, model, division)}
    return optax.chain(
        optax.clip_by_global_norm(train.gradient_clip),
        adam if train.optimizer == "adamw" else optax.partition(rules, _rules_of),
        optax.add_decayed_weights(train.weight_decay, mask=decays),
    )


def _rules_of(params: Any) -> Any:
    """By which rule each parameter moves where train.optimizer is muon."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_orthogonalised(names(path)) else "adamw", params)


def decays(params: Any) -> Any:
    """Tree of booleans: weight decay acts on everything but norms and biases."""

    def is_matrix(path: tuple, leaf: jax.Array) -> bool:
        names = [key.key for key in path]
        return names[-1] != "bias" and not any(name.endswith("norm") for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, params)

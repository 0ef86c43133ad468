"""Muon (K. Jordan, 2024): momentum whose matrices are made orthogonal, or nearly, before they move the weights.

Scaled as in "Muon is Scalable for LLM Training" (arXiv 2502.16982), so that AdamW's learning rate and weight decay serve.
What is one matrix is what acts as one: an expert of a stack, and of the projections that make queries, keys and values
one head. On a mesh every matrix is sent whole to one device, and comes back in the parts in which it is kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import ModelConfig, TrainConfig
from deepseek_jax.parallel.sharding import Division, Place, names
from deepseek_jax.training.adam import kept_if

ROOT_MEAN_SQUARE = 0.2
"""Of an update's entries, as AdamW's are in practice."""
OTHERS = {"embed_tokens", "lm_head", "gate", "shared_expert_gate", "bias"}
"""Left to AdamW beside norms: tables of vectors, what weighs experts, and what is no matrix."""


def is_orthogonalised(path: Sequence[str]) -> bool:
    """Whether Muon moves the parameter at `path`."""
    return OTHERS.isdisjoint(path) and not any(name.endswith("norm") for name in path)


def scale_by_muon(
    train: TrainConfig, model: Optional[ModelConfig], division: Optional[Division]
) -> optax.GradientTransformationExtraArgs:
    """Nesterov momentum of the gradients, orthogonalised matrix by matrix.

    Args:
        model: says where the heads are; what only makes or describes the state needs neither it nor `division`.
    """
    narrow = None if train.adam_moment_dtype == "float32" else train.adam_moment_dtype
    momentum = optax.trace(train.muon_momentum, nesterov=True, accumulator_dtype=narrow)

    def update(
        gradients: Any, state: optax.TraceState, params: Any = None, *, skipped: jax.Array | bool = False, **_: Any
    ) -> tuple[Any, optax.TraceState]:
        assert model is not None
        updates, moved = momentum.update(gradients, state)
        state = kept_if(skipped, state, moved)
        if division is None:
            alone = jax.tree_util.tree_map_with_path(lambda path, leaf: _orthogonalised(model, names(path), leaf), updates)
            return alone, state
        return division.map(partial(_on_mesh, model, division), updates), state

    return optax.GradientTransformationExtraArgs(momentum.init, update)


def _orthogonalised(model: ModelConfig, path: tuple[str, ...], update: jax.Array) -> jax.Array:
    """Every matrix of the update of the parameter at `path`, [..., in, out]."""
    heads, widths = _heads(model, path, update.shape[-1])
    by_head = update.reshape(-1, update.shape[-2], heads, sum(widths)).swapaxes(1, 2)
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    parts = [orthogonal(part.reshape(-1, *part.shape[2:])) for part in jnp.split(by_head, ends, axis=-1)]
    whole = jnp.concatenate(parts, axis=-1).reshape(by_head.shape)
    return whole.swapaxes(1, 2).reshape(update.shape)


def _on_mesh(model: ModelConfig, division: Division, path: tuple[str, ...], place: Place, update: jax.Array) -> jax.Array:
    """The same of an update that the devices have in parts."""
    shared = partial(_shared_out, partial(_orthogonalised, model, path), division, place)
    spec = place.spec()
    return jax.shard_map(shared, mesh=division.mesh, in_specs=spec, out_specs=spec, check_vma=False)(update)


def _heads(model: ModelConfig, path: tuple[str, ...], features: int) -> tuple[int, tuple[int, ...]]:
    """How the outputs of a weight are matrices of their own: the number of heads, and the widths within each."""
    if path[-2] in ("q_proj", "q_b_proj"):
        return model.num_attention_heads, (model.qk_nope_head_dim + model.qk_rope_head_dim,)
    if path[-2] == "kv_b_proj":
        return model.num_attention_heads, (model.qk_nope_head_dim, model.v_head_dim)
    return 1, (features,)


def orthogonal(matrices: jax.Array) -> jax.Array:
    """Nearest orthogonal matrices, by optax's five Newton-Schulz iterations, scaled: [N, rows, columns] -> the same.

    Singular values come out near 1, not at it; zeros stay zero.
    """
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    newton_schulz = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=dimensions)
    found, _ = newton_schulz.update(matrices, newton_schulz.init(matrices))
    return found * (ROOT_MEAN_SQUARE * max(matrices.shape[1:]) ** 0.5)


def _shared_out(change: Callable[[jax.Array], jax.Array], division: Division, place: Place, own: jax.Array) -> jax.Array:
    """`change` of whole matrices of which this device has parts, inside `shard_map`.

    What an axis of the mesh cuts within matrices, its devices exchange: each gets some of the matrices whole.
    """
    stack = own.reshape(-1, *own.shape[-2:])
    cuts = [(axis, dim - own.ndim + 3) for axis, dim in place.cuts if dim >= own.ndim - 2]
    counts = []
    for axis, dim in reversed(cuts):
        counts.append(len(stack))
        stack = jnp.pad(stack, [(0, -len(stack) % division.mesh.shape[axis]), (0, 0), (0, 0)])
        stack = jax.lax.all_to_all(stack, axis, split_axis=0, concat_axis=dim, tiled=True)
    stack = change(stack)
    for axis, dim in cuts:
        stack = jax.lax.all_to_all(stack, axis, split_axis=dim, concat_axis=0, tiled=True)[: counts.pop()]
    return stack.reshape(own.shape)

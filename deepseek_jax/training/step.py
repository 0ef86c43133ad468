"""One optimizer step as a pure function: gradients, AdamW, and the routers' biases."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.compilation import compiler_options
from deepseek_jax.config import MESH_AXES, Config, ModelConfig
from deepseek_jax.config.trainable import learning_part, trainable, with_part
from deepseek_jax.data.marks import read_marks
from deepseek_jax.model.layers import param_dtype
from deepseek_jax.model.router import updated_bias
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.parallel.sharding import PIPELINED, Division
from deepseek_jax.parallel.weights import collect, deliver, largest_of_layers, sum_of_layers
from deepseek_jax.training.adam import kept_if
from deepseek_jax.training.adapters import with_adapters
from deepseek_jax.training.loss import LossParts, counted_targets, targets_of_part, training_loss
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.qk_clip import clipped_heads


class TrainState(NamedTuple):
    """All that a checkpoint must hold to go on."""

    params: Any
    router_state: Any
    optimizer: Any
    """Moments of the parameters that learn, and what counts steps."""


class Scalars(NamedTuple):
    """The scheduled numbers of a step, arrays of no dimension or, to compile for, their shapes."""

    learning_rate: Any
    bias_update_speed: Any
    mtp_loss_weight: Any
    parts: Any = None
    """How many of a batch's accumulation parts count, so that one program takes batches that grow; null is all."""


class StepMetrics(NamedTuple):
    """What a step tells."""

    loss: jax.Array
    parts: LossParts
    grad_norm: Optional[jax.Array] = None
    """Global, before clipping."""
    skipped: Optional[jax.Array] = None
    """Whether loss or gradients were no numbers, so that the state stayed as it was."""
    squares: Any = None
    """Each gradient's sum of squares, by which one that is no number is found."""


def init_variables(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Fresh parameters and zero biases, {"params": ..., "router_state": ...}."""
    tokens = jnp.zeros((1, 1 + config.num_nextn_predict_layers), jnp.int32)
    # What is computed on the way is thrown away: it needs no kernels, which might refuse experts that one device never has.
    config = dataclasses.replace(config, attention="reference", grouped_matmul="reference")
    return {"router_state": {}, **DeepseekV3(config).init(jax.random.key(seed), tokens)}


def init_state(config: Config, variables: Optional[dict[str, Any]] = None) -> TrainState:
    """Zero moments, and adapters if there are to be some, beside fresh parameters from train.seed or a copy of `variables`.

    Those are of the config's type then, whatever they were.
    """
    if variables is None:
        variables = init_variables(config.model, config.train.seed)
    else:
        variables = jax.tree.map(lambda leaf: jnp.array(leaf, param_dtype(config.model)), variables)
    params = with_adapters(config, variables["params"])
    moments = make_optimizer(config.train).init(learning_part(trainable(config), params))
    return TrainState(params, variables["router_state"], moments)


def make_step(config: Config, division: Optional[Division] = None) -> jax.stages.Wrapped:
    """`train_step` of state, tokens and scalars, as a program of its own that takes the state over."""
    devices = jax.local_devices() if division is None else division.mesh.local_devices
    step = partial(train_step, config=config, division=division)
    # Gradients of all experts, whole in float32, cost as much as is hidden so (v5p, 671B widths, fsdp 8), and 14 GB.
    options = compiler_options(devices[0], sparse_cores=config.parallel.expert > 1)
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def train_step(
    state: TrainState, tokens: jax.Array, scalars: Scalars, config: Config, division: Optional[Division] = None
) -> tuple[TrainState, StepMetrics]:
    """Advance by one batch.

    Args:
        tokens: [A, B / A, T + 1 + D] ids of the batch in its A accumulation parts, of which the first `scalars.parts` count.
        config: static.
        division: the mesh whose devices share the work, and the arrays of `state`; null is one device.
    """
    gradients, metrics = gradients_of(state, tokens, scalars, config, division)
    learning = learning_part(trainable(config), state.params)
    with jax.named_scope("optimizer"):
        squares = jax.tree.map(lambda gradient: jnp.sum(jnp.square(gradient)), gradients)
        norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
        skipped = ~(jnp.isfinite(metrics.loss) & jnp.isfinite(norm))
        metrics = metrics._replace(grad_norm=norm, skipped=skipped, squares=squares)
        optimizer = make_optimizer(config.train, config.model, division)
        updates, moments = optimizer.update(gradients, state.optimizer, learning, skipped=skipped)
        learnt = jax.tree.map(lambda p, u: p - scalars.learning_rate.astype(p.dtype) * u, learning, updates)
        params = with_part(state.params, learnt)
        if config.train.qk_clip is not None and metrics.parts.largest_scores is not None:
            params = clipped_heads(config.model, config.train.qk_clip, params, metrics.parts.largest_scores)
    speed = scalars.bias_update_speed
    router_state = {
        name: jax.tree.map(lambda bias, c=metrics.parts.counts[name]: updated_bias(bias, c, speed), biases)
        for name, biases in state.router_state.items()
    }
    params, router_state = kept_if(skipped, (state.params, state.router_state), (params, router_state))
    state = TrainState(params, router_state, moments)
    if division is not None:
        state = jax.lax.with_sharding_constraint(state, division.shardings(state, optimizer, trainable(config)))
    return state, metrics


def gradients_of(
    state: TrainState, tokens: jax.Array, scalars: Scalars, config: Config, division: Optional[Division] = None
) -> tuple[Any, StepMetrics]:
    """Gradients of a whole batch and what is told of it; arguments as for `train_step`."""
    if division is None:
        return _accumulated(state.params, state.router_state, tokens, scalars, config)
    return _on_mesh(state, tokens, scalars, config, division)


def _on_mesh(
    state: TrainState, tokens: jax.Array, scalars: Scalars, config: Config, division: Division
) -> tuple[Any, StepMetrics]:
    """As `_accumulated`, every device with its share of the sequences, layers and experts.

    The loss is the mean of the devices' own, so that their gradients are summed and divided by the number of devices.
    """
    devices = division.mesh.size

    def of_device(params: Any, router_state: Any, tokens: jax.Array, scalars: Scalars) -> tuple[Any, StepMetrics]:
        with jax.named_scope("weights"):
            weights, biases = collect(division, config.model, params, router_state)
        gradients, metrics = _accumulated(weights, biases, tokens, scalars, config, division)
        with jax.named_scope("weights"):
            gradients = jax.tree.map(lambda total: total / devices, deliver(division, config.model, gradients))
        mean = partial(jax.lax.pmean, axis_name=MESH_AXES)
        counts = {
            name: sum_of_layers(division, config.model, own)
            if name == PIPELINED and division.parallel.pipe > 1 else jax.lax.psum(own, MESH_AXES)
            for name, own in metrics.parts.counts.items()
        }  # fmt: skip
        scores = metrics.parts.largest_scores and {
            name: largest_of_layers(division, config.model, own)
            if name == PIPELINED and division.parallel.pipe > 1 else jax.lax.pmax(own, MESH_AXES)
            for name, own in metrics.parts.largest_scores.items()
        }  # fmt: skip
        parts = mean(metrics.parts._replace(counts={}, largest_scores=None))._replace(counts=counts, largest_scores=scores)
        return gradients, StepMetrics(mean(metrics.loss), parts)

    whole, cut = PartitionSpec(), division.param_specs()
    sharded = jax.shard_map(
        of_device, mesh=division.mesh, in_specs=(cut, whole, division.batch_spec(axis=1), whole),
        out_specs=(learning_part(trainable(config), cut), whole), check_vma=False,
    )  # fmt: skip
    return sharded(state.params, state.router_state, tokens, scalars)


def _accumulated(
    params: Any, router_state: Any, tokens: jax.Array, scalars: Scalars, config: Config, division: Optional[Division] = None
) -> tuple[Any, StepMetrics]:
    """Gradients of what learns and metrics of the whole batch: means over its parts, but sums of the expert counts."""
    learning = learning_part(trainable(config), params)
    wide, count = param_dtype(config.model), tokens.shape[0] if scalars.parts is None else scalars.parts
    whole = _targets(tokens, count, config, division)

    @partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop; the program is the same
    def one(part: jax.Array) -> tuple[Any, jax.Array, LossParts]:
        def loss_of(learning: Any) -> tuple[jax.Array, LossParts]:
            every = with_part(params, learning)
            return training_loss(every, router_state, part, config, scalars.mtp_loss_weight, division, whole)

        (loss, parts), gradients = jax.value_and_grad(loss_of, has_aux=True)(learning)
        return jax.tree.map(lambda gradient: gradient.astype(wide), gradients), loss, parts

    if scalars.parts is None and count == 1:
        gradients, loss, parts = one(tokens[0])
    else:
        shapes = jax.eval_shape(one, tokens[0])
        *zeros, nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        lowest = jax.tree.map(lambda leaf: jnp.full(leaf.shape, -jnp.inf, leaf.dtype), shapes[2].largest_scores)

        def add(number: jax.Array, so_far: tuple[Any, Any]) -> tuple[Any, Any]:
            sums, largest = so_far
            *summed, parts = one(tokens[number])
            summed.append(parts._replace(largest_scores=None))
            return jax.tree.map(jnp.add, sums, tuple(summed)), jax.tree.map(jnp.maximum, largest, parts.largest_scores)

        start = (*zeros, nothing._replace(largest_scores=None)), lowest
        (gradients, loss, parts), scores = jax.lax.fori_loop(0, count, add, start)
        mean = partial(jax.tree.map, lambda total: total / count)
        gradients, loss = mean(gradients), mean(loss)
        parts = mean(parts._replace(counts={}))._replace(counts=parts.counts, largest_scores=scores)
    return gradients, StepMetrics(loss, parts)


def _targets(tokens: jax.Array, count: int | jax.Array, config: Config, division: Optional[Division]) -> Optional[jax.Array]:
    """`targets_of_part` of the first `count` parts of [A, B / A, T + 1 + D]; None where every target counts."""
    depth = config.model.num_nextn_predict_layers
    marked = read_marks(config.data, tokens.reshape(-1, tokens.shape[-1]))
    if marked.ends is None:
        return None
    counted = counted_targets(marked, tokens.shape[-1] - 1 - depth, depth, division)
    is_read = jnp.repeat(jnp.arange(len(tokens)) < count, tokens.shape[1])
    return targets_of_part(counted & is_read[:, None], division, count)

"""Where a step's numbers stopped being numbers: its micro-batches made again, module by module, after the fact.

Nothing of it is in the step that trains: the programs here are compiled when such a step was seen too often.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.config import MESH_AXES, Config, ModelConfig, stretches
from deepseek_jax.model.block import Block, BlockOutput
from deepseek_jax.model.layers import Linear
from deepseek_jax.model.mtp import MTPHead, MTPModule
from deepseek_jax.parallel.sharding import Division, names, place_batch
from deepseek_jax.parallel.weights import collect
from deepseek_jax.training.loss import training_loss
from deepseek_jax.training.step import Scalars, TrainState, gradients_of, init_state
from deepseek_jax.training.where import Found, backward_modules, describe

LOSS = "lm_head or the loss"


class Search:
    """Looks for where a batch's loss or gradients stopped being finite."""

    def __init__(self, config: Config, division: Optional[Division] = None):
        """Compiles nothing until it looks."""
        self._config, self._division = config, division
        self._forward = _Forward(config, _without_stages(config, division))
        self._backward = _backward(config, division)

    def find(self, state: TrainState, batch: np.ndarray, scalars: Scalars) -> str:
        """The micro-batch, the pass and the modules, in words.

        Args:
            state: as it was before that batch.
            batch: [A, B / A, T + 1 + D], the whole of it in every process.
        """
        for number, part in enumerate(batch, start=1):
            if module := self._forward.culprit(state, part, scalars):
                return describe(Found("forward", number, len(batch), [module]))
        for number, part in enumerate(batch, start=1):
            bad = jax.device_get(self._backward(state, _placed(self._division, part[None], 1), scalars._replace(parts=None)))
            places = _places(self._config.model)
            known = {place.path[1:] for place in places}
            tensors = [place.name for place in places if place.path[1:] in bad and bad[place.path[1:]][place.index]]
            tensors += [".".join(path) for path, flag in bad.items() if path not in known and flag]  # adapters
            if tensors:
                return describe(Found("backward", number, len(batch), backward_modules(tensors)))
        return describe(None)


class _Forward:
    """The forward pass of one micro-batch, with a look at what goes into and comes out of each module."""

    def __init__(self, config: Config, division: Optional[Division]):
        self._division, self._names = division, list[str]()
        whole = PartitionSpec()

        def watched(params: Any, router_state: Any, tokens: jax.Array, weight: jax.Array) -> jax.Array:
            watch = _Watch(config.model)
            if division is not None:
                params, router_state = collect(division, config.model, params, router_state)
            with nn.intercept_methods(watch):
                loss, _ = training_loss(params, router_state, tokens, config, weight, division)
            self._names = [*watch.names, LOSS]
            bad = jnp.concatenate([*watch.bad, _is_bad(loss)[None]]).astype(jnp.int32)
            return bad if division is None else jax.lax.psum(bad, MESH_AXES)

        if division is not None:
            specs = division.param_specs(), whole, division.batch_spec(axis=0), whole
            watched = jax.shard_map(watched, mesh=division.mesh, in_specs=specs, out_specs=whole, check_vma=False)
        self._watched = jax.jit(watched)

    def culprit(self, state: TrainState, tokens: np.ndarray, scalars: Scalars) -> str | None:
        """The first module, in the order of the pass, that makes something that is not finite of what is."""
        params, router_state = state.params, state.router_state
        if self._division is not None:  # it may be another than training's
            on_mesh = partial(NamedSharding, self._division.mesh)
            params = jax.device_put(params, jax.tree.map(on_mesh, self._division.param_specs()))
            router_state = jax.device_put(router_state, on_mesh(PartitionSpec()))
        placed = _placed(self._division, tokens, 0)
        bad = np.asarray(self._watched(params, router_state, placed, scalars.mtp_loss_weight))
        return self._names[int(bad.astype(bool).argmax())] if bad.any() else None


class _Watch:
    """Takes note of every module's results, to be given to `nn.intercept_methods`.

    Layers are traced once for all of a stack, inside a loop: what was seen there leaves it as `BlockOutput.bad`.
    """

    def __init__(self, model: ModelConfig):
        self.names: list[str] = []
        self.bad: list[jax.Array] = []
        """Of each name, in the order of the pass: arrays [names]."""
        self._within: list[tuple[str, jax.Array]] | None = None
        self._of_layer: list[str] = []
        self._numbers = _layer_numbers(model)

    def __call__(self, method: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, name = context.module, context.method_name
        if name == "_run":
            return self._stack(args, kwargs, method(*args, **kwargs))
        if name != "__call__" and not (name == "biased" and isinstance(module, Linear)):
            return method(*args, **kwargs)
        if isinstance(module, Block | MTPModule | MTPHead) and not module.path:
            return self._layer(method, args, kwargs)
        if not module.path:  # the whole model
            return method(*args, **kwargs)
        path = ".".join(module.path)
        if name == "__call__":  # what was made between modules is their parent's
            self._note(path.rpartition(".")[0], args)
        result = method(*args, **kwargs)
        self._note(path, result)
        return result

    def _note(self, path: str, values: Any) -> None:
        if self._within is not None:
            self._within.append((path, _is_bad(values)))
        elif path:
            self.names.append(path if path == "lm_head" else f"model.{path}")
            self.bad.append(_is_bad(values)[None])

    def _layer(self, method: Callable, args: Any, kwargs: Any) -> Any:
        """A layer's own result, with what was seen in it."""
        self._within = []
        x, output = method(*args, **kwargs)
        self._note("", x)
        self._of_layer = [path for path, _ in self._within]
        bad = jnp.stack([flag for _, flag in self._within])
        self._within = None
        if isinstance(output, BlockOutput):
            return x, output._replace(bad=bad)
        return x, (output[0], output[1]._replace(bad=bad))

    def _stack(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Layers that were run in a loop: `DeepseekV3._run(name, x, shared, each, part)`."""
        stack, part = args[0], kwargs.get("part")
        output: BlockOutput = result[1] if isinstance(result[1], BlockOutput) else result[1][1]
        numbers = self._numbers[stack][slice(*part) if part else slice(None)]
        self.names += [_named(number, path) for number in numbers for path in self._of_layer]
        assert output.bad is not None
        self.bad.append(output.bad.reshape(-1))
        return result


def _named(number: int, path: str) -> str:
    """A module of a layer in Hugging Face's terms, where an MTP module's block and norm have no such names."""
    path = "shared_head.norm" if path == "norm" else path.removeprefix("block").removeprefix(".")
    return f"model.layers.{number}{'.' * bool(path)}{path}"


def _layer_numbers(model: ModelConfig) -> dict[str, list[int]]:
    """Of each stack the layers' numbers in the whole model."""
    numbers: dict[str, list[int]] = {}
    done, last = 0, model.num_hidden_layers
    for stack, first, end in stretches(model):
        numbers.setdefault(stack, []).extend(range(done, done + end - first))
        done += end - first
    return numbers | {"mtp_layers": list(range(last, last + model.num_nextn_predict_layers))}


def _is_bad(values: Any) -> jax.Array:
    """Whether any number among arrays is none."""
    numbers = [leaf for leaf in jax.tree.leaves(values) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return ~jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in numbers] or [jnp.bool_(True)]))


def _backward(config: Config, division: Optional[Division]) -> Callable[..., dict[tuple[str, ...], jax.Array]]:
    """By parameter, whether its gradient is not finite, of each layer and expert."""
    leading = {place.path[1:]: len(place.index) for place in _places(config.model)}

    def bad(state: TrainState, tokens: jax.Array, scalars: Scalars) -> dict[tuple[str, ...], jax.Array]:
        gradients, _ = gradients_of(state, tokens, scalars, config, division)
        finite = {names(path): jnp.isfinite(leaf) for path, leaf in jax.tree.leaves_with_path(gradients)}
        return {path: ~jnp.all(leaf, axis=tuple(range(leading.get(path, 0), leaf.ndim))) for path, leaf in finite.items()}

    return jax.jit(bad, out_shardings=None if division is None else NamedSharding(division.mesh, PartitionSpec()))


def _places(model: ModelConfig) -> list[TensorPlace]:
    return [place for place in layout(model) if place.path[0] == "params" and not place.is_copy]


def _without_stages(config: Config, division: Optional[Division]) -> Optional[Division]:
    """The mesh with stages as one more axis that divides the weights: a pipeline tells little of its insides."""
    if division is None or division.parallel.pipe == 1:
        return division
    parallel = division.parallel
    merged = dataclasses.replace(parallel, pipe=1, pipe_interleave=1, fsdp=parallel.pipe * parallel.fsdp)
    return Division(merged, jax.eval_shape(partial(init_state, config)).params)


def _placed(division: Optional[Division], tokens: np.ndarray, axis: int) -> jax.Array | np.ndarray:
    def read(start: int, end: int) -> np.ndarray:
        return tokens[:, start:end] if axis else tokens[start:end]

    return place_batch(division, tokens.shape, axis, read)

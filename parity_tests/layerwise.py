"""A checkpoint through JAX, its sibling and transformers, a layer of each at a time: where do they part?

Every framework goes on from its own hidden state, as it would in use, so that a table shows how differences grow. Memory
holds one layer's weights in each, whatever the depth. The main model alone is run, without MTP layers.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch

import deepseek_jax.model.block as jax_block
import deepseek_jax.model.layers as jax_layers
import deepseek_jax.model.rope as jax_rope
import deepseek_jax.model.router as jax_router
import deepseek_torch.model.block as torch_block
import deepseek_torch.model.layers as torch_layers
import deepseek_torch.model.rope as torch_rope
from deepseek_jax.checkpoint.hf_source import EMBEDDING, HEAD, HuggingFaceSource
from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.config import ModelConfig, has_experts
from parity_tests.comparison import Difference, difference
from parity_tests.weights import module_variables

Tensors = dict[str, np.ndarray]


class Step(NamedTuple):
    """What one framework makes of a layer."""

    hidden: np.ndarray
    """[B, T, hidden_size]."""
    choices: np.ndarray | None
    """Experts of every token, [B T, K] in ascending order; None of a dense layer."""


class Framework(Protocol):
    """A layer of it at a time, and what comes after the last."""

    def layer(self, number: int, tensors: Tensors, hidden: np.ndarray) -> Step:
        """Run layer `number` with these weights, by their names within the layer."""

    def logits(self, norm: np.ndarray, head: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """[B, T, V]; head is [V, hidden_size]."""


class Row(NamedTuple):
    """A layer, by the framework that is compared with the sibling."""

    layer: int
    apart: dict[str, Difference]
    others: dict[str, int]
    """Tokens for which it chose other experts."""


class Ending(NamedTuple):
    """What a framework predicts, beside the sibling."""

    logits: Difference
    divergence: float
    """Mean KL from the sibling's distribution to this one, in nats."""
    loss: float
    """Mean, in nats, of each next token."""
    greedy: int
    """Tokens at which it would go on otherwise."""


class InJax:
    """The JAX sibling; layers of one kind are compiled once."""

    def __init__(self, config: ModelConfig, length: int):
        self._config, self._positions = config, np.arange(length)[None]

    def layer(self, number: int, tensors: Tensors, hidden: np.ndarray) -> Step:
        """See `Framework`."""
        config, moe = self._config, has_experts(self._config, number)
        with jax.enable_x64(config.precision == "float64"):
            variables = _variables(config, number, tensors)
            out, choices = jax.device_get(_jax_layer(config, moe, variables, hidden, self._positions))
        return Step(out, None if choices is None else _sorted(choices))

    def logits(self, norm: np.ndarray, head: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See `Framework`."""
        c = self._config
        with jax.enable_x64(c.precision == "float64"):
            normed = jax_layers.RMSNorm(c, c.rms_norm_eps).apply({"params": {"weight": norm}}, jnp.asarray(hidden))
            return np.asarray(jnp.matmul(normed, head.T, precision="highest"))


@partial(jax.jit, static_argnums=(0, 1))
def _jax_layer(config: ModelConfig, moe: bool, variables: Any, hidden: jax.Array, positions: jax.Array) -> tuple:
    rope = jax_rope.rope_angles(config, positions)
    is_router = lambda module, _: isinstance(module, jax_router.Router)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        (out, _), kept = jax_block.Block(config, moe=moe).apply(
            variables, hidden, rope, positions, capture_intermediates=is_router
        )
    return out, kept["intermediates"]["mlp"]["gate"]["__call__"][0].indices if moe else None


def _variables(config: ModelConfig, number: int, tensors: Tensors) -> dict[str, Any]:
    """One layer's variables from its tensors."""
    prefix, variables = f"model.layers.{number}.", {}
    places = [place for place in layout(config) if place.name.startswith(prefix)]
    stack = places[0].path[1]
    arrays: dict[tuple[str, ...], dict[tuple[int, ...], np.ndarray]] = {}
    for place in places:
        array = tensors[place.name.removeprefix(prefix)]
        arrays.setdefault(place.path, {})[place.index[1:]] = array.T if place.transposed else array
    for path, parts in arrays.items():
        node = variables
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.stack([parts[index] for index in sorted(parts)])[None] if len(parts) > 1 else parts[()][None]
    return module_variables(variables, stack, 0)


class InTorch:
    """The PyTorch sibling."""

    def __init__(self, config: ModelConfig, length: int):
        self._config, self._positions = config, torch.arange(length)[None]

    def layer(self, number: int, tensors: Tensors, hidden: np.ndarray) -> Step:
        """See `Framework`."""
        with torch.device("meta"):
            block = torch_block.Block(self._config, moe=has_experts(self._config, number)).eval()
        block.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, assign=True)
        found: list[np.ndarray] = []
        if block.moe:
            block.mlp.gate.register_forward_hook(lambda module, given, routing: found.append(routing.indices.numpy()))
        x = torch.from_numpy(hidden).expand(hidden.shape)
        with torch.no_grad():
            out, _ = block(x, torch_rope.rope_angles(self._config, self._positions), self._positions)
        return Step(out.numpy(), _sorted(found[0]) if found else None)

    def logits(self, norm: np.ndarray, head: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See `Framework`."""
        c = self._config
        module = torch_layers.RMSNorm(c, c.hidden_size, c.rms_norm_eps)
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(norm))
            return (module(torch.from_numpy(hidden)) @ torch.from_numpy(head).T).numpy()


class InTransformers:
    """transformers' own layers of the class that config.json names (V3's for kimi_k2)."""

    def __init__(self, config: ModelConfig, length: int, content: dict[str, Any]):
        import transformers
        from transformers.models.deepseek_v2 import modeling_deepseek_v2
        from transformers.models.deepseek_v3 import modeling_deepseek_v3

        from parity_tests.transformers_oracle import float64_islands

        is_v2 = content["model_type"] == "deepseek_v2"
        self._module, self._name = (modeling_deepseek_v2, "DeepseekV2") if is_v2 else (modeling_deepseek_v3, "DeepseekV3")
        own = ("model_type", "auto_map", "quantization_config", "dtype", "torch_dtype", "architectures")
        fields = {key: value for key, value in content.items() if key not in own}
        fields |= {key: getattr(config, key) for key in ("n_group", "topk_group", "n_shared_experts")}
        kind = getattr(transformers, f"{self._name}Config")
        self._config = kind(**fields, attn_implementation="eager", experts_implementation="eager")
        self._islands = float64_islands if config.precision == "float64" else nullcontext
        self._ours, self._positions = config, torch.arange(length)[None]
        dtype = torch.float64 if config.precision == "float64" else torch.float32
        self._mask = torch.full((1, 1, length, length), float("-inf"), dtype=dtype).triu(1)

    def layer(self, number: int, tensors: Tensors, hidden: np.ndarray) -> Step:
        """See `Framework`."""
        from parity_tests.transformers_oracle import fuse_experts

        x = torch.from_numpy(hidden)
        with self._islands():
            layer = getattr(self._module, f"{self._name}DecoderLayer")(self._config, number).to(x.dtype).eval()
        named = fuse_experts({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
        missing, unexpected = layer.load_state_dict(named, strict=False)
        assert not unexpected and all("shared_experts" in name for name in missing), (missing, unexpected)
        found: list[np.ndarray] = []
        if has_experts(self._ours, number):
            layer.mlp.gate.register_forward_hook(lambda module, given, out: found.append(out[2].numpy()))
        with torch.no_grad(), self._islands():
            rope = getattr(self._module, f"{self._name}RotaryEmbedding")(self._config)(x, self._positions)
            out = layer(x, attention_mask=self._mask, position_embeddings=rope)
        return Step(out.numpy(), _sorted(found[0]) if found else None)

    def logits(self, norm: np.ndarray, head: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """See `Framework`."""
        x = torch.from_numpy(hidden)
        module = getattr(self._module, f"{self._name}RMSNorm")(hidden.shape[-1], self._ours.rms_norm_eps).to(x.dtype)
        with torch.no_grad(), self._islands():
            module.weight.copy_(torch.from_numpy(norm))
            return (module(x) @ torch.from_numpy(head).T).numpy()


def frameworks(config: ModelConfig, length: int, content: dict[str, Any]) -> dict[str, Framework]:
    """All that are installed and have the model; the sibling, with which the others are compared, first."""
    found: dict[str, Framework] = {"PyTorch sibling": InTorch(config, length), "JAX": InJax(config, length)}
    known = content["model_type"] in ("deepseek_v2", "deepseek_v3", "kimi_k2") and config.moe_layer_freq == 1
    try:
        import transformers  # noqa: F401
    except ImportError:
        known = False
    return found | ({"transformers": InTransformers(config, length, content)} if known else {})


def run(source: HuggingFaceSource, tokens: np.ndarray, each: dict[str, Framework]) -> Iterator[Row | dict[str, Ending]]:
    """A row for each layer, and at the end what the frameworks predict, by name.

    Args:
        tokens: [1, T] ids.
        each: from `frameworks`; the first is what the others are compared with.
    """
    config, places = source.config, {place.name: place for place in layout(source.config)}
    dtype = np.float64 if config.precision == "float64" else np.float32
    first, *others = each

    def read(place: TensorPlace) -> np.ndarray:
        return source.read(place).astype(dtype)

    states = dict.fromkeys(each, read(places[EMBEDDING])[tokens])
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        tensors = {name.removeprefix(prefix): read(place) for name, place in places.items() if name.startswith(prefix)}
        steps = {name: framework.layer(number, tensors, states[name]) for name, framework in each.items()}
        states = {name: step.hidden for name, step in steps.items()}
        apart = {name: difference(states[name], states[first]) for name in others}
        others_chosen = {name: _unlike(steps[name].choices, steps[first].choices) for name in others}
        del tensors, steps  # before the next layer's are read
        yield Row(number, apart, others_chosen)
    norm, head = read(places["model.norm.weight"]), read(places[EMBEDDING if config.tie_word_embeddings else HEAD])
    logits = {name: framework.logits(norm, head, states[name]).astype(np.float64) for name, framework in each.items()}
    yield {name: _ending(logits[name], logits[first], tokens) for name in each}


def _ending(logits: np.ndarray, expected: np.ndarray, tokens: np.ndarray) -> Ending:
    ours, theirs = _log_softmax(logits), _log_softmax(expected)
    divergence = float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())
    targets = np.take_along_axis(ours[:, :-1], tokens[:, 1:, None], axis=-1)
    greedy = int((logits.argmax(-1) != expected.argmax(-1)).sum())
    return Ending(difference(logits, expected), divergence, float(-targets.mean()), greedy)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _sorted(choices: np.ndarray) -> np.ndarray:
    return np.sort(np.asarray(choices).reshape(-1, choices.shape[-1]), axis=-1)


def _unlike(ours: np.ndarray | None, theirs: np.ndarray | None) -> int:
    return 0 if ours is None or theirs is None else int((ours != theirs).any(axis=-1).sum())


def opened(directory: Path, precision: str) -> HuggingFaceSource:
    """The checkpoint, to be computed in `precision` by the plainest implementations."""
    source = HuggingFaceSource(directory)
    how = dict(precision=precision, grouped_matmul="auto", remat="none", attention="reference")
    source.config = dataclasses.replace(source.config, **how)
    return source

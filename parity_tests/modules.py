"""Every module of the model as one case: the same weights and inputs through both siblings, forward and backward.

Each case feeds its module random inputs of its own, so that a fault shows at the module that has it and
at those that contain it, and nowhere else. Backward means the gradients of inputs and of all parameters,
pulled back from random cotangents on all outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import deepseek_jax.model.attention as jax_attention
import deepseek_jax.model.block as jax_block
import deepseek_jax.model.experts as jax_experts
import deepseek_jax.model.layers as jax_layers
import deepseek_jax.model.mtp as jax_mtp
import deepseek_jax.model.rope as jax_rope
import deepseek_jax.model.router as jax_router
import deepseek_torch.model.layers as torch_layers
import deepseek_torch.model.rope as torch_rope
from deepseek_jax.config import ModelConfig, expert_layers
from parity_tests.comparison import Difference, differences
from parity_tests.siblings import Siblings
from parity_tests.weights import module_tensors, module_variables, to_torch

Outputs = tuple[Any, ...]

COMPILE_QUICKLY = {"xla_backend_optimization_level": 0}
"""For code that runs once on few numbers: the same program, in half the compile time."""


@dataclass(frozen=True)
class Case:
    """One module in both siblings; arrays are given in the config's compute type."""

    name: str
    inputs: tuple[np.ndarray, ...]
    """What is differentiated beside the parameters."""
    jax_call: Callable[..., tuple[Outputs, Outputs]]
    """(params, *inputs) -> outputs with a gradient, and outputs that must be equal."""
    torch_call: Callable[..., tuple[Outputs, Outputs]]
    """(*inputs) -> the same."""
    params: Any
    """Parameters of the JAX module."""
    named: Callable[[Any], dict[str, torch.Tensor]]
    """Gradients of these -> tensors by names of the state dict."""


@dataclass(frozen=True)
class Results:
    """What one sibling computed, by name."""

    outputs: dict[str, Any]
    exact: dict[str, Any]
    gradients: dict[str, Any]


def run_jax(case: Case, config: ModelConfig, cotangents: tuple[np.ndarray, ...]) -> Results:
    """Forward and backward through the JAX module, compiled as one function."""

    def both_ways(params: Any, inputs: tuple, cotangents: tuple) -> tuple:
        outputs, pull_back, exact = jax.vjp(case.jax_call, params, *inputs, has_aux=True)
        return outputs, exact, pull_back(tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs)))

    with jax.enable_x64(config.precision == "float64"):
        inputs = tuple(jnp.asarray(x, jax_layers.compute_dtype(config)) for x in case.inputs)
        result = jax.jit(both_ways, compiler_options=COMPILE_QUICKLY)(case.params, inputs, cotangents)
        outputs, exact, (param_gradients, *input_gradients) = jax.device_get(result)
    return Results(_numbered("output", outputs), _numbered("exact", exact),
                   _numbered("input", input_gradients) | case.named(param_gradients))  # fmt: skip


def run_torch(case: Case, siblings: Siblings, cotangents: tuple[np.ndarray, ...], names: set[str]) -> Results:
    """Forward and backward through the PyTorch module; gradients of inputs and of the parameters `names`."""
    dtype = torch_layers.compute_dtype(siblings.config)
    inputs = [torch.from_numpy(x).to(dtype).requires_grad_() for x in case.inputs]
    siblings.torch.zero_grad()
    outputs, exact = case.torch_call(*inputs)
    # A balance loss of no layers is a constant.
    pulled = [(o, torch.from_numpy(c).to(o.dtype)) for o, c in zip(outputs, cotangents) if o.requires_grad]
    torch.autograd.backward(*zip(*pulled))
    gradients = _numbered("input", [x.grad for x in inputs])
    gradients |= {name: p.grad for name, p in siblings.torch.named_parameters() if name in names}
    return Results(_numbered("output", outputs), _numbered("exact", exact), gradients)


def run_both(case: Case, siblings: Siblings) -> tuple[Results, Results]:
    """The JAX sibling's results and the PyTorch sibling's."""
    inputs = [torch.from_numpy(x).to(torch_layers.compute_dtype(siblings.config)) for x in case.inputs]
    with torch.no_grad():
        shapes = [output.shape for output in case.torch_call(*inputs)[0]]
    rng = np.random.default_rng(1)
    cotangents = tuple(rng.standard_normal(shape) for shape in shapes)
    in_jax = run_jax(case, siblings.config, cotangents)
    return in_jax, run_torch(case, siblings, cotangents, set(in_jax.gradients))


def compare(case: Case, siblings: Siblings) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """Differences by name, forward (what must be equal included, as infinite if it is not) and backward.

    Raises:
        AssertionError: when the siblings do not have the same outputs and parameters.
    """
    in_jax, in_torch = run_both(case, siblings)
    forward = differences(in_jax.outputs, in_torch.outputs)
    for name, apart in differences(in_jax.exact, in_torch.exact).items():
        forward[name] = apart if apart.absolute == 0 else Difference(apart.absolute, float("inf"))
    return forward, differences(in_jax.gradients, in_torch.gradients)


def _given(value: Any) -> Outputs:
    return () if value is None else (value,)


def _numbered(kind: str, values: Any) -> dict[str, Any]:
    return {f"{kind} {number}": value for number, value in enumerate(values)}


def cases(siblings: Siblings, batch: int = 2, length: int = 11) -> Iterator[Case]:
    """A case for every module that the config has, from the smallest to the whole model."""
    c = siblings.config
    maker = Maker(siblings, batch, length)
    yield maker.rope()
    if expert_layers(c) < c.num_hidden_layers or c.n_shared_experts:
        yield maker.feed_forward()
    stack = "moe_layers" if expert_layers(c) else "dense_layers"
    yield maker.attention(stack)
    if expert_layers(c) < c.num_hidden_layers:
        yield maker.block("dense_layers")
    if stack == "moe_layers":
        yield maker.router()
        yield maker.experts("experts", maker.random_choices())
        yield maker.block("moe_layers")
    if c.num_nextn_predict_layers:
        yield maker.mtp()
    yield maker.whole_model()


class Maker:
    """Builds cases of one batch shape; where a stack has several layers the last is taken."""

    def __init__(self, siblings: Siblings, batch: int, length: int):
        self.siblings, self.config, self.batch, self.length = siblings, siblings.config, batch, length
        self.rng = np.random.default_rng(2)
        # Not from zero, and each sequence elsewhere.
        self.positions = 3 + np.arange(length) + 7 * np.arange(batch)[:, None]

    def rope(self) -> Case:
        """Rotary embedding of queries, positions up to the end of the context."""
        c = self.config
        x = self._normal(self.batch, self.length, c.num_attention_heads, c.qk_rope_head_dim)
        positions = np.linspace(0, c.max_position_embeddings - 1, self.batch * self.length).astype(np.int32)
        positions = positions.reshape(self.batch, self.length)

        def in_jax(params, x):
            return (jax_rope.apply_rope(x, *jax_rope.rope_angles(c, positions), c.rope_interleave),), ()

        def in_torch(x):
            return (torch_rope.apply_rope(x, *torch_rope.rope_angles(c, torch.from_numpy(positions)), c.rope_interleave),), ()

        return Case("rope", (x,), in_jax, in_torch, {}, lambda gradients: {})

    def feed_forward(self) -> Case:
        """The dense one or the shared experts."""
        c = self.config
        dense = expert_layers(c) < c.num_hidden_layers
        stack, path = ("dense_layers", ("mlp",)) if dense else ("moe_layers", ("mlp", "shared_experts"))
        width = c.intermediate_size if dense else c.n_shared_experts * c.moe_intermediate_size
        module = jax_layers.FeedForward(c, width)
        torch_mlp = self._torch_layer(stack).mlp
        torch_module = torch_mlp if dense else torch_mlp.shared_experts
        return self._case(
            "feed-forward", stack, path, (self._hidden(),),
            lambda v, x: ((module.apply(v, x),), ()), lambda x: ((torch_module(x),), ()),
        )  # fmt: skip

    def attention(self, stack: str) -> Case:
        """Multi-head latent attention without a cache; the latents are outputs, too."""
        module, torch_module = jax_attention.MultiHeadLatentAttention(self.config), self._torch_layer(stack).self_attn

        def in_jax(variables, x):
            out, latents = module.apply(variables, x, *self._jax_rope())
            return (out, *latents), ()

        def in_torch(x):
            out, latents = torch_module(x, *self._torch_rope())
            return (out, *latents), ()

        return self._case("attention", stack, ("self_attn",), (self._hidden(),), in_jax, in_torch)

    def router(self) -> Case:
        """Scores, selection, factors, counts and balance loss."""
        module, torch_module = jax_router.Router(self.config), self._torch_layer("moe_layers").mlp.gate

        def split(routing):
            return (routing.weights, routing.balance_loss, *_given(routing.dropped)), (routing.indices, routing.counts)

        return self._case(
            "router", "moe_layers", ("mlp", "gate"), (self._hidden(),),
            lambda v, x: split(module.apply(v, x)), lambda x: split(torch_module(x)),
        )  # fmt: skip

    def experts(self, name: str, indices: np.ndarray) -> Case:
        """The routed experts for choices [N, K] given from outside."""
        module, torch_module = jax_experts.Experts(self.config), self._torch_layer("moe_layers").mlp.experts
        x = self._normal(indices.shape[0], self.config.hidden_size)
        weights = self.rng.uniform(0.1, 1.0, indices.shape)
        return self._case(
            name, "moe_layers", ("mlp", "experts"), (x, weights),
            lambda v, x, weights: ((module.apply(v, x, indices.astype(np.int32), weights),), ()),
            lambda x, weights: ((torch_module(x, torch.from_numpy(indices), weights),), ()),
        )  # fmt: skip

    def random_choices(self) -> np.ndarray:
        """[N, K] experts, distinct within a token."""
        c = self.config
        tokens = self.batch * self.length
        return np.stack([self.rng.permutation(c.n_routed_experts)[: c.num_experts_per_tok] for _ in range(tokens)])

    def block(self, stack: str) -> Case:
        """One layer of the main model."""
        moe = stack == "moe_layers"
        module, torch_module = jax_block.Block(self.config, moe=moe), self._torch_layer(stack)

        def split(hidden, output):
            return ((hidden, output.balance_loss), (output.counts,)) if moe else ((hidden,), ())

        return self._case(
            "moe layer" if moe else "dense layer", stack, (), (self._hidden(),),
            lambda v, x: split(*module.apply(v, x, *self._jax_rope())),
            lambda x: split(*torch_module(x, *self._torch_rope())),
        )  # fmt: skip

    def mtp(self) -> Case:
        """An MTP module or head on a state and embeddings given from outside."""
        is_module = self.config.mtp_form == "sequential"
        module, torch_module = jax_mtp.MTP_FORMS[self.config.mtp_form](self.config), self._torch_layer("mtp_layers")

        def split(further, rest):
            normed, output = rest
            return ((further, normed, output.balance_loss), (output.counts,)) if is_module else ((normed,), ())

        return self._case(
            "mtp module", "mtp_layers", (), (self._hidden(), self._hidden()) if is_module else (self._hidden(),),
            lambda v, h, e=None: split(*module.apply(v, h, *self._jax_rope(), e)),
            lambda h, e=None: split(*torch_module(h, *self._torch_rope(), e)),
        )  # fmt: skip

    def whole_model(self) -> Case:
        """Tokens to the states of every depth, the head, the balance loss and the counts."""
        c, siblings = self.config, self.siblings
        shape = (self.batch, self.length + c.num_nextn_predict_layers)
        tokens = self.rng.integers(0, c.vocab_size, shape, dtype=np.int32)
        state = {name: tree for name, tree in siblings.variables.items() if name != "params"}

        def split(output):
            exact = tuple(v for _, v in sorted(output.counts.items()))
            return (output.hidden, output.head, output.balance_loss, *_given(output.dropped)), exact

        return Case(
            "whole model", (),
            lambda params: split(siblings.jax.apply({"params": params, **state}, tokens)),
            lambda: split(siblings.torch(torch.from_numpy(tokens))),
            siblings.variables["params"], lambda gradients: to_torch({"params": gradients}, c),
        )  # fmt: skip

    def _case(self, name, stack, path, inputs, in_jax, in_torch) -> Case:
        """A case of one module of one layer; `in_jax` takes variables, of which the parameters are differentiated."""
        layer = self._last(stack)
        variables = module_variables(self.siblings.variables, stack, layer, *path)
        state = {collection: tree for collection, tree in variables.items() if collection != "params"}
        return Case(
            name, inputs, lambda params, *xs: in_jax({"params": params, **state}, *xs), in_torch,
            variables["params"], lambda gradients: module_tensors(gradients, self.config, stack, layer, *path),
        )  # fmt: skip

    def _last(self, stack: str) -> int:
        return len(jax.tree.leaves(self.siblings.variables["params"][stack])[0]) - 1

    def _torch_layer(self, stack: str) -> torch.nn.Module:
        model = self.siblings.torch
        if stack == "dense_layers":
            return [layer for layer in model.main_layers if not layer.moe][self._last(stack)]
        return getattr(model, stack)[self._last(stack)]

    def _jax_rope(self) -> tuple:
        return jax_rope.rope_angles(self.config, self.positions), self.positions

    def _torch_rope(self) -> tuple:
        positions = torch.from_numpy(self.positions)
        return torch_rope.rope_angles(self.config, positions), positions

    def _hidden(self) -> np.ndarray:
        return self._normal(self.batch, self.length, self.config.hidden_size)

    def _normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

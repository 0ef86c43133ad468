"""The whole model: embedding, dense and mixture-of-experts layers, head, and MTP modules.

Layers of one kind are one scanned module whose parameters are stacked, so that compile time does not
grow with depth.
"""

import math
from functools import partial
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import Block, BlockOutput
from deepseek_jax.model.layers import Embedding, Linear, RMSNorm, compute_dtype, param_dtype
from deepseek_jax.model.mtp import MTPModule
from deepseek_jax.model.products import KEPT
from deepseek_jax.model.rope import rope_angles
from deepseek_jax.model.router import ROUTER_STATE
from deepseek_jax.parallel.pipeline import ABSENT, assign_layers, run_pipeline
from deepseek_jax.parallel.sharding import PIPELINED, Division
from deepseek_jax.parallel.weights import gather_layer


class ModelOutput(NamedTuple):
    """What the losses are made of."""

    hidden: jax.Array
    """Normed states for the output head by prediction depth, [1 + D, B, T, hidden_size]."""
    head: jax.Array
    """Weight of the output head, [hidden_size, vocab_size]."""
    counts: dict[str, jax.Array]
    """Tokens sent to each expert, [layers, E], for the stacks that have experts."""
    balance_loss: jax.Array
    """Sum over those layers, before its weight."""


class DeepseekV3(nn.Module):
    """DeepSeek-V3 (report 2).

    Attributes:
        division: the mesh, inside `shard_map` over it; the variables are then those of `parallel.weights.collect` and
            `gather_unstacked`, and tokens, counts and losses are this device's own.
    """

    config: ModelConfig
    division: Optional[Division] = None

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c)
        dense, moe = c.first_k_dense_replace, c.num_hidden_layers - c.first_k_dense_replace
        if dense:
            self.dense_layers = self._stacked("dense_layers", Block, dense)(c, moe=False, division=self.division)
        if moe and not self._is_pipelined():
            self.moe_layers = self._stacked("moe_layers", Block, moe)(c, moe=True, division=self.division)
        self.norm = RMSNorm(c, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c, c.hidden_size, c.vocab_size)
        if c.num_nextn_predict_layers:
            self.mtp_layers = self._stacked("mtp_layers", MTPModule, c.num_nextn_predict_layers)(c, self.division)

    def __call__(self, tokens: jax.Array) -> ModelOutput:
        """Predict at every depth.

        Args:
            tokens: [B, T + D] ids, D = num_nextn_predict_layers: depth k reads tokens k to T + k.
        """
        c = self.config
        depth = c.num_nextn_predict_layers
        length = tokens.shape[1] - depth
        embedded = self.embed_tokens(tokens)
        positions = jnp.broadcast_to(jnp.arange(length), (tokens.shape[0], length))
        rope = rope_angles(c, positions)
        hidden, outputs = self._layers(embedded[:, :length], rope, positions)
        normed = self.norm(hidden)
        states = normed[None]
        if depth:
            previous = normed if c.mtp_hidden_after_norm else hidden
            ahead = jnp.stack([embedded[:, k : k + length] for k in range(1, depth + 1)])
            _, (mtp_states, outputs["mtp_layers"]) = self.mtp_layers(previous, rope, positions, ahead)
            states = jnp.concatenate([states, mtp_states])
        return ModelOutput(states, self.head(), *_balance(outputs, param_dtype(c)))

    def hidden_states(self, tokens: jax.Array) -> jax.Array:
        """Normed states [B, T, hidden_size] of the main model for tokens [B, T]."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = self._layers(self.embed_tokens(tokens), rope_angles(self.config, positions), positions)
        return self.norm(hidden)

    def head(self) -> jax.Array:
        """Weight of the output head in the compute type, [hidden_size, vocab_size]."""
        weight = self.embed_tokens.weight.T if self.config.tie_word_embeddings else self.lm_head.weight
        return weight.astype(compute_dtype(self.config))

    def _layers(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], positions: jax.Array
    ) -> tuple[jax.Array, dict[str, BlockOutput]]:
        """Run every stack of the main model in turn."""
        outputs = {}
        for name in ("dense_layers", "moe_layers"):
            if hasattr(self, name):
                x, outputs[name] = getattr(self, name)(x, rope, positions, None)
        if self._is_pipelined():
            x, outputs[PIPELINED] = self._pipelined(x, rope, positions)
        return x, outputs

    def _is_pipelined(self) -> bool:
        return self.division is not None and self.division.parallel.pipe > 1

    def _pipelined(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], positions: jax.Array
    ) -> tuple[jax.Array, BlockOutput]:
        """The mixture-of-experts layers in pipeline stages, [B, T, hidden_size] -> the same.

        The output has this stage's layers and speaks of all sequences that came through it.
        """
        c, parallel = self.config, self.division.parallel
        rounds, size = x.shape[0] // parallel.microbatch_size, parallel.microbatch_size
        layers = assign_layers(c.num_hidden_layers - c.first_k_dense_replace, parallel)
        present = (jnp.asarray(layers) != ABSENT)[jax.lax.axis_index("pipe")]
        stack = self._stacked(PIPELINED, Block, layers.shape[-1])(c, moe=True, division=self.division, parent=None)
        # In the parameters' type, in which the ticks' gradients are summed.
        variables = {kind: jax.tree.map(lambda leaf: leaf.astype(param_dtype(c)).reshape(*layers.shape[1:], *leaf.shape[1:]),
                                        tree[PIPELINED])
                     for kind, tree in self.variables.items() if PIPELINED in tree}  # fmt: skip
        of_microbatch = jax.tree.map(lambda leaf: leaf[:size], (rope, positions))

        def chunk(number: jax.Array, state: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            own = jax.tree.map(lambda leaf: leaf[number], variables)
            state, output = stack.apply(own, state, *of_microbatch, None)
            return state, (output.counts, jnp.where(present[number], output.balance_loss, 0))

        inputs = x.reshape(rounds, size, *x.shape[1:])
        outputs, (counts, balance) = run_pipeline(chunk, inputs, parallel)
        own_layers = partial(jax.tree.map, lambda leaf: leaf.reshape(-1, *leaf.shape[2:]))
        # Each of the rounds brought one micro-batch of every stage's: that many shares of the mean over sequences.
        return outputs.reshape(x.shape), BlockOutput(None, *own_layers((counts, balance / rounds)))

    def _stacked(self, name: str, layer: type[nn.Module], length: int) -> type[nn.Module]:
        """`layer` scanned `length` times over the stacked parameters called `name`, recomputed in the backward pass if
        so configured.

        Rope and positions are the same for every layer; the remaining argument has an entry for each.
        """
        c, division = self.config, self.division
        per_layer = {"params": 0, ROUTER_STATE: 0}
        shared, own = nn.broadcast, 0
        in_axes = (shared, shared, own)
        if division is not None:

            def gathered(variables: dict[str, Any]) -> dict[str, Any]:
                return {"params": gather_layer(division, c, (name,), variables["params"], stacked=True)}

            layer = nn.map_variables(layer, "params", trans_in_fn=gathered)
        if c.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(KEPT) if c.remat == "products" else None
            layer = nn.remat(layer, prevent_cse=False, policy=policy)
        return nn.scan(layer, variable_axes=per_layer, split_rngs={"params": True}, in_axes=in_axes, out_axes=0, length=length)


def _balance(outputs: dict[str, BlockOutput], dtype: jnp.dtype) -> tuple[dict[str, jax.Array], jax.Array]:
    """Expert counts of the stacks that have experts, and the sum of their layers' balance losses."""
    routed = {name: output for name, output in outputs.items() if output.counts is not None}
    total = sum((jnp.sum(output.balance_loss) for output in routed.values()), jnp.zeros((), dtype))
    return {name: output.counts for name, output in routed.items()}, total


class ParameterCount(NamedTuple):
    """How many numbers a model learns."""

    total: int
    """Without MTP."""
    active: int
    """Those a token meets: all but the routed experts, and its share of these."""
    mtp: int
    """Of the MTP modules, which share embedding and head with the main model."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count from the shapes the module itself would allocate, without allocating them."""
    tokens = jax.ShapeDtypeStruct((1, 1 + config.num_nextn_predict_layers), jnp.int32)
    params = jax.eval_shape(DeepseekV3(config).init, jax.random.key(0), tokens)["params"]
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape)
             for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    main = {path: size for path, size in sizes.items() if not path.startswith("mtp_layers/")}
    routed = sum(size for path, size in main.items() if "/experts/" in path)
    total = sum(main.values())
    active = total - routed + routed * config.num_experts_per_tok // config.n_routed_experts
    return ParameterCount(total, active, sum(sizes.values()) - total)

"""The whole model: embedding, dense and mixture-of-experts layers, head, and MTP modules.

Layers of one kind are a loop over stacked parameters, so that compile time does not grow with depth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig, expert_layers, stretches
from deepseek_jax.model.attention import SCORES
from deepseek_jax.model.block import Block, BlockOutput
from deepseek_jax.model.layer_loop import begin_sums, end_sums, run_chunk, run_layers
from deepseek_jax.model.layers import Embedding, Linear, RMSNorm, compute_dtype, param_dtype
from deepseek_jax.model.mtp import MTP_FORMS
from deepseek_jax.model.products import policy
from deepseek_jax.model.rope import rope_angles
from deepseek_jax.model.router import ROUTER_STATE
from deepseek_jax.model.segments import segments
from deepseek_jax.parallel.context import joined, own_tokens, pieces
from deepseek_jax.parallel.pipeline import ABSENT, assign_layers, run_pipeline
from deepseek_jax.parallel.sharding import PIPELINED, Division
from deepseek_jax.parallel.weights import gather_layer, gradient_type


class ModelOutput(NamedTuple):
    """What the losses are made of."""

    hidden: jax.Array
    """Normed states for the output head by prediction depth, [1 + D, B, T, hidden_size]."""
    head: jax.Array
    """Weight of the output head, [hidden_size, vocab_size]."""
    counts: dict[str, jax.Array]
    """Tokens that chose each expert, [layers, E], for the stacks that have experts."""
    balance_loss: jax.Array
    """Sum over those layers, before its weight."""
    dropped: Optional[jax.Array]
    """Share of the choices that found no room, mean over those layers; None where there is always room."""
    largest_scores: dict[str, jax.Array]
    """Of each attention head, [layers, H] by stack, if `DeepseekV3.tells_scores`."""


class Shared(NamedTuple):
    """What is the same for all layers."""

    rope: tuple[jax.Array, jax.Array]
    """Cosine and sine of the positions."""
    positions: jax.Array
    """[B, T]."""
    segment_ids: Optional[jax.Array] = None
    """The document of each token, [B, T], where documents are kept apart."""


class DeepseekV3(nn.Module):
    """DeepSeek-V3 (report 2).

    Attributes:
        division: the mesh, inside `shard_map` over it; the variables are then those of `parallel.weights.collect` and
            `gather_unstacked`, and tokens, counts and losses are this device's own.
        tells_scores: whether the largest attention scores are to be told.
    """

    config: ModelConfig
    division: Optional[Division] = None
    tells_scores: bool = False

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c, self.division)
        moe = expert_layers(c)
        counts = {"dense_layers": c.num_hidden_layers - moe, "moe_layers": 0 if self._is_pipelined() else moe}
        counts["mtp_layers"] = c.num_nextn_predict_layers
        for name, count in counts.items():
            if count:
                setattr(self, name, self._initial(name, count))
        self.norm = RMSNorm(c, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c, c.hidden_size, c.vocab_size)

    def __call__(self, tokens: jax.Array, ends: Optional[jax.Array] = None) -> ModelOutput:
        """Predict at every depth.

        Args:
            tokens: [B, T + D] ids, D = num_nextn_predict_layers: depth k reads tokens k to T + k. Along the mesh's `context`
                all devices are given the same, and each predicts from its T / C of them.
            ends: booleans like `tokens`, whether a token is its document's last, to keep documents apart.
        """
        c = self.config
        depth = c.num_nextn_predict_layers
        length = tokens.shape[1] - depth
        own = pieces(self.division, tokens, length)
        embedded = self.embed_tokens(own.reshape(len(own), -1)).reshape(*own.shape, -1)
        shared = self._shared(tokens[:, :length], None if ends is None else ends[:, :length])
        hidden, outputs = self._layers(joined(embedded, depth), shared)
        normed = self.norm(hidden)
        states = normed[None]
        if depth:
            previous = normed if c.mtp_hidden_after_norm else hidden
            ahead = jnp.stack([joined(embedded, depth, ahead=k) for k in range(1, depth + 1)])
            _, (mtp_states, outputs["mtp_layers"]) = self._run("mtp_layers", previous, shared, ahead)
            states = jnp.concatenate([states, mtp_states])
        scores = {name: output.largest_scores for name, output in outputs.items() if output.largest_scores is not None}
        return ModelOutput(states, self.head(), *_routing(c, outputs), scores)

    def hidden_states(self, tokens: jax.Array, ends: Optional[jax.Array] = None) -> jax.Array:
        """Normed states [B, T / C, hidden_size] of the main model for this device's of tokens [B, T]."""
        own = own_tokens(self.division, tokens, tokens.shape[1])
        hidden, _ = self._layers(self.embed_tokens(own), self._shared(tokens, ends))
        return self.norm(hidden)

    def _shared(self, tokens: jax.Array, ends: Optional[jax.Array]) -> Shared:
        """What all layers need to know of the places of this device's of tokens [B, T]."""
        if ends is None:
            numbers, positions = None, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        else:
            numbers, positions = segments(ends)
            numbers = own_tokens(self.division, numbers, tokens.shape[1])
        return self._placed(own_tokens(self.division, positions, tokens.shape[1]), numbers)

    def _placed(self, positions: jax.Array, segment_ids: Optional[jax.Array] = None) -> Shared:
        return Shared(rope_angles(self.config, positions), positions, segment_ids)

    def head(self) -> jax.Array:
        """Weight of the output head in the compute type, [hidden_size, vocab_size]."""
        weight = self.embed_tokens.weight.T if self.config.tie_word_embeddings else self.lm_head.weight
        return weight.astype(compute_dtype(self.config))

    def _layers(self, x: jax.Array, shared: Shared) -> tuple[jax.Array, dict[str, BlockOutput]]:
        """Run the main model's layers in turn, a stack's at once where no other kind comes between."""
        found: dict[str, list[BlockOutput]] = {}
        runs = stretches(self.config)
        if self.is_initializing():  # every stack makes its variables whole
            runs = [(name, 0, end) for name, end in {name: end for name, _, end in runs}.items()]
        for name, first, end in runs:
            if name == PIPELINED and self._is_pipelined():
                x, output = self._pipelined(x, shared)
            else:
                x, output = self._run(name, x, shared, part=(first, end))
            found.setdefault(name, []).append(output)
        outputs = {
            name: of[0] if len(of) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *of)
            for name, of in found.items()
        }
        return x, outputs

    def _is_pipelined(self) -> bool:
        return self.division is not None and self.division.parallel.pipe > 1

    def _pipelined(self, x: jax.Array, shared: Shared) -> tuple[jax.Array, BlockOutput]:
        """The mixture-of-experts layers in pipeline stages, [B, T, hidden_size] -> the same.

        The output has this stage's layers and speaks of all sequences that came through it.
        """
        assert self.division is not None
        c, parallel = self.config, self.division.parallel
        rounds, size = x.shape[0] // parallel.microbatch_size, parallel.microbatch_size
        layers = assign_layers(expert_layers(c), parallel)
        present = (jnp.asarray(layers) != ABSENT)[jax.lax.axis_index("pipe")]
        params, biases = (
            jax.tree.map(
                lambda leaf: leaf.reshape(*layers.shape[1:], *leaf.shape[1:]), self.variables.get(kind, {}).get(PIPELINED, {})
            )
            for kind in ("params", ROUTER_STATE)
        )
        whole = jax.tree.map(lambda leaf: leaf[:size], shared)

        def chunk(
            number: jax.Array, state: jax.Array, documents: Optional[tuple[jax.Array, jax.Array]], sums: Any
        ) -> tuple[jax.Array, Any, tuple[Any, Any]]:
            own = jax.tree.map(lambda leaf: leaf[number], biases)
            layer = self._layer(PIPELINED, whole if documents is None else self._placed(*documents))
            state, sums, output = run_chunk(layer, self._again, params, sums, number, state, own, None)
            means = output.balance_loss, output.dropped
            means = jax.tree.map(lambda mean: jnp.where(present[number], mean, 0), means)
            return state, sums, ((output.counts, means), output.largest_scores)

        documents = None if shared.segment_ids is None else (shared.positions, shared.segment_ids)
        inputs, beside = jax.tree.map(lambda leaf: leaf.reshape(rounds, size, *leaf.shape[1:]), (x, documents))
        outputs, sums, (counts, means), largest = run_pipeline(
            chunk, inputs, beside, begin_sums(params, param_dtype(c)), parallel
        )
        outputs = end_sums(outputs, sums)
        own_layers = partial(jax.tree.map, lambda leaf: leaf.reshape(-1, *leaf.shape[2:]))
        # Each of the rounds brought one micro-batch of every stage's: that many shares of the mean over sequences.
        counts, means, largest = own_layers((counts, jax.tree.map(lambda mean: mean / rounds, means), largest))
        return outputs.reshape(x.shape), BlockOutput(None, counts, *means)._replace(largest_scores=largest)

    def _run(
        self, name: str, x: jax.Array, shared: Shared, each: Any = None, part: Optional[tuple[int, int]] = None
    ) -> tuple[jax.Array, Any]:
        """x through the layers called `name`; `each` has an entry for each of them, and `part` is first and end if not all."""
        if self.is_initializing():
            return getattr(self, name)(x, shared.rope, shared.positions, each)
        params, biases = (self.variables.get(kind, {}).get(name, {}) for kind in ("params", ROUTER_STATE))
        if part is not None and part != (0, len(jax.tree.leaves(params)[0])):
            params, biases = jax.tree.map(lambda leaf: leaf[slice(*part)], (params, biases))
        return self._run_layers(name, shared, params, x, biases, each)

    def _run_layers(self, name: str, shared: Shared, params: Any, x: jax.Array, *each: Any) -> tuple[jax.Array, Any]:
        """x through layers with these parameters, of those called `name`."""

        def narrowed(path: tuple, leaf: jax.Array) -> jnp.dtype:
            return gradient_type(self.division, self.config, (name, *(key.key for key in path)), leaf.dtype)

        types = jax.tree_util.tree_map_with_path(narrowed, params)
        return run_layers(self._again(self._layer(name, shared)), params, types, x, *each)

    def _layer(self, name: str, shared: Shared) -> Callable[..., Any]:
        """One of the layers called `name`."""
        c, division = self.config, self.division
        kind, fields = self._kind(name)
        module = kind(**fields, parent=None)

        def layer(params: Any, x: jax.Array, biases: Any, each: Any) -> tuple[jax.Array, Any]:
            if division is not None:
                params = gather_layer(division, c, (name,), params, stacked=True)
            with jax.named_scope(name):
                (x, output), told = module.apply(
                    {"params": params, ROUTER_STATE: biases}, x, shared.rope, shared.positions, each, shared.segment_ids,
                    mutable=[SCORES] if self.tells_scores else [],
                )  # fmt: skip
                return x, _with_scores(output, told)

        return layer

    def _again(self, layer: Callable) -> Callable:
        """The layer, made again in the backward pass if so configured."""
        remat = self.config.remat
        return layer if remat == "none" else jax.checkpoint(layer, prevent_cse=False, policy=policy(remat))

    def _initial(self, name: str, count: int) -> nn.Module:
        """Makes the variables of so many layers called `name`, with a leading axis for the layers."""
        kind, fields = self._kind(name)
        scanned = nn.scan(
            kind, variable_axes={"params": 0, ROUTER_STATE: 0}, split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0), length=count,
        )  # fmt: skip
        return scanned(**fields)

    def _kind(self, name: str) -> tuple[type[nn.Module], dict[str, Any]]:
        """Of the layers called `name`: the module, and its fields."""
        fields = dict(config=self.config, division=self.division)
        if name == "mtp_layers":
            return MTP_FORMS[self.config.mtp_form], fields
        return Block, fields | {"moe": name == "moe_layers"}


def _with_scores(output: Any, told: Any) -> Any:
    """A layer's output with what its attention told of its scores, if it has one and was asked."""
    largest = next(iter(jax.tree.leaves(told)), None)
    if isinstance(output, BlockOutput):
        return output._replace(largest_scores=largest)
    state, of_block = output
    return state, of_block._replace(largest_scores=largest)


def _routing(
    config: ModelConfig, outputs: dict[str, BlockOutput]
) -> tuple[dict[str, jax.Array], jax.Array, Optional[jax.Array]]:
    """Of the stacks that have experts: their counts, the sum of their layers' balance losses, and the share dropped."""
    zero = jnp.zeros((), param_dtype(config))
    counts = {name: output.counts for name, output in outputs.items() if output.counts is not None}
    losses = [jnp.sum(output.balance_loss) for output in outputs.values() if output.balance_loss is not None]
    shares = [jnp.sum(output.dropped) for output in outputs.values() if output.dropped is not None]
    return counts, sum(losses, zero), sum(shares, zero) / _expert_layers(config) if shares else None


def _expert_layers(config: ModelConfig) -> int:
    """Layers with experts, in the main model and in MTP modules."""
    in_mtp = config.num_nextn_predict_layers if config.mtp_form == "sequential" else 0
    return expert_layers(config) + in_mtp

"""A model ready to write: several sequences at once, token by token or by drafts that are checked.

The prompts are read in one pass; then each step computes one token per sequence over a cache of
latents, kv_lora_rank + qk_rope_head_dim numbers per token and layer.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.compilation import compiler_options
from deepseek_jax.config import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.generation import speculative
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.sampling import (
    SAMPLE,
    Form,
    Sampling,
    Settings,
    keys_at,
    log_probability,
    sample_token,
    sequence_keys,
)  # fmt: skip
from deepseek_jax.generation.speculative import Drafted, Written
from deepseek_jax.model.decoding import PART, Cache, decode, prefill, spread
from deepseek_jax.model.decoding_weights import Weights, prepare
from deepseek_jax.parallel.sharding import Division

CACHE_BLOCK = 1024
"""Positions for which a cache has room beyond the prompts. When they are written it grows by as many, or by half if that is
more, so that few lengths are compiled: it holds at most half more, or a block more, than there is to hold."""
LENGTH_MULTIPLE = 32
"""Prompts and caches are padded to a multiple of this, so that few lengths are compiled."""


class Generator:
    """A model ready to write; what it compiles for one prompt length serves the next call too.

    Attributes:
        drafted, accepted: tokens that MTP modules have drafted so far, and those of them that the main model took.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, Any],
        sequences: int = 1,
        speculative: bool = False,
        length_multiple: int = LENGTH_MULTIPLE,
        division: Optional[Division] = None,
    ):
        """Arrange the weights.

        Args:
            variables: of a `DeepseekV3`; on a mesh as `checkpoint.on_mesh` loads them.
            sequences: prompts to be continued at once; more or fewer are right too, but slower.
            speculative: whether the MTP modules draft and the main model checks.
            length_multiple: see LENGTH_MULTIPLE; larger for prompts of many lengths.
            division: the mesh whose devices share sequences, caches and experts; null is one device.

        Raises:
            UserError: when there is no module that could draft.
        """
        self._depth = config.num_nextn_predict_layers if speculative else 0
        if speculative and not self._depth:
            raise UserError("--speculative: this model has no MTP modules (num_nextn_predict_layers is 0) that could draft")
        self._config, self._sequences, self._multiple = config, sequences, length_multiple
        self._unit = 1 if division is None else division.mesh.size
        self._weights = prepare(config, variables, sequences * (self._depth + 1), speculative, division)
        begin, go_on = (_begin_drafts, _check_drafts) if speculative else (_first, _following)
        self._first = jax.jit(
            spread(partial(begin, config), self._weights), static_argnames=("form", "cache_length"),
            compiler_options=compiler_options(jax.local_devices()[0]),
        )  # fmt: skip
        self._following = jax.jit(
            spread(partial(go_on, config), self._weights), static_argnames="form", donate_argnums=2
        )  # fmt: skip
        self._grow = jax.jit(_grown, static_argnums=1)
        self.drafted = self.accepted = 0

    def run(
        self,
        continuations: Sequence[Continuation],
        sampling: Sampling = Sampling(),  # noqa: B008 (it never changes)
        seed: int = 0,
        numbers: Optional[Sequence[int]] = None,
    ) -> Iterator[None]:
        """Continue several prompts at once, until all have come to an end; yields after each step.

        Args:
            continuations: their prompts' lengths may differ. A prompt's tokens and its own limit together reach at most one
                token beyond the context, which nothing reads any more; a limit beyond that is lowered to it.
            numbers: of the sequences, for their randomness; by default from 0.

        Raises:
            UserError: when a prompt does not fit the context.
        """
        context = self._config.max_position_embeddings
        for continuation in continuations:
            if len(continuation.prompt) > context:
                raise UserError(f"the prompt has {len(continuation.prompt)} tokens; "
                                f"the context (max_position_embeddings) is {context}")  # fmt: skip
            continuation.limit = min(continuation.limit, context + 1 - len(continuation.prompt))
        # Rows too few are filled up with the first: its program may be there already.
        count = -(-max(self._sequences, len(continuations)) // self._unit) * self._unit
        rows = [*continuations, *[continuations[0]] * (count - len(continuations))]
        lengths = np.array([len(row.prompt) for row in rows], np.int32)
        longest = int(lengths.max())
        tokens = np.zeros((len(rows), self._rounded_up(longest) if longest <= PART else -(-longest // PART) * PART), np.int32)
        for row, continuation in zip(tokens, rows):
            row[: len(continuation.prompt)] = continuation.prompt
        numbers = [*(range(len(continuations)) if numbers is None else numbers)]
        keys = sequence_keys(seed, np.array([*numbers, *[numbers[0]] * (len(rows) - len(numbers))], np.uint32))
        form, settings = sampling.form(), sampling.settings(self._config.vocab_size)
        most = self._rounded_up(max(len(row.prompt) + row.limit for row in rows) + self._depth)
        cache_length = min(self._rounded_up(longest + CACHE_BLOCK), most)
        seen = _seen(rows, self._config.vocab_size) if form.penalizes else None

        written, state = self._first(
            self._weights, settings, tokens, lengths, seen, keys, form=form, cache_length=cache_length
        )
        self._take(continuations, written, 0)
        yield
        while going := [continuation for continuation in continuations if not continuation.finish]:
            needed = max(len(row.prompt) + len(row.tokens) for row in going) + self._depth
            if needed > cache_length:
                cache_length = min(self._rounded_up(cache_length + max(CACHE_BLOCK, cache_length // 2)), most)
                state = self._grow(state, cache_length)
            written, state = self._following(self._weights, settings, state, keys, form=form)
            self._take(continuations, written, self._depth)
            yield

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_of_document: int | None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """Continue several prompts at once, token by token.

        Args:
            prompts: token ids, at least one each; their lengths may differ.
            end_of_document: ends a sequence; None never does.
            temperature: 0 takes the likeliest token.

        Yields:
            The next token of every sequence, [B]; `end_of_document` for those that have ended. Stops
            when all have, after max_new_tokens, or when the longest reaches the end of the model's context.

        Raises:
            UserError: when a prompt does not fit the context.
        """
        ends = () if end_of_document is None else (end_of_document,)
        limit = min(max_new_tokens, self._config.max_position_embeddings + 1 - max(map(len, prompts)))
        rows = [Continuation(prompt, limit, ends) for prompt in prompts]
        for step, _ in enumerate(self.run(rows, Sampling(temperature=temperature, top_p=top_p), seed)):
            yield np.array([row.tokens[step] if step < len(row.tokens) else end_of_document for row in rows])

    def _take(self, continuations: Sequence[Continuation], written: Written, drafts: int) -> None:
        """Hand each sequence what was written of it."""
        tokens, counts, told = jax.device_get(written)
        for row, continuation in enumerate(continuations):
            if continuation.finish:
                continue
            count = int(counts[row])
            self.drafted, self.accepted = self.drafted + drafts, self.accepted + (count - 1 if drafts else 0)
            for place in range(count):
                continuation.take(int(tokens[row, place]), None if told is None else float(told[row, place]))

    def _rounded_up(self, length: int) -> int:
        return int(-(-length // self._multiple) * self._multiple)


class _State(NamedTuple):
    """Between two steps of writing token by token."""

    cache: Cache
    token: jax.Array
    """[B], which the model has not read yet."""
    positions: jax.Array
    """[B], the token's."""
    seen: Optional[jax.Array]


def _grown(state: Any, cache_length: int) -> Any:
    """The state between two steps, with room for so many positions in each cache."""
    more = cache_length - state.cache[0].c_kv.shape[1]
    longer = {name: jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2))), getattr(state, name))
              for name in ("cache", "mtp", "tokens") if hasattr(state, name)}  # fmt: skip
    return state._replace(**longer)


def _seen(rows: Sequence[Continuation], vocab_size: int) -> np.ndarray:
    seen = np.zeros((len(rows), vocab_size), bool)
    for row, continuation in zip(seen, rows):
        row[continuation.prompt] = True
    return seen


def _first(
    config: ModelConfig, weights: Weights, settings: Settings, tokens: jax.Array, lengths: jax.Array,
    seen: Optional[jax.Array], keys: jax.Array, *, form: Form, cache_length: int,
) -> tuple[Written, _State]:  # fmt: skip
    """Read the prompts [B, P] and choose the first new token of each."""
    logits, cache = prefill(config, weights, tokens, lengths, cache_length)
    return _chosen(logits, cache, lengths, seen, settings, keys, form)


def _following(
    config: ModelConfig, weights: Weights, settings: Settings, state: _State, keys: jax.Array, *, form: Form
) -> tuple[Written, _State]:
    """Take in the tokens and choose the ones after them."""
    logits, cache = decode(config, weights, state.cache, state.token, state.positions)
    return _chosen(logits, cache, state.positions + 1, state.seen, settings, keys, form)


def _chosen(
    logits: jax.Array, cache: Cache, positions: jax.Array, seen: Optional[jax.Array], settings: Settings, keys: jax.Array,
    form: Form,
) -> tuple[Written, _State]:  # fmt: skip
    """The tokens for `positions` [B] by logits [B, V]."""
    token = sample_token(logits, seen, form, settings, keys_at(keys, positions, SAMPLE))
    told = log_probability(logits, token)[:, None] if form.tells else None
    seen = None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)
    return Written(token[:, None], jnp.ones_like(token), told), _State(cache, token, positions, seen)


def _begin_drafts(
    config: ModelConfig, weights: Weights, settings: Settings, tokens: jax.Array, lengths: jax.Array,
    seen: Optional[jax.Array], keys: jax.Array, *, form: Form, cache_length: int,
) -> tuple[Written, Drafted]:  # fmt: skip
    return speculative.begin(config, form, weights, tokens, lengths, seen, settings, keys, cache_length)


def _check_drafts(
    config: ModelConfig, weights: Weights, settings: Settings, state: Drafted, keys: jax.Array, *, form: Form
) -> tuple[Written, Drafted]:
    return speculative.check(config, form, weights, state, settings, keys)

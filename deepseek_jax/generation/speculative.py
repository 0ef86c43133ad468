"""Speculative decoding: the MTP modules draft tokens, and the main model checks all of them in one pass (report 5.4.3).

What is written has exactly the main model's distribution: a draft d is taken with probability min(1, p(d) / q(d)), and where
it is not, the token comes from what p has more than q. Greedily, drafts are taken as long as they are the main
model's own choice.

Positions: n is that of the newest token, which no module has read yet; K modules draft those at n + 1 to n + K.
Module k at position i reads the token at i + k. What the deeper ones made of the last K positions hung on drafts, so that
they go over those again, with the tokens that were written.
"""

from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.generation.sampling import (
    ACCEPT,
    DRAFT,
    SAMPLE,
    Form,
    Settings,
    choices,
    draw,
    keys_at,
    log_probability,
    penalized,
    sample_token,
)  # fmt: skip
from deepseek_jax.model.attention import Latents
from deepseek_jax.model.decoding import (
    Cache,
    final_norm,
    head_of,
    logits_of,
    read,
    read_mtp,
    run,
    run_mtp,
)  # fmt: skip
from deepseek_jax.model.decoding_weights import Weights


class Drafted(NamedTuple):
    """What a round begins with; the sequences are on their own, [B]."""

    cache: Cache
    mtp: list[Optional[Latents]]
    """The modules' caches."""
    tokens: jax.Array
    """[B, S] by position, the drafts included."""
    newest: jax.Array
    """[B] position n."""
    states: jax.Array
    """[B, K - 1, d] that the modules read at the positions before n."""
    drafts: jax.Array
    """[B, K, V] probabilities that the drafts were drawn by; without any where they are the likeliest."""
    seen: Optional[jax.Array]
    """[B, V] tokens up to n."""


class Written(NamedTuple):
    """What a round writes."""

    tokens: jax.Array
    """[B, K + 1], of which the first `number` are written: the drafts that were taken and one more."""
    number: jax.Array
    """[B] from 1."""
    log_probabilities: Optional[jax.Array]
    """Of the tokens."""


def begin(
    config: ModelConfig, form: Form, weights: Weights, tokens: jax.Array, lengths: jax.Array, seen: Optional[jax.Array],
    settings: Settings, keys: jax.Array, cache_length: int,
) -> tuple[Written, Drafted]:  # fmt: skip
    """Read prompts [B, P] of lengths [B], write the token after each, and draft."""
    depth, rows = config.num_nextn_predict_layers, jnp.arange(len(tokens))
    hidden, cache = read(config, weights, tokens, cache_length)
    logits = logits_of(config, weights, _at(hidden, lengths[:, None] - 1))[:, 0]
    token = sample_token(logits, seen, form, settings, keys_at(keys, lengths, SAMPLE))
    told = log_probability(logits, token)[:, None] if form.tells else None
    written = Written(token[:, None], jnp.ones_like(lengths), told)
    known = jnp.pad(tokens, ((0, 0), (0, max(cache_length + depth - tokens.shape[1], 0)))).at[rows, lengths].set(token)

    inputs = _mtp_inputs(config, weights, hidden)
    positions, state, mtp = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), inputs, []
    for k in range(depth):
        state, latents = read_mtp(config, weights, k, state, _at(known, positions + k + 1), cache_length)
        mtp.append(latents)
    states = _at(inputs, lengths[:, None] - depth + jnp.arange(2 * depth))
    seen = None if seen is None else seen.at[rows, token].set(True)
    drafted = Drafted(cache, mtp, known, lengths, states, jnp.zeros((len(tokens), 0)), seen)
    return written, _draft(config, form, weights, drafted, jnp.zeros_like(lengths), settings, keys)


def check(
    config: ModelConfig, form: Form, weights: Weights, drafted: Drafted, settings: Settings, keys: jax.Array
) -> tuple[Written, Drafted]:
    """Let the main model check the drafts, write what comes of it, and draft again."""
    depth, rows = config.num_nextn_predict_layers, jnp.arange(len(keys))
    positions = drafted.newest[:, None] + jnp.arange(depth + 1)
    tokens = _at(drafted.tokens, positions)
    hidden, cache = run(config, weights, tokens, positions, drafted.cache)
    logits = logits_of(config, weights, hidden)
    accepted, last, seen = _accept(form, logits, tokens[:, 1:], drafted, settings, keys)

    newest = drafted.newest + accepted + 1
    written = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))).at[rows, accepted].set(last)
    told = log_probability(logits, written) if form.tells else None
    states = jnp.concatenate([drafted.states, _mtp_inputs(config, weights, hidden)], axis=1)
    known = drafted.tokens.at[rows, newest].set(last)
    drafted = Drafted(cache, drafted.mtp, known, newest, states, drafted.drafts, seen)
    drafted = _draft(config, form, weights, drafted, accepted, settings, keys)
    return Written(written, accepted + 1, told), drafted


def _accept(
    form: Form, logits: jax.Array, drafts: jax.Array, drafted: Drafted, settings: Settings, keys: jax.Array
) -> tuple[jax.Array, jax.Array, Optional[jax.Array]]:
    """How many of the drafts [B, K] are taken, the token after them, both [B], and the tokens seen then.

    Args:
        logits: [B, K + 1, V] of the main model, before each draft and after the last.
    """
    rows, seen = jnp.arange(len(keys)), drafted.seen
    going, accepted = jnp.ones(len(keys), bool), jnp.zeros(len(keys), jnp.int32)
    last = jnp.zeros(len(keys), jnp.int32)
    for j in range(logits.shape[1]):
        is_draft, position = j < drafts.shape[1], drafted.newest + j + 1
        taken, key = jnp.zeros_like(going), keys_at(keys, position, SAMPLE)
        if form.greedy:
            token = jnp.argmax(penalized(logits[:, j], seen, form, settings), axis=-1).astype(jnp.int32)
            if is_draft:
                taken = token == drafts[:, j]
        else:
            wanted = choices(logits[:, j], seen, form, settings)
            if is_draft:
                wanted, taken = _taken(wanted, drafted.drafts[:, j], drafts[:, j], keys_at(keys, position, ACCEPT))
            token = draw(wanted, key)
        taken &= going
        last = jnp.where(going & ~taken, token, last)
        if seen is not None:
            new = jnp.where(taken, drafts[:, j], token) if is_draft else token
            seen = seen.at[rows, jnp.where(going, new, seen.shape[1])].set(True)
        accepted, going = accepted + taken, taken
    return accepted, last, seen


def _taken(choices: jax.Array, q: jax.Array, draft: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [B, V] of what p has more than q, where p is the softmax of `choices`; and whether the draft [B] is taken."""
    p = jax.nn.softmax(choices, axis=-1)
    rows, chance = jnp.arange(len(draft)), jax.vmap(jax.random.uniform)(keys)
    more = jnp.maximum(p - q, 0)
    # Where rounding leaves p nothing more, the two are equal, and the draft is as good as taken.
    more = jnp.where(jnp.any(more > 0, axis=-1, keepdims=True), more, p)
    return jnp.log(more), chance * q[rows, draft] < p[rows, draft]


def _draft(
    config: ModelConfig, form: Form, weights: Weights, drafted: Drafted, accepted: jax.Array, settings: Settings,
    keys: jax.Array,
) -> Drafted:  # fmt: skip
    """Draft the K tokens after the newest.

    Args:
        drafted: with `states` [B, 2 K, d], of which number K - 1 + accepted is that before the newest.
    """
    depth, rows = config.num_nextn_predict_layers, jnp.arange(len(keys))
    before = depth - 1 + accepted
    positions = (drafted.newest - 1 - before)[:, None] + jnp.arange(2 * depth)
    # Before a text's beginning there is nothing to write; beyond the cache nothing is written.
    written_at = jnp.where(positions < 0, drafted.tokens.shape[1], positions)
    state, tokens, seen, caches, probabilities = drafted.states, drafted.tokens, drafted.seen, [], []
    for k in range(depth):
        ahead = _at(tokens, positions + k + 1)
        state, normed, cache = run_mtp(config, weights, k, state, ahead, written_at, drafted.mtp[k])
        logits = head_of(config, weights, _at(normed, before[:, None]))[:, 0]
        position = drafted.newest + k + 1
        token = sample_token(logits, seen, form, settings, keys_at(keys, position, DRAFT))
        if not form.greedy:
            probabilities.append(jax.nn.softmax(choices(logits, seen, form, settings), axis=-1))
        seen = None if seen is None else seen.at[rows, token].set(True)
        tokens = tokens.at[rows, position].set(token)
        caches.append(cache)
    states = _at(drafted.states, accepted[:, None] + 1 + jnp.arange(depth - 1))
    drafts = jnp.stack(probabilities, axis=1) if probabilities else jnp.zeros((len(keys), 0))
    return drafted._replace(mtp=caches, tokens=tokens, states=states, drafts=drafts)


def _mtp_inputs(config: ModelConfig, weights: Weights, hidden: jax.Array) -> jax.Array:
    """What the first module reads of the main model, [B, T, d] -> the same."""
    return final_norm(config, weights, hidden) if config.mtp_hidden_after_norm else hidden


def _at(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B, S, ...] at positions [B, T], or at the nearest that there is: [B, T, ...]."""
    return x[jnp.arange(len(x))[:, None], jnp.clip(positions, 0, x.shape[1] - 1)]

"""How the next token is chosen of the model's logits."""

from dataclasses import dataclass
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.model.layers import widen

SAMPLE, ACCEPT, DRAFT = range(3)
"""What randomness is drawn for at a position of a sequence; each has a key of its own."""


@dataclass(frozen=True)
class Sampling:
    """What a user asks for; by default the likeliest token."""

    temperature: float = 0.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this share (of what top_k left)."""
    min_p: float = 0.0
    """Sample among tokens at least so likely as this multiple of the likeliest."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that are there already, prompt included, are divided by it, negative ones multiplied."""
    log_probabilities: bool = False
    """Whether to tell each token's, of the model as it is: before temperature and all else."""

    def __post_init__(self):
        for name, is_right, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0; 0 is no limit"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is none"),
        ):
            if not is_right:
                raise UserError(f"{name}={getattr(self, name)}: must be {rule}")

    def form(self) -> "Form":
        """What of it is compiled."""
        filters = bool(self.top_k) or self.top_p < 1 or self.min_p > 0
        greedy = self.temperature == 0
        return Form(greedy, filters and not greedy, self.repetition_penalty != 1, self.log_probabilities)

    def settings(self, vocab_size: int) -> "Settings":
        """The numbers that a compiled program takes."""
        top_k = min(self.top_k or vocab_size, vocab_size)
        numbers = self.temperature, self.top_p, self.min_p, self.repetition_penalty
        return Settings(jnp.int32(top_k), *(jnp.float32(number) for number in numbers))


class Form(NamedTuple):
    """Which parts of a choice are compiled."""

    greedy: bool
    filters: bool
    penalizes: bool
    tells: bool


class Settings(NamedTuple):
    """Numbers of a choice, arrays of no dimension."""

    top_k: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def sequence_keys(seed: int, numbers: np.ndarray) -> jax.Array:
    """A random key for each sequence, by its number: what is written hangs neither on its batch nor on its neighbours."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(numbers))


def keys_at(keys: jax.Array, positions: jax.Array, purpose: int) -> jax.Array:
    """For sequences [B] at positions [B]: a key that is used once."""
    return jax.vmap(lambda key, position: jax.random.fold_in(jax.random.fold_in(key, position), purpose))(keys, positions)


def penalized(logits: jax.Array, seen: Optional[jax.Array], form: Form, settings: Settings) -> jax.Array:
    """Logits [B, V] where tokens that were seen, [B, V], are less likely."""
    if seen is None or not form.penalizes:
        return logits
    penalty = settings.repetition_penalty.astype(logits.dtype)
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def choices(logits: jax.Array, seen: Optional[jax.Array], form: Form, settings: Settings) -> jax.Array:
    """Logits [B, V] of what is to be sampled: at least float32, and minus infinity where a token is out."""
    logits = penalized(logits, seen, form, settings)
    logits = logits.astype(widen(logits.dtype)) / settings.temperature.astype(widen(logits.dtype))
    if not form.filters:
        return logits
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    among = jnp.arange(logits.shape[-1]) < settings.top_k
    probabilities = jax.nn.softmax(jnp.where(among, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    among &= (before < settings.top_p) | (settings.top_p >= 1)
    least = jnp.min(jnp.where(among, ordered, jnp.inf), axis=-1, keepdims=True)
    least = jnp.maximum(least, ordered[:, :1] + jnp.log(settings.min_p))
    return jnp.where(logits >= least, logits, -jnp.inf)


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """A token [B] of each row of logits [B, V], by a key of its own."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def sample_token(logits: jax.Array, seen: Optional[jax.Array], form: Form, settings: Settings, keys: jax.Array) -> jax.Array:
    """Choose a token per row.

    Args:
        logits: [B, V].
        seen: [B, V] tokens that are there already; read only for a repetition penalty.
        keys: [B].
    """
    if form.greedy:
        return jnp.argmax(penalized(logits, seen, form, settings), axis=-1).astype(jnp.int32)
    return draw(choices(logits, seen, form, settings), keys)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of tokens [...] by logits [..., V]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]

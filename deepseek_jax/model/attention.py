"""Multi-head latent attention (report 2.1.1).

Keys and values are expanded from a latent vector per token, so a cache needs to hold only that
latent and one shared rotary key: kv_lora_rank + qk_rope_head_dim numbers per token and layer. With
a cache, the expansion is absorbed into the query and the output, and keys and values never exist.
"""

from functools import partial
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.causal_attention import causal_attention, causal_attention_and_scores, resolved
from deepseek_jax.model.context_attention import context_attention, largest_scores_over_context
from deepseek_jax.model.layers import Linear, RMSNorm, widen
from deepseek_jax.model.prefix_attention import prefix_attention
from deepseek_jax.model.products import AGAIN, WAYPOINT, keep, products
from deepseek_jax.model.rope import apply_rope, softmax_scale, turn_ends
from deepseek_jax.parallel.context import devices_of_a_sequence
from deepseek_jax.parallel.sharding import Division

LATENT_NORM_EPS = 1e-6

ABSORBED = "absorbed"
"""Collection of what decoding may prepare once: each layer's `AbsorbedWeights`."""


SCORES = "intermediates"
"""Collection, by flax' own name for such, into which attention tells each head's largest score if `apply` makes it mutable."""


class AbsorbedWeights(NamedTuple):
    """The weight of kv_b_proj taken apart by head and purpose, each part in the order in which decoding reads it."""

    w_uk: jax.Array
    """From latents to keys, [H, kv_lora_rank, qk_nope_head_dim]."""
    w_uv: jax.Array
    """From latents to values, [H, v_head_dim, kv_lora_rank]."""


def absorbed_weights(config: ModelConfig, weight: jax.Array) -> AbsorbedWeights:
    """Take kv_b_proj's weight, [kv_lora_rank, H * (nope + v)], apart."""
    by_head = weight.reshape(config.kv_lora_rank, config.num_attention_heads, -1)
    w_uk, w_uv = jnp.split(by_head, [config.qk_nope_head_dim], axis=-1)
    return AbsorbedWeights(w_uk.transpose(1, 0, 2), w_uv.transpose(1, 2, 0))


class Latents(NamedTuple):
    """What attention remembers of each token; also the cache, whose rows are positions."""

    c_kv: jax.Array
    """Normalised latent, [B, S, kv_lora_rank]."""
    k_rope: jax.Array
    """Rotated key shared by all heads, [B, S, qk_rope_head_dim]."""


class Prefix(NamedTuple):
    """A cache into which a text is read, so many tokens at a time."""

    cache: Latents
    start: jax.Array
    """Positions that are there: a multiple of that number."""


class MultiHeadLatentAttention(nn.Module):
    """Causal attention over the tokens given, or over a cache and the tokens given.

    Attributes:
        division: the mesh, inside `shard_map` over it; its axis `context` may divide the tokens given.
    """

    config: ModelConfig
    division: Optional[Division] = None

    def setup(self):
        c = self.config
        heads = c.num_attention_heads
        q_width = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank is None:
            self.q_proj = Linear(c, c.hidden_size, q_width)
        else:
            self.q_a_proj = Linear(c, c.hidden_size, c.q_lora_rank, c.attention_bias)
            self.q_a_layernorm = RMSNorm(c, LATENT_NORM_EPS)
            self.q_b_proj = Linear(c, c.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(c, c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, c.attention_bias)
        self.kv_a_layernorm = RMSNorm(c, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(c, c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(c, heads * c.v_head_dim, c.hidden_size, c.attention_bias)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        cache: Optional[Latents | Prefix] = None,
        segment_ids: Optional[jax.Array] = None,
    ) -> tuple[jax.Array, Latents]:
        """Attend.

        Args:
            x: [B, T, hidden_size].
            rope: cosine and sine of the positions, from `rope_angles`.
            positions: [B, T]; read only with a cache, whose rows they name.
            cache: latents of all positions, [B, S, ...]; rows beyond a token's own are not read. For many tokens, that begin
                where it ends, a `Prefix`.
            segment_ids: [B, T], as for `causal_attention`; without a cache.

        Returns:
            Output [B, T, hidden_size]; and the latents of these tokens, or the cache with them in it.
        """
        q, latents = self._project(x, rope)
        if cache is None:
            out = self._expanded(q, latents, rope, segment_ids)
        else:
            q = turned_queries(self.config, q, rope)
            rows, known = jnp.arange(x.shape[0])[:, None], cache.cache if isinstance(cache, Prefix) else cache
            new, latents = latents, Latents(*(old.at[rows, positions].set(own) for old, own in zip(known, latents)))
            if isinstance(cache, Prefix):
                expand = partial(keys_and_values, self.config, self.kv_b_proj.weight)
                out = prefix_attention(expand, softmax_scale(self.config), q, new, cache.cache, cache.start)
            else:
                out = self._absorbed(q, latents, positions)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), latents

    def _project(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Latents]:
        """Queries [B, T, H * (nope + rope)], not turned to their positions yet, and the tokens' latents."""
        c = self.config
        first = self.q_proj if c.q_lora_rank is None else self.q_a_proj
        q, kv = products(c, x, first.weight, self.kv_a_proj_with_mqa.weight)
        q, kv = first.completed(x, q), keep(self.kv_a_proj_with_mqa.completed(x, kv), WAYPOINT)
        if c.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(keep(q, WAYPOINT)))
        c_kv, k_rope = jnp.split(kv, [c.kv_lora_rank], axis=-1)
        k_rope = apply_rope(k_rope[:, :, None], *rope, c.rope_interleave)[:, :, 0]
        latents = Latents(self.kv_a_layernorm(c_kv), k_rope)
        return q, latents

    def _expanded(
        self, q: jax.Array, latents: Latents, rope: tuple[jax.Array, jax.Array], segment_ids: Optional[jax.Array]
    ) -> jax.Array:
        """Attention with keys and values made for every head: the fewest operations for many queries."""
        c = self.config
        if devices_of_a_sequence(self.division) > 1:
            weight = self.kv_b_proj.whole_weight()
            if self.is_mutable_collection(SCORES):
                operands = turned_queries(c, q, rope), (latents.c_kv, latents.k_rope), weight, segment_ids
                largest = largest_scores_over_context(partial(keys_and_values, c), softmax_scale(c), *operands)
                self.sow(SCORES, "largest_scores", largest)
            return attention_over_context(c, q, (latents.c_kv, latents.k_rope), rope, weight, segment_ids)
        expanded = self.kv_b_proj(latents.c_kv)
        if not self.is_mutable_collection(SCORES):
            return latent_attention(c, q, expanded, latents.k_rope, rope, segment_ids)
        k, v = split_heads(c, expanded, latents.k_rope)
        q = turned_queries(c, q, rope)
        out, largest = causal_attention_and_scores(q, k, v, softmax_scale(c), segment_ids, implementation=c.attention)
        self.sow(SCORES, "largest_scores", largest)
        return out

    def _absorbed(self, q: jax.Array, cache: Latents, positions: jax.Array) -> jax.Array:
        """Attention in the latent space: W_uk goes into the query, W_uv into the output."""
        c = self.config
        q_nope, q_rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        prepared = self.get_variable(ABSORBED, "weights") or absorbed_weights(c, self.kv_b_proj.weight)
        w_uk, w_uv = (weight.astype(q_nope.dtype) for weight in prepared)
        q_latent = jnp.einsum("bthn,hrn->bthr", q_nope, w_uk)
        dtype = widen(q_nope.dtype)
        scores = jnp.einsum("bthr,bsr->bhts", q_latent, cache.c_kv, preferred_element_type=dtype)
        scores += jnp.einsum("bthr,bsr->bhts", q_rope, cache.k_rope, preferred_element_type=dtype)
        seen = jnp.arange(cache.c_kv.shape[1]) <= positions[:, None, :, None]
        weights = masked_softmax(scores * softmax_scale(c), seen).astype(q_nope.dtype)
        attended = jnp.einsum("bhts,bsr->bhtr", weights, cache.c_kv)
        return jnp.einsum("bhtr,hvr->bthv", attended, w_uv)


def latent_attention(
    config: ModelConfig,
    q: jax.Array,
    expanded: jax.Array,
    k_rope: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_ids: Optional[jax.Array],
) -> jax.Array:
    """Attend by what latents expand to, all of it as products make it.

    Args:
        q: [B, T, H * (nope + rope)], not turned yet.
        expanded: [B, T, H * (nope + v)], of every head's key what has no position, and its value.
        k_rope: [B, T, rope], turned, the rest of every key.
        rope: cosine and sine of the positions, from `rope_angles`.
        segment_ids: as for `causal_attention`.

    Returns:
        [B, T, H, v].
    """
    if resolved(config.attention, q.dtype) == "splash":
        from deepseek_jax.kernels.by_head import attention_of_products  # only TPUs should load Pallas

        return attention_of_products(config, q, expanded, k_rope, rope, segment_ids)
    k, v = split_heads(config, expanded, k_rope)
    q = turned_queries(config, q, rope)
    return causal_attention(q, k, v, softmax_scale(config), segment_ids, implementation=config.attention)


def attention_over_context(
    config: ModelConfig,
    q: jax.Array,
    latents: tuple[jax.Array, jax.Array],
    rope: tuple[jax.Array, jax.Array],
    weight: jax.Array,
    segment_ids: Optional[jax.Array],
) -> jax.Array:
    """The same inside `shard_map` over `context`: splash attention where that is the config's, else blocks in plain JAX.

    Args:
        latents: of this device's tokens, [B, T, kv_lora_rank] and [B, T, rope], turned.
        weight: of kv_b_proj.
    """
    if resolved(config.attention, q.dtype) == "splash":
        from deepseek_jax.kernels.splash_context import splash_context_attention

        return splash_context_attention(config, q, latents, rope, weight, segment_ids)
    expand = partial(keys_and_values, config)
    return context_attention(expand, softmax_scale(config), turned_queries(config, q, rope), latents, weight, segment_ids)


def turned_queries(config: ModelConfig, q: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Of every head, [B, T, H, nope + rope], their ends turned to their positions, from [B, T, H * (nope + rope)]."""
    return turn_ends(q.reshape(*q.shape[:2], config.num_attention_heads, -1), *rope, config.rope_interleave)


def keys_and_values(config: ModelConfig, weight: jax.Array, latents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Of every head, [B, T, H, nope + rope] and [B, T, H, v_head_dim], from latents and kv_b_proj's weight, or some heads'."""
    c_kv, k_rope = latents
    return split_heads(config, products(config, c_kv, weight, name=AGAIN)[0], k_rope)


def split_heads(config: ModelConfig, expanded: jax.Array, k_rope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, from what kv_b_proj has made of latents."""
    expanded = expanded.reshape(*expanded.shape[:2], -1, config.qk_nope_head_dim + config.v_head_dim)
    k_nope, v = jnp.split(expanded, [config.qk_nope_head_dim], axis=-1)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], config.qk_rope_head_dim))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of the scores where `mask` is true, zero elsewhere."""
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)

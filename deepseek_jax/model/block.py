"""One transformer layer: pre-norm attention, then a pre-norm dense or mixture-of-experts feed-forward."""

from typing import NamedTuple, Optional

import flax.linen as nn
import jax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import Latents, MultiHeadLatentAttention, Prefix
from deepseek_jax.model.layers import FeedForward, RMSNorm
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.products import WAYPOINT, keep
from deepseek_jax.parallel.sharding import Division


class BlockOutput(NamedTuple):
    """What a layer tells besides its hidden state; a dense layer has no counts and nothing after them."""

    latents: Optional[Latents]
    """None of several layers at once."""
    counts: Optional[jax.Array] = None
    """Tokens that chose each expert, [E]."""
    balance_loss: Optional[jax.Array] = None
    dropped: Optional[jax.Array] = None
    """Share of the choices that found no room, where that is limited."""
    bad: Optional[jax.Array] = None
    """Which modules made what is no number, if `training.culprit` looks."""
    largest_scores: Optional[jax.Array] = None
    """Of each attention head, [H], where they are asked for."""


class Block(nn.Module):
    """A layer of the main model or of an MTP module.

    Attributes:
        moe: whether the feed-forward is a mixture of experts.
        division: the mesh, inside `shard_map` over it.
    """

    config: ModelConfig
    moe: bool
    division: Optional[Division] = None

    def setup(self):
        c = self.config
        self.input_layernorm = RMSNorm(c, c.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(c, self.division)
        self.post_attention_layernorm = RMSNorm(c, c.rms_norm_eps)
        self.mlp: nn.Module = MoE(c, self.division) if self.moe else FeedForward(c, c.intermediate_size)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        cache: Optional[Latents | Prefix] = None,
        segment_ids: Optional[jax.Array] = None,
    ) -> tuple[jax.Array, BlockOutput]:
        """[B, T, hidden_size] -> the same; arguments as for `MultiHeadLatentAttention`."""
        attended, latents = self.self_attn(self.input_layernorm(x), rope, positions, cache, segment_ids)
        x = keep(x + attended, WAYPOINT)
        normed = self.post_attention_layernorm(x)
        if not self.moe:
            return x + self.mlp(normed), BlockOutput(latents)
        fed, routing = self.mlp(normed)
        return x + fed, BlockOutput(latents, routing.counts, routing.balance_loss, routing.dropped)

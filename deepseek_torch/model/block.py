"""One transformer layer: pre-norm attention, then a pre-norm dense or mixture-of-experts feed-forward."""

from typing import NamedTuple, Optional

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.attention import Latents, MultiHeadLatentAttention
from deepseek_torch.model.layers import FeedForward, RMSNorm
from deepseek_torch.model.moe import MoE


class BlockOutput(NamedTuple):
    """What a layer tells besides its hidden state; a dense layer has no counts and nothing after them."""

    latents: Optional[Latents]
    counts: Optional[torch.Tensor] = None
    """Tokens that chose each expert, [E]."""
    balance_loss: Optional[torch.Tensor] = None
    dropped: Optional[torch.Tensor] = None
    """Share of the choices that found no room, where that is limited."""


class Block(nn.Module):
    """A layer of the main model or of an MTP module.

    Args:
        moe: whether the feed-forward is a mixture of experts.
    """

    def __init__(self, config: ModelConfig, moe: bool):
        super().__init__()
        self.moe = moe
        self.input_layernorm = RMSNorm(config, config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if moe else FeedForward(config, config.intermediate_size)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: Optional[Latents] = None,
        segment_ids: Optional[torch.Tensor] = None,
    ) -> tuple[torch.Tensor, BlockOutput]:
        """[B, T, hidden_size] -> the same; arguments as for `MultiHeadLatentAttention`."""
        attended, latents = self.self_attn(self.input_layernorm(x), rope, positions, cache, segment_ids)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if not self.moe:
            return x + self.mlp(normed), BlockOutput(latents)
        fed, routing = self.mlp(normed)
        return x + fed, BlockOutput(latents, routing.counts, routing.balance_loss, routing.dropped)

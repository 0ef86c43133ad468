"""Multi-head latent attention (report 2.1.1).

Keys and values are expanded from a latent vector per token, so a cache needs to hold only that
latent and one shared rotary key: kv_lora_rank + qk_rope_head_dim numbers per token and layer. The
JAX sibling absorbs the expansion into query and output when it decodes; here keys and values are
always expanded, from the cache too, so that the one form proves the other.
"""

from typing import NamedTuple, Optional

import torch
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.layers import Linear, RMSNorm, widen
from deepseek_torch.model.products import products
from deepseek_torch.model.rope import apply_rope, softmax_scale

LATENT_NORM_EPS = 1e-6


class Latents(NamedTuple):
    """What attention remembers of each token; also the cache, whose rows are positions."""

    c_kv: torch.Tensor
    """Normalised latent, [B, S, kv_lora_rank]."""
    k_rope: torch.Tensor
    """Rotated key shared by all heads, [B, S, qk_rope_head_dim]."""


class MultiHeadLatentAttention(nn.Module):
    """Causal attention over the tokens given, or over a cache and the tokens given.

    Attributes:
        largest_scores: of each head in the last batch, [H].
    """

    largest_scores: torch.Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        heads = c.num_attention_heads
        q_width = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank is None:
            self.q_proj = Linear(c, c.hidden_size, q_width)
        else:
            self.q_a_proj = Linear(c, c.hidden_size, c.q_lora_rank, c.attention_bias)
            self.q_a_layernorm = RMSNorm(c, c.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(c, c.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(c, c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, c.attention_bias)
        self.kv_a_layernorm = RMSNorm(c, c.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(c, c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(c, heads * c.v_head_dim, c.hidden_size, c.attention_bias)

    def forward(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: Optional[Latents] = None,
        segment_ids: Optional[torch.Tensor] = None,
    ) -> tuple[torch.Tensor, Latents]:
        """Attend.

        Args:
            x: [B, T, hidden_size].
            rope: cosine and sine of the positions, from `rope_angles`.
            positions: [B, T]; read only with a cache, whose rows they name.
            cache: latents of all positions, [B, S, ...]; rows beyond a token's own are not read.
            segment_ids: [B, T], the document of each token, which sees only its own; without a cache.

        Returns:
            Output [B, T, hidden_size]; and the latents of these tokens, or the cache with them in it.
        """
        batch, length, _ = x.shape
        q_nope, q_rope, latents = self._project(x, rope)
        if cache is None:
            rows = torch.arange(length, device=x.device).expand(batch, length)
        else:
            rows = positions
            sequences = torch.arange(batch, device=x.device)[:, None]
            latents = Latents(*(old.index_put((sequences, rows), new) for old, new in zip(cache, latents)))
        k_nope, v = self._keys_and_values(latents)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k_rope = latents.k_rope[:, :, None].expand(-1, -1, self.config.num_attention_heads, -1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        seen = torch.arange(k.shape[1], device=x.device) <= rows[:, :, None]
        if segment_ids is not None:
            seen = seen & (segment_ids[:, :, None] == segment_ids[:, None])
        out, self.largest_scores = attention(q, k, v, softmax_scale(self.config), seen)
        return self.o_proj(out.flatten(-2)), latents

    def _project(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Latents]:
        """Queries without and with position, [B, T, H, nope] and [B, T, H, rope], and the tokens' latents."""
        c = self.config
        first = self.q_proj if c.q_lora_rank is None else self.q_a_proj
        q, kv = products(c, x, first.weight, self.kv_a_proj_with_mqa.weight)
        q, kv = first.completed(x, q), self.kv_a_proj_with_mqa.completed(x, kv)
        if c.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (c.num_attention_heads, -1))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        c_kv, k_rope = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        k_rope = apply_rope(k_rope[:, :, None], *rope, c.rope_interleave)[:, :, 0]
        latents = Latents(self.kv_a_layernorm(c_kv), k_rope)
        return q_nope, apply_rope(q_rope, *rope, c.rope_interleave), latents

    def _keys_and_values(self, latents: Latents) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys without position and values of every head, [B, S, H, nope] and [B, S, H, v]."""
        c = self.config
        expanded = self.kv_b_proj(latents.c_kv).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, v = expanded.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        return k_nope, v


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of every token to the positions it sees.

    Args:
        q: [B, T, H, D].
        k: [B, S, H, D].
        v: [B, S, H, V].
        scale: factor on the scores.
        seen: [B, T, S] booleans.

    Returns:
        [B, T, H, V], and the largest score of each head [H]. Scores and softmax are computed in at least float32.
    """
    wide = widen(q.dtype)
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k.to(wide)) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    return torch.einsum("bhts,bshv->bthv", weights, v), scores.detach().amax(dim=(0, 2, 3))

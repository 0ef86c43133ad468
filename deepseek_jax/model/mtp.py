"""Multi-token prediction: modules that each look one token further ahead (report 2.2), or heads side by side."""

from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import Latents, Prefix
from deepseek_jax.model.block import Block, BlockOutput
from deepseek_jax.model.layers import Linear, RMSNorm
from deepseek_jax.parallel.sharding import Division


class MTPModule(nn.Module):
    """Module k: joins the state before it at position i with the embedding of token i + k.

    Embedding and output head are the main model's, so they are not here.
    """

    config: ModelConfig
    division: Optional[Division] = None

    def setup(self):
        c = self.config
        self.enorm = RMSNorm(c, c.rms_norm_eps)
        self.hnorm = RMSNorm(c, c.rms_norm_eps)
        self.eh_proj = Linear(c, 2 * c.hidden_size, c.hidden_size)
        self.block = Block(c, moe=True, division=self.division)
        self.norm = RMSNorm(c, c.rms_norm_eps)

    def __call__(
        self,
        previous: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        embedded: jax.Array,
        segment_ids: Optional[jax.Array] = None,
        cache: Optional[Latents | Prefix] = None,
    ) -> tuple[jax.Array, tuple[jax.Array, BlockOutput]]:
        """One depth further.

        Args:
            previous: [B, T, hidden_size] state of the depth before (of the main model for k = 1).
            rope, positions, segment_ids, cache: as for `Block`.
            embedded: [B, T, hidden_size] embeddings of the tokens k further on.

        Returns:
            The state for the next depth; and the normed state for the output head with the block's output.
        """
        joined = jnp.concatenate([self.enorm(embedded), self.hnorm(previous)], axis=-1)
        hidden, output = self.block(self.eh_proj(joined), rope, positions, cache, segment_ids)
        normed = self.norm(hidden)
        return normed if self.config.mtp_hidden_after_norm else hidden, (normed, output)


class MTPHead(nn.Module):
    """Head k: predicts token i + k + 1 from the main model's state at position i alone, by a projection beside it.

    Heads know nothing of each other, nor of the tokens between; the output head is the main model's.
    """

    config: ModelConfig
    division: Optional[Division] = None

    def setup(self):
        c = self.config
        self.hnorm = RMSNorm(c, c.rms_norm_eps)
        self.proj = Linear(c, c.hidden_size, c.hidden_size)
        self.norm = RMSNorm(c, c.rms_norm_eps)

    def __call__(
        self,
        state: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        embedded: jax.Array,
        segment_ids: Optional[jax.Array] = None,
        cache: Optional[Latents | Prefix] = None,
    ) -> tuple[jax.Array, tuple[jax.Array, BlockOutput]]:
        """The state as it is, for the next head, and the normed state for the output head; called as an `MTPModule`."""
        return state, (self.norm(state + nn.silu(self.proj(self.hnorm(state)))), BlockOutput(None))


MTP_FORMS = {"sequential": MTPModule, "parallel": MTPHead}
"""By `ModelConfig.mtp_form`."""

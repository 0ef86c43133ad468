"""Multi-token prediction: modules that each look one token further ahead (report 2.2), or heads side by side."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.block import Block, BlockOutput
from deepseek_torch.model.layers import Linear, RMSNorm


class MTPModule(Block):
    """Module k: joins the state before it at position i with the embedding of token i + k.

    A layer with a beginning and an end of its own, as in the released checkpoint, where these stand beside the
    layer's members. Embedding and output head are the main model's, so they are not here.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, moe=True)
        c = self.config = config
        self.enorm = RMSNorm(c, c.hidden_size, c.rms_norm_eps)
        self.hnorm = RMSNorm(c, c.hidden_size, c.rms_norm_eps)
        self.eh_proj = Linear(c, 2 * c.hidden_size, c.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(c, c.hidden_size, c.rms_norm_eps)})

    def forward(  # type: ignore[override]  # other arguments: nobody calls it as a Block's
        self,
        previous: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        embedded: torch.Tensor,
        segment_ids: Optional[torch.Tensor] = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, BlockOutput]]:
        """One depth further.

        Args:
            previous: [B, T, hidden_size] state of the depth before (of the main model for k = 1).
            rope, positions, segment_ids: as for `Block`.
            embedded: [B, T, hidden_size] embeddings of the tokens k further on.

        Returns:
            The state for the next depth; and the normed state for the output head with the block's output.
        """
        joined = torch.cat([self.enorm(embedded), self.hnorm(previous)], dim=-1)
        hidden, output = super().forward(self.eh_proj(joined), rope, positions, segment_ids=segment_ids)
        normed = self.shared_head["norm"](hidden)
        return normed if self.config.mtp_hidden_after_norm else hidden, (normed, output)


class MTPHead(nn.Module):
    """Head k: predicts token i + k + 1 from the main model's state at position i alone, by a projection beside it.

    Heads know nothing of each other, nor of the tokens between; the output head is the main model's.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.hnorm = RMSNorm(c, c.hidden_size, c.rms_norm_eps)
        self.proj = Linear(c, c.hidden_size, c.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(c, c.hidden_size, c.rms_norm_eps)})

    def forward(
        self,
        state: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        embedded: torch.Tensor,
        segment_ids: Optional[torch.Tensor] = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, BlockOutput]]:
        """The state as it is, for the next head, and the normed state for the output head; called as an `MTPModule`."""
        ahead = state + F.silu(self.proj(self.hnorm(state)))
        return state, (self.shared_head["norm"](ahead), BlockOutput(None))


MTP_FORMS = {"sequential": MTPModule, "parallel": MTPHead}
"""By `ModelConfig.mtp_form`."""

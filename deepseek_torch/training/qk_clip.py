"""QK-clip (Kimi K2, arXiv 2507.20534, 2.1): attention scores are kept small where they are made, in the weights."""

import torch

from deepseek_torch.model.attention import MultiHeadLatentAttention
from deepseek_torch.model.transformer import DeepseekV3


def attentions(model: DeepseekV3) -> list[MultiHeadLatentAttention]:
    """Of all layers that have one, in order, those of MTP modules last."""
    return [module for module in model.modules() if isinstance(module, MultiHeadLatentAttention)]


def largest_scores(model: DeepseekV3) -> torch.Tensor:
    """Of every head, [layers, H], in the batch that went through the model last."""
    return torch.stack([attention.largest_scores for attention in attentions(model)])


@torch.no_grad()
def clip_heads(model: DeepseekV3, limit: float, largest: torch.Tensor) -> None:
    """Scale the weights of every head whose largest score, [layers, H], was above the limit, so that it scores that less.

    Query and key without position take half of the factor each. With position the query takes all, for all heads share
    the key, which stays.
    """
    for attention, of_layer in zip(attentions(model), largest, strict=True):
        c = attention.config
        query = attention.q_proj if c.q_lora_rank is None else attention.q_b_proj
        queries = query.weight.unflatten(0, (c.num_attention_heads, -1))  # views: [H, out, in]
        keys = attention.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1))
        for head in range(c.num_attention_heads):
            if of_layer[head] > limit:
                factor = limit / of_layer[head]
                queries[head, : c.qk_nope_head_dim] *= factor.sqrt()
                queries[head, c.qk_nope_head_dim :] *= factor
                keys[head, : c.qk_nope_head_dim] *= factor.sqrt()

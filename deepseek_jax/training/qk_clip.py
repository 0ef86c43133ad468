"""QK-clip (Kimi K2, arXiv 2507.20534, 2.1): attention scores are kept small where they are made, in the weights."""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig


def clipped_heads(config: ModelConfig, limit: float, params: Any, largest_scores: dict[str, jax.Array]) -> Any:
    """The parameters, of which every head whose largest score was above the limit scores less by that factor.

    A head's query and key without position take half of it each. With position its query takes all, for all heads
    share the key, which stays.

    Args:
        limit: of scores, after their scale.
        largest_scores: [layers, H] by stack.
    """
    for stack, largest in largest_scores.items():
        factor = limit / jnp.maximum(largest, limit)
        path = (stack, "block", "self_attn") if stack == "mtp_layers" else (stack, "self_attn")
        params = _with(params, path, lambda attention, factor=factor: _clipped(config, attention, factor))
    return params


def _clipped(config: ModelConfig, attention: Any, factor: jax.Array) -> Any:
    """The weights of a stack's attention, [layers, in, H * width], with factors [layers, H] on their scores."""
    c = config
    half = jnp.sqrt(factor)
    query = "q_proj" if c.q_lora_rank is None else "q_b_proj"
    of_queries = _by_width((half, c.qk_nope_head_dim), (factor, c.qk_rope_head_dim))
    of_keys = _by_width((half, c.qk_nope_head_dim), (jnp.ones_like(factor), c.v_head_dim))
    for name, factors in ((query, of_queries), ("kv_b_proj", of_keys)):
        weight = attention[name]["weight"]
        attention = attention | {name: attention[name] | {"weight": weight * factors.astype(weight.dtype)}}
    return attention


def _by_width(*parts: tuple[jax.Array, int]) -> jax.Array:
    """Factors [layers, H] over as many outputs of each head as given, one part after the other: [layers, 1, H * width]."""
    by_head = jnp.concatenate([jnp.repeat(factor[..., None], width, axis=-1) for factor, width in parts], axis=-1)
    return by_head.reshape(len(by_head), 1, -1)


def _with(tree: Any, path: tuple[str, ...], change: Any) -> Any:
    """`tree` with what is at `path` changed."""
    if not path:
        return change(tree)
    return tree | {path[0]: _with(tree[path[0]], path[1:], change)}

"""Attention where the axis `context` divides the sequence, by splash attention: a device's queries and the keys of all.

As in `model/context_attention.py` every device gathers the latents of all tokens. Here keys and values are made of them
for some heads at a time, all tokens of these, and the kernel passes over blocks of keys that none of a block's queries
sees. A device's two pieces see half of all pairs between them, whichever they are: the same work for all.
"""

from functools import partial
from typing import Optional

import jax

from deepseek_jax.config import ModelConfig
from deepseek_jax.kernels.by_head import keys_and_values_of_products, queries_of_products
from deepseek_jax.kernels.splash_attention import attention_by_head
from deepseek_jax.model.context_attention import Latents
from deepseek_jax.model.layers import widen
from deepseek_jax.model.products import AGAIN, policy, products
from deepseek_jax.parallel.context import own_places, whole

KEYS_BYTES = 2**29
"""Of keys and values at a time, and of their gradients."""


def splash_context_attention(
    config: ModelConfig, q: jax.Array, latents: Latents, rope: tuple[jax.Array, jax.Array], weight: jax.Array,
    segment_ids: Optional[jax.Array],
) -> jax.Array:  # fmt: skip
    """What `attention_over_context` says, in float32 or bfloat16.

    Gradients of latents are summed, over heads and devices, in at least float32.
    """
    c, length, dtype, heads = config, q.shape[1], q.dtype, config.num_attention_heads
    all_latents = jax.tree.map(partial(whole, widen(dtype)), latents)
    documents = None if segment_ids is None else (segment_ids, whole(segment_ids.dtype, segment_ids))
    widths = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    most = KEYS_BYTES // (all_latents[0][..., 0].size * widths * dtype.itemsize)
    size = next(size for size in range(min(max(most, 1), heads), 0, -1) if heads % size == 0)

    @partial(jax.checkpoint, prevent_cse=False, policy=policy("attention"))
    def attend(queries: jax.Array, weight: jax.Array, all_latents: Latents) -> jax.Array:
        c_kv, k_rope = (x.astype(dtype) for x in all_latents)
        (expanded,) = products(c, c_kv, weight, name=AGAIN)
        return attention_by_head(queries, *keys_and_values_of_products(c, expanded, k_rope), own_places(length), documents)

    def visit(_: None, group: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, attend(*group, all_latents)

    queries = queries_of_products(c, q, rope)
    queries = queries.reshape(len(q), heads // size, size, length, -1).swapaxes(0, 1)
    weights = weight.reshape(len(weight), heads // size, -1).swapaxes(0, 1)
    _, attended = jax.lax.scan(visit, None, (queries, weights))
    return attended.transpose(1, 2, 0, 3, 4).reshape(len(q), length, heads, -1)

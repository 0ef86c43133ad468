"""Attention where the axis `context` divides the sequence, by splash attention: a device's queries and the keys of all.

As in `model/context_attention.py` every device gathers the latents of all tokens. Here keys and values are made of them
for some heads at a time, all tokens of these, and the kernel passes over blocks of keys that none of a block's queries
sees. A device's two pieces see half of all pairs between them, whichever they are: the same work for all.
"""

from functools import partial
from typing import Optional

import jax
import jax.numpy as jnp

from deepseek_jax.kernels.splash_attention import attention_by_head
from deepseek_jax.model.context_attention import Expand, Latents
from deepseek_jax.model.layers import widen
from deepseek_jax.model.products import policy
from deepseek_jax.parallel.context import own_places, whole

KEYS_BYTES = 2**29
"""Of keys and values at a time, and of their gradients."""


def splash_context_attention(
    expand: Expand, scale: float, q: jax.Array, latents: Latents, weight: jax.Array, segment_ids: Optional[jax.Array]
) -> jax.Array:
    """What `context_attention` says, in float32 or bfloat16.

    Queries are scaled, and rounded, beforehand. Gradients of latents are summed, over heads and devices, in at least float32.
    """
    (size, length, heads), dtype = q.shape[:3], q.dtype
    all_latents = jax.tree.map(partial(whole, widen(dtype)), latents)
    documents = None if segment_ids is None else (segment_ids, whole(segment_ids.dtype, segment_ids))
    bytes_each = sum(x.size for x in jax.eval_shape(expand, weight, all_latents)) // heads * dtype.itemsize
    groups = next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= max(KEYS_BYTES // bytes_each, 1))

    @partial(jax.checkpoint, prevent_cse=False, policy=policy("attention"))
    def attend(queries: jax.Array, weight: jax.Array, all_latents: Latents) -> jax.Array:
        narrow = jax.tree.map(lambda x: x.astype(dtype), all_latents)
        k, v = (x.swapaxes(1, 2) for x in expand(weight, narrow))
        return attention_by_head(queries, k, v, own_places(length), documents)

    def visit(_: None, group: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, attend(*group, all_latents)

    queries = (q * jnp.asarray(scale, dtype)).reshape(size, length, groups, heads // groups, -1).transpose(2, 0, 3, 1, 4)
    weights = weight.reshape(len(weight), groups, -1).swapaxes(0, 1)
    _, attended = jax.lax.scan(visit, None, (queries, weights))
    return jnp.moveaxis(attended, 0, 2).reshape(size, length, heads, -1)

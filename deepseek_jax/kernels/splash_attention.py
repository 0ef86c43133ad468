"""Causal attention on TPU by JAX's splash attention: blocks of scores that never leave the core."""

from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from deepseek_jax.model.layers import with_gradient_apart
from deepseek_jax.model.products import ATTENDED

BLOCKS = (1024, 512, 256, 128)
"""Sides of a block of scores, best first: the larger, the seldomer keys are read again."""
LARGEST_BYTES = 2048
"""Of a row of a block in the operands' type: beyond 1024 of bfloat16 or 512 of float32, a core's 16 MiB do not hold the
backward pass's blocks (compiled for v5e with heads of 192 and 128)."""
LARGEST_FILLING = 1 / 8
"""Share of the length that may be filled up to reach a whole number of blocks; 128 is taken whatever it costs."""


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """What `causal_attention` says, in float32 or bfloat16; heads of any size are taken as they are.

    Queries are scaled, and rounded, beforehand.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    return attention_by_head(q, k, v, segment_ids)


def attention_by_head(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: Optional[jax.Array]) -> jax.Array:
    """As above, for scaled queries, keys and values [B, H, T, ...]; what they attend to comes by token, [B, T, H, V].

    The end of a length is filled up to whole blocks, where no token looks.
    """
    heads, length = q.shape[1:3]
    block = block_size(length, q.dtype)
    whole = length + -length % block
    q, k, v = (_filled(x, whole, axis=2) for x in (q, k, v))
    documents = None if segment_ids is None else splash.SegmentIds(*[_filled(segment_ids, whole, axis=1)] * 2)
    attended: Any = jax.vmap(_kernel(heads, whole, block))(q, k, v, documents)  # an array, unless residuals are asked for
    return with_gradient_apart(attended.swapaxes(1, 2)[:, :length])


def block_size(length: int, dtype: jnp.dtype) -> int:
    """The largest block that the core holds and that `length` fills well enough."""
    sizes = [size for size in BLOCKS if size * jnp.dtype(dtype).itemsize <= LARGEST_BYTES]
    return next((size for size in sizes if -length % size <= LARGEST_FILLING * length), BLOCKS[-1])


def _kernel(heads: int, length: int, block: int) -> splash.splash_attention_kernel.SplashAttentionKernel:
    """For [heads, length, ...].

    Queries have a backward kernel of their own. The fused one makes two products fewer, but leaves a part of the
    queries' gradient for each block of keys: memory that grows with the square of the length, and XLA sums them slowly.
    """
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    return splash.make_splash_mha_single_device(
        mask, block_sizes=splash.BlockSizes(**sizes), residual_checkpoint_name=ATTENDED
    )


def _filled(x: jax.Array, length: int, axis: int) -> jax.Array:
    return jnp.pad(x, [(0, length - size if each == axis else 0) for each, size in enumerate(x.shape)])

"""Causal attention on TPU by JAX's splash attention: blocks of scores that never leave the core."""

from collections.abc import Callable
from typing import Any, Optional

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from deepseek_jax.model.layers import with_gradient_apart
from deepseek_jax.model.products import ATTENDED

BLOCKS = (1024, 512, 256, 128)
"""Sides of a block of scores, best first: the larger, the seldomer keys are read again."""
LARGEST_BYTES = 2048
"""Of a row of a block in the operands' type: beyond 1024 of bfloat16 or 512 of float32, a core's 16 MiB do not hold the
backward pass's blocks (compiled for v5e with heads of 192 and 128)."""
LARGEST_FILLING = 1 / 8
"""Share of the length that may be filled up to reach a whole number of blocks; 128 is taken whatever it costs."""

Documents = Optional[tuple[jax.Array, jax.Array]]
"""Of the queries and of the keys, [B, T] each; a query sees only keys of its own."""


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """What `causal_attention` says, in float32 or bfloat16; heads of any size are taken as they are.

    Queries are scaled, and rounded, beforehand.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    documents = None if segment_ids is None else (segment_ids, segment_ids)
    return attention_by_head(q, k, v, jnp.arange(q.shape[2]), documents)


def tokens_first(x: jax.Array) -> jax.Array:
    """[B, H, T, ...] -> [B, T, H, ...]."""
    return x.swapaxes(1, 2)


def attention_by_head(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    places: jax.Array,
    documents: Documents,
    by_token: Callable[[jax.Array], jax.Array] = tokens_first,
) -> jax.Array:
    """Attention of some queries of sequences to all keys up to their own place.

    Lengths are filled up to whole blocks: queries by the like of the last, keys where no query looks.

    Args:
        q: [B, H, T, D], scaled.
        k, v: [B, H, S, ...].
        places: [T] int32, of the queries among the keys.
        documents: as said above.
        by_token: what it says by default.

    Returns:
        What they attend to, by token, [B, T, H, V].
    """
    length = q.shape[2]
    blocks = block_size(length, q.dtype), block_size(k.shape[2], k.dtype)
    q, (k, v) = _filled(q, blocks[0], axis=2), (_filled(x, blocks[1], axis=2) for x in (k, v))
    places = _filled(places, blocks[0], axis=0, mode="edge")
    ids = documents and SegmentIds(*(_filled(x, block, axis=1, mode="edge") for x, block in zip(documents, blocks)))
    attended: Any = jax.vmap(_kernel(places, k.shape[2], blocks))(q, k, v, ids)  # an array, unless residuals are asked for
    return with_gradient_apart(by_token(attended)[:, :length])


def block_size(length: int, dtype: jnp.dtype) -> int:
    """The largest block that the core holds and that `length` fills well enough."""
    sizes = [size for size in BLOCKS if size * jnp.dtype(dtype).itemsize <= LARGEST_BYTES]
    return next((size for size in sizes if -length % size <= LARGEST_FILLING * length), BLOCKS[-1])


def _kernel(places: jax.Array, keys: int, blocks: tuple[int, int]) -> SplashAttentionKernel:
    """For queries [heads, T, D] at these places and so many keys, by blocks of so many of either.

    JAX's own makers of masks look at every pair of a query and a key, 52 s for 128K of either, and want to know places before
    the program runs. Which blocks have pairs that see each other follows from each block's last place.

    Queries have a backward kernel of their own. The fused one makes two products fewer, but leaves a part of the
    queries' gradient for each block of keys: memory that grows with the square of the length, and XLA sums them slowly.
    """
    rows, columns = len(places) // blocks[0], keys // blocks[1]
    is_seen = jnp.arange(columns) * blocks[1] <= jnp.max(places.reshape(rows, -1), axis=1, keepdims=True)
    # What is read next: for queries the keys that they see, and then the first of all; for keys the queries that see them.
    next_keys = jnp.where(is_seen, jnp.arange(columns), 0)
    next_queries = jax.lax.cummin(jnp.where(is_seen, jnp.arange(rows)[:, None], rows - 1), reverse=True)

    def info(following: jax.Array) -> MaskInfo:
        small = jnp.int8 if max(rows, columns) < 128 else jnp.int16  # a core has little memory for such
        ranks: Any = places  # which JAX's annotations take for NumPy's
        return MaskInfo(following[None].astype(small), None, is_seen[None].astype(jnp.int8), None, ranks)

    names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": blocks[name.startswith("kv")] for name in names}
    return SplashAttentionKernel(
        info(next_keys), info(next_keys), info(next_queries), block_sizes=BlockSizes(**sizes), mask_function=_sees,
        is_mqa=False, save_residuals=False, mask_value=DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENDED, interpret=False,
    )  # fmt: skip


def _sees(query: jax.Array, key: jax.Array) -> jax.Array:
    return query >= key


def _filled(x: jax.Array, block: int, axis: int, mode: str = "constant") -> jax.Array:
    widths = [(0, -size % block if each == axis else 0) for each, size in enumerate(x.shape)]
    return jnp.pad(x, widths, mode=mode)

"""Softmax attention of every token to itself and those before it: one signature, several forms."""

from collections.abc import Callable
from typing import Optional

import jax
import jax.numpy as jnp

from deepseek_jax.config import ATTENTIONS
from deepseek_jax.errors import UserError
from deepseek_jax.implementations import best
from deepseek_jax.model.attention_scores import largest_scores
from deepseek_jax.model.blocked_attention import blocked_attention, blocked_attention_and_scores
from deepseek_jax.model.chunked_attention import chunked_attention
from deepseek_jax.model.layers import widen


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    segment_ids: Optional[jax.Array] = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attend within each sequence, or within each of its documents.

    Args:
        q, k: [B, T, H, D].
        v: [B, T, H, V].
        scale: factor on the scores.
        segment_ids: [B, T] int32, the document of each token; a token sees only earlier tokens of its own.
        implementation: one of `ATTENTIONS`, of which `auto` is the best for the devices at hand. Inside `shard_map`
            splash and cudnn need `check_vma=False`.

    Returns:
        [B, T, H, V]. The softmax is taken in at least float32.

    Raises:
        UserError: the implementation is unknown, or cannot compute here or in q's dtype.
    """
    return _IMPLEMENTATIONS[resolved(implementation, q.dtype)](q, k, v, scale, segment_ids)


def causal_attention_and_scores(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    segment_ids: Optional[jax.Array] = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`causal_attention`, and the largest score of each head among those that a token sees, scaled: [H].

    The scores cost nothing where they are at hand, and a product of queries and keys more beside other implementations.
    """
    if resolved(implementation, q.dtype) == "blocked":
        return blocked_attention_and_scores(q, k, v, scale, segment_ids)
    documents = None if segment_ids is None else (segment_ids, segment_ids)
    return causal_attention(q, k, v, scale, segment_ids, implementation), largest_scores(q, k, scale, documents)


def resolved(implementation: str, dtype: jnp.dtype) -> str:
    """Which of ATTENTIONS computes in a type where `implementation` is asked for; `UserError` where that cannot be."""
    if implementation not in ATTENTIONS:
        raise UserError(f"model.attention={implementation}: choose one of {', '.join(ATTENTIONS)}")
    is_float64 = dtype == jnp.float64
    if implementation == "splash" and is_float64:
        raise UserError("model.attention=splash: has no float64; choose chunked or model.precision=float32")
    return best("attention", is_float64=is_float64) if implementation == "auto" else implementation


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """The definition: all scores, those of tokens not seen taken out."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=widen(q.dtype)) * scale
    seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
    if segment_ids is not None:
        seen &= (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights.astype(v.dtype), v)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """Imported late: only TPUs should load Pallas."""
    from deepseek_jax.kernels.splash_attention import splash_attention

    return splash_attention(q, k, v, scale, segment_ids)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, segment_ids: Optional[jax.Array]) -> jax.Array:
    """What cuDNN does not have is chunked."""
    from deepseek_jax.kernels.cudnn_attention import cudnn_attention, is_supported

    if segment_ids is None and is_supported(q, v):
        return cudnn_attention(q, k, v, scale)
    return chunked_attention(q, k, v, scale, segment_ids)


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": _reference,
    "blocked": blocked_attention,
    "chunked": chunked_attention,
    "splash": _splash,
    "cudnn": _cudnn,
}

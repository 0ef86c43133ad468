"""Causal attention on NVIDIA GPUs by cuDNN, through the primitives of JAX's own `dot_product_attention`.

That public function wants values as wide as queries. It also asks this host's devices whether cuDNN can do what is asked,
which a program compiled for GPUs that are not here cannot answer; so only a program for this host's GPUs is checked.
"""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from deepseek_jax.errors import UserError
from deepseek_jax.model.products import ATTENDED, keep

WIDEST = 256
"""Head size, of which cuDNN takes multiples of 8."""
LAYOUT = cudnn.AttentionLayout.BTNH.value
SCORES_AS_THEY_ARE = (
    {"score_mod": None} if "score_mod" in inspect.signature(cudnn._dot_product_attention_fwd).parameters else {}
)
"""An option that newer versions of JAX ask for and older ones do not know."""

Residuals = tuple[jax.Array, ...]


def is_supported(q: jax.Array, v: jax.Array) -> bool:
    """Whether cuDNN has q's type and these head sizes."""
    sizes = q.shape[-1], v.shape[-1]
    return q.dtype in (jnp.bfloat16, jnp.float16) and all(size % 8 == 0 and size <= WIDEST for size in sizes)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """What `causal_attention` says, for what `is_supported` and without documents.

    cuDNN knows documents only as a mask of T x T scores, or packed, with room in its statistics for the most there may be
    in a sequence and only for values as wide as keys: neither is linear in the length here.

    Raises:
        UserError: this host's GPU or cuDNN is too old.
    """
    return _forward(q, k, v, scale)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> tuple[jax.Array, Residuals]:
    _check_device(q, k, v)
    out, normalizer = cudnn._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *_absent(q), is_training=True, **_options(scale)
    )
    out, normalizer = keep(out, ATTENDED), keep(normalizer, ATTENDED)
    return out, (q, k, v, out, normalizer)


def _backward(scale: float, kept: Residuals, gradient: jax.Array) -> tuple[jax.Array, ...]:
    q, k, v, out, normalizer = kept
    return tuple(
        cudnn._dot_product_attention_bwd_p_wrapper.bind(q, k, v, *_absent(q), normalizer, out, gradient, **_options(scale))
    )


cudnn_attention.defvjp(_forward, _backward)


def _absent(q: jax.Array) -> list[jax.Array]:
    """For bias, lengths, offsets and page tables."""
    return [jnp.zeros(0, q.dtype)] * 7


def _options(scale: float) -> dict[str, Any]:
    return dict(
        scale=scale, seed=0, dropout_rate=0.0, variadic_args=(False, False), mask_type=cudnn.MaskType.CAUSAL,
        layout=LAYOUT, sliding_window_length=None, **SCORES_AS_THEY_ARE,
    )  # fmt: skip


def _check_device(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if jax.default_backend() != "gpu":
        return
    try:
        cudnn.check_is_flash_attention(q, k, v, LAYOUT, cudnn.check_cudnn_version(), has_bias=False, is_training=True)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(f"model.attention=cudnn: {error}; choose chunked") from None

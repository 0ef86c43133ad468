"""Attention's operands by head, as its kernel on TPUs reads them, from products, which come by token; and gradients back.

One pass over the operands each way. XLA needs several, for heads of 192 end within its tiles of 128.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.config import ModelConfig
from deepseek_jax.kernels.splash_attention import attention_by_head, tokens_first
from deepseek_jax.model.attention import split_heads, turned_queries
from deepseek_jax.model.rope import factors_of_all, other_of_pairs, softmax_scale

LANES = 128
ROWS, WIDEST_BYTES = 512, 4096
"""Most tokens of a block, and bytes of one's row: two of each operand's fit a core's 16 MiB."""


class Block(NamedTuple):
    """What one step of a kernel works on."""

    rows: int
    heads: int
    of: int
    """Heads in all."""


def block_of(length: int, heads: int, width: int, dtype: jnp.dtype) -> Optional[Block]:
    """The largest block for heads of this width by token; null if none has whole tiles."""
    rows = next((rows for rows in (ROWS, ROWS // 2, LANES) if length % rows == 0), None)
    most = WIDEST_BYTES // (jnp.dtype(dtype).itemsize * width)
    fitting = [n for n in range(1, most + 1) if heads % n == 0 and n * width % LANES == 0]
    return Block(rows, fitting[-1], heads) if rows and fitting else None


def attention_of_products(
    config: ModelConfig,
    q: jax.Array,
    expanded: jax.Array,
    k_rope: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_ids: Optional[jax.Array],
) -> jax.Array:
    """What `latent_attention` says, by splash attention."""
    queries = queries_of_products(config, q, rope)
    keys, values = keys_and_values_of_products(config, expanded, k_rope)
    documents = None if segment_ids is None else (segment_ids, segment_ids)
    return attention_by_head(queries, keys, values, jnp.arange(q.shape[1]), documents, partial(tokens_first_of_heads, config))


def queries_of_products(config: ModelConfig, q: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turned and scaled, [B, H, T, D] from [B, T, H * D]."""
    c, width = config, config.qk_nope_head_dim + config.qk_rope_head_dim
    block, scale = block_of(q.shape[1], q.shape[2] // width, width, q.dtype), softmax_scale(c)
    if block is not None and c.qk_nope_head_dim % LANES == 0:
        return queries_by_head(q, *rope, block, scale, c.rope_interleave)
    return (turned_queries(c, q, rope) * jnp.asarray(scale, q.dtype)).swapaxes(1, 2)


def keys_and_values_of_products(config: ModelConfig, expanded: jax.Array, k_rope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, H, T, nope + rope] and [B, H, T, v] from [B, T, H * (nope + v)], of all heads or some, and [B, T, rope]."""
    c, width = config, config.qk_nope_head_dim + config.v_head_dim
    block = block_of(expanded.shape[1], expanded.shape[2] // width, width, expanded.dtype)
    if block is not None and c.v_head_dim % LANES == c.qk_nope_head_dim % LANES == 0:
        return keys_and_values_by_head(expanded, k_rope, block, c.v_head_dim)
    keys, values = split_heads(c, expanded, k_rope)
    return keys.swapaxes(1, 2), values.swapaxes(1, 2)


def tokens_first_of_heads(config: ModelConfig, attended: jax.Array) -> jax.Array:
    """[B, H, T, v] -> [B, T, H, v]."""
    block = block_of(attended.shape[2], attended.shape[1], config.v_head_dim, attended.dtype)
    return values_by_token(block, attended) if block and config.v_head_dim % LANES == 0 else tokens_first(attended)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def queries_by_head(q: jax.Array, cos: jax.Array, sin: jax.Array, block: Block, scale: float, interleave: bool) -> jax.Array:
    """Queries [B, T, H * D], their ends turned as by `turn_ends` and all of them scaled: [B, H, T, D]."""
    size, length, heads = *q.shape[:2], block.of
    width = q.shape[2] // heads
    return _call(
        partial(_turn_and_part, scale, block.heads), "queries_by_head", _grid(block, size, length, heads),
        2 * q.size * width,
        [_by_token(block, width), *[_of_tokens(block, width)] * 2, _whole(width, width)],
        [_by_head(block, width)], [jax.ShapeDtypeStruct((size, heads, length, width), q.dtype)],
        q, *_turning(width, q.dtype, cos, sin, interleave),
    )[0]  # fmt: skip


def _queries_backward(block: Block, scale: float, interleave: bool, angles: Any, gradient: jax.Array) -> tuple:
    cos, sin = angles
    size, heads, length, width = gradient.shape
    (joined,) = _call(
        partial(_join_and_turn, scale, block.heads), "queries_by_token", _grid(block, size, length, heads),
        2 * gradient.size * width,
        [_by_head(block, width), *[_of_tokens(block, width)] * 2, _whole(width, width)],
        [_by_token(block, width)], [jax.ShapeDtypeStruct((size, length, heads * width), gradient.dtype)],
        gradient, *_turning(width, gradient.dtype, cos, -sin, interleave),
    )  # fmt: skip
    return joined, None, None


queries_by_head.defvjp(lambda q, cos, sin, *static: (queries_by_head(q, cos, sin, *static), (cos, sin)), _queries_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def keys_and_values_by_head(expanded: jax.Array, shared: jax.Array, block: Block, width: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values of each head from what latents expand to, and what all heads' keys share.

    Args:
        expanded: [B, T, H * (K + V)].
        shared: [B, T, R], the last of every key.
        width: V.

    Returns:
        [B, H, T, K + R] and [B, H, T, V].
    """
    size, length, heads = *expanded.shape[:2], block.of
    both, end = expanded.shape[2] // heads, shared.shape[2]
    own = both - width
    shapes = [jax.ShapeDtypeStruct((size, heads, length, each), expanded.dtype) for each in (own + end, width)]
    keys, values = _call(
        partial(_part, own, block.heads), "keys_and_values_by_head", _grid(block, size, length, heads), 0,
        [_by_token(block, both), _of_tokens(block, end)], [_by_head(block, own + end), _by_head(block, width)], shapes,
        expanded, shared,
    )  # fmt: skip
    return keys, values


def _keys_and_values_backward(block: Block, width: int, end: int, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    keys, values = gradients
    size, heads, length, both = keys.shape
    own = both - end
    shapes = [jax.ShapeDtypeStruct((size, length, each), dtype)
              for each, dtype in ((heads * (own + width), keys.dtype), (end, jnp.float32))]  # fmt: skip
    joined, shared = _call(
        partial(_join, own, block.heads), "keys_and_values_by_token", _grid(block, size, length, heads),
        size * heads * length * end,
        [_by_head(block, both), _by_head(block, width)], [_by_token(block, own + width), _of_tokens(block, end)], shapes,
        keys, values,
    )  # fmt: skip
    return joined, shared.astype(keys.dtype)


keys_and_values_by_head.defvjp(
    lambda expanded, shared, *static: (keys_and_values_by_head(expanded, shared, *static), shared.shape[-1]),
    _keys_and_values_backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def values_by_token(block: Block, values: jax.Array) -> jax.Array:
    """[B, H, T, V] -> [B, T, H, V]. Backwards XLA does that, within the product that makes the gradient."""
    size, heads, length, width = values.shape
    (joined,) = _call(
        partial(_put_together, block.heads), "values_by_token", _grid(block, size, length, heads), 0,
        [_by_head(block, width)], [_by_token(block, width)],
        [jax.ShapeDtypeStruct((size, length, heads * width), values.dtype)], values,
    )  # fmt: skip
    return joined.reshape(size, length, heads, width)


values_by_token.defvjp(
    lambda block, values: (values_by_token(block, values), None), lambda block, _, gradient: (gradient.swapaxes(1, 2),)
)


def _put_together(heads: int, values: Any, result: Any) -> None:
    width = values.shape[-1]
    for head in range(heads):
        result[:, head * width : (head + 1) * width] = values[head]


def _turn_and_part(scale: float, heads: int, q: Any, cos: Any, sin: Any, signs: Any, result: Any) -> None:
    width = result.shape[-1]
    for head in range(heads):
        turned = _turned(q[:, head * width : (head + 1) * width], cos, sin, signs)
        result[head] = turned * jnp.asarray(scale, turned.dtype)


def _join_and_turn(scale: float, heads: int, gradient: Any, cos: Any, sin: Any, signs: Any, result: Any) -> None:
    width = gradient.shape[-1]
    for head in range(heads):
        x = gradient[head]
        result[:, head * width : (head + 1) * width] = _turned(x * jnp.asarray(scale, x.dtype), cos, sin, signs)


def _turned(x: jax.Array, cos: Any, sin: Any, signs: Any) -> jax.Array:
    exactly = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # bfloat16 is exact as it is
    other = jnp.dot(x, signs[...], precision=exactly, preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos[...] + other * sin[...]).astype(x.dtype)


def _part(own: int, heads: int, expanded: Any, shared: Any, keys: Any, values: Any) -> None:
    both = own + values.shape[-1]
    for head in range(heads):
        start = head * both
        keys[head, :, :own] = expanded[:, start : start + own]
        keys[head, :, own:] = shared[...]
        values[head] = expanded[:, start + own : start + both]


def _join(own: int, heads: int, keys: Any, values: Any, expanded: Any, shared: Any) -> None:
    both = own + values.shape[-1]
    total = jnp.zeros(shared.shape, jnp.float32)
    for head in range(heads):
        start = head * both
        expanded[:, start : start + own] = keys[head, :, :own]
        expanded[:, start + own : start + both] = values[head]
        total += keys[head, :, own:].astype(jnp.float32)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        shared[...] = jnp.zeros_like(shared)

    shared[...] += total


def _turning(width: int, dtype: jnp.dtype, cos: jax.Array, sin: jax.Array, interleave: bool) -> tuple[jax.Array, ...]:
    """Factors of x and of the other of each pair [B, T, D], and the matrix that brings it to its place [D, D]."""
    return (
        factors_of_all(cos, width, 1, interleave),
        factors_of_all(sin, width, 0, interleave),
        jnp.asarray(other_of_pairs(width, 2 * cos.shape[-1], interleave), dtype),
    )


def _grid(block: Block, size: int, length: int, heads: int) -> tuple[int, int, int]:
    return size, length // block.rows, heads // block.heads


def _by_token(block: Block, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, block.rows, block.heads * width), lambda b, t, h: (b, t, h))


def _by_head(block: Block, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, block.heads, block.rows, width), lambda b, t, h: (b, h, t, 0))


def _of_tokens(block: Block, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, block.rows, width), lambda b, t, h: (b, t, 0))


def _whole(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda b, t, h: (0, 0))


def _call(
    kernel: Callable[..., None], name: str, grid: tuple[int, ...], operations: int,
    ins: list[pl.BlockSpec], outs: list[pl.BlockSpec], shapes: list[jax.ShapeDtypeStruct], *arrays: jax.Array,
) -> list[jax.Array]:  # fmt: skip
    every: list[Any] = [*arrays, *shapes]
    moved = sum(each.size * each.dtype.itemsize for each in every)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=ins,
        out_specs=outs,
        out_shape=shapes,
        name=name,
        cost_estimate=pl.CostEstimate(flops=operations, bytes_accessed=moved, transcendentals=0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(*arrays)

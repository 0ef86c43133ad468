"""Rotary position embedding, and what stretches it: YaRN above all (report 2.1.1, 4.3)."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.model.layers import compute_dtype, widen


def rope_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every pair's angle.

    Args:
        positions: token positions, [..., T].

    Returns:
        Two arrays [..., T, qk_rope_head_dim / 2] of at least float32, YaRN's magnitude included.
    """
    dtype = widen(compute_dtype(config))
    angles = positions[..., None].astype(dtype) * jnp.asarray(inverse_frequencies(config), dtype)
    magnitude = jnp.asarray(rope_magnitude(config), dtype)
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, interleave: bool = True) -> jax.Array:
    """Turn each pair of the last axis by its angle: (x[2i], x[2i+1]), or if not `interleave` (x[i], x[R/2 + i]).

    Args:
        x: [..., T, H, R] queries or keys; H heads share a position's angle.
        cos, sin: [..., T, R / 2] from `rope_angles`.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]
    wide = x.astype(cos.dtype)
    one, other = (wide[..., 0::2], wide[..., 1::2]) if interleave else jnp.split(wide, 2, axis=-1)
    turned = one * cos - other * sin, other * cos + one * sin
    joined = jnp.stack(turned, axis=-1).reshape(x.shape) if interleave else jnp.concatenate(turned, axis=-1)
    return joined.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def turn_ends(x: jax.Array, cos: jax.Array, sin: jax.Array, interleave: bool = True) -> jax.Array:
    """`apply_rope` to the last R of the last axis, what is before them as it is.

    Args:
        x: [..., T, H, D] queries.
        cos, sin: [..., T, R / 2] from `rope_angles`; no gradient flows to them.
    """
    forms = (partial(form, interleave=interleave) for form in (turned_by_product, turned_by_parts))
    return jax.lax.platform_dependent(x, cos, sin, **dict(zip(("tpu", "default"), forms)))


def turned_by_parts(x: jax.Array, cos: jax.Array, sin: jax.Array, interleave: bool = True) -> jax.Array:
    """`turn_ends` as it is defined."""
    start, end = jnp.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    return jnp.concatenate([start, apply_rope(end, cos, sin, interleave)], axis=-1)


def turned_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array, interleave: bool = True) -> jax.Array:
    """`turn_ends` for TPUs, on which taking pairs apart and together moves all of x several times.

    A product with a matrix of signs brings each of a pair to the other's place; no number changes by it.
    """
    signs = jnp.asarray(other_of_pairs(x.shape[-1], 2 * cos.shape[-1], interleave), x.dtype)
    other = jnp.matmul(x, signs, precision=jax.lax.Precision.HIGHEST)
    of_one, of_other = (
        factors_of_all(of_pairs, x.shape[-1], before, interleave)[..., None, :] for of_pairs, before in ((cos, 1), (sin, 0))
    )
    return (x * of_one + other * of_other).astype(x.dtype)


def other_of_pairs(width: int, turned: int, interleave: bool) -> np.ndarray:
    """The matrix [width, width] that brings the other of each pair, with its sign, to the place of the one."""
    places = np.arange(width - turned, width)
    one, another = (places[0::2], places[1::2]) if interleave else np.split(places, 2)
    signs = np.zeros((width, width))
    signs[another, one], signs[one, another] = -1, 1
    return signs


def factors_of_all(of_pairs: jax.Array, width: int, before: float, interleave: bool) -> jax.Array:
    """Factors of pairs [..., R / 2] at the places of both of each, the last of [..., width], and `before` at all others."""
    unturned = jnp.full((*of_pairs.shape[:-1], width - 2 * of_pairs.shape[-1]), before, of_pairs.dtype)
    both = [jnp.repeat(of_pairs, 2, axis=-1)] if interleave else [of_pairs, of_pairs]
    return jnp.concatenate([unturned, *both], axis=-1)


turn_ends.defvjp(
    lambda x, cos, sin, interleave: (turn_ends(x, cos, sin, interleave), (cos, sin)),
    lambda interleave, angles, gradient: (turn_ends(gradient, angles[0], -angles[1], interleave), None, None),  # turned back
)


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair, [qk_rope_head_dim / 2] in float64.

    Under YaRN, pairs that turn often within the original length keep their frequency, those that
    turn less than once have it divided by `factor`, and a linear ramp joins the two.
    """
    dim = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low = max(math.floor(_pair_of_turns(config, scaling, scaling.beta_fast)), 0)
    high = min(math.ceil(_pair_of_turns(config, scaling, scaling.beta_slow)), dim - 1)
    width = high - low or 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    return frequencies / scaling.factor * interpolated + frequencies * (1 - interpolated)


def _pair_of_turns(config: ModelConfig, scaling: RopeScaling, turns: float) -> float:
    """Index (fractional) of the pair that makes `turns` full turns over the original length."""
    length = scaling.original_max_position_embeddings
    return config.qk_rope_head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))


def rope_magnitude(config: ModelConfig) -> float:
    """YaRN's factor on cosine and sine: the ratio of mscale to mscale_all_dim, 1 for DeepSeek-V3."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """Factor on the attention scores: (nope + rope)^-1/2, sharpened under YaRN."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return scale
    return scale * _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0

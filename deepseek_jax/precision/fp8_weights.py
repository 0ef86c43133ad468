"""Weights for float8 products, quantised where the master weights are at hand: once, and possibly long before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.precision.fp8 import SMALLEST_AMAX, quantize_blocks


class Quantized(NamedTuple):
    """A matrix in float8; each axis of `scales` is as long as that of `codes`, or has one scale for 128 entries."""

    codes: jax.Array
    scales: jax.Array


class Prepared(NamedTuple):
    """A weight whose products need the master weight no longer."""

    quantized: Quantized
    """[..., K, M], without a gradient."""
    weight: jax.Array
    """Read by no one: it is of the weight's shape and takes its gradient, in its own type."""


Weight = jax.Array | Prepared
Weights = Weight | tuple[Weight, ...]


def prepare(weight: jax.Array, dtype: jnp.dtype, implementation: str = "dot_general") -> Prepared:
    """Quantise a master weight [K, M] or [E, K, M] for products by this implementation; `dtype` is its gradient's."""
    wide = jax.lax.stop_gradient(weight).astype(jnp.float32)
    if implementation == "triton":
        from deepseek_jax.kernels.triton_quantize import quantize

        stack = quantize(wide.reshape(-1, *wide.shape[-2:]), SMALLEST_AMAX, in_blocks=True)
        quantized = Quantized(*(each.reshape(*wide.shape[:-2], *each.shape[1:]) for each in stack))
    else:
        quantized = Quantized(*quantize_blocks(wide))
    return Prepared(quantized, weight.astype(dtype))


def prepare_all(w: Weights, implementation: str) -> list[Prepared]:
    """One weight or several, of which those are quantised that are not yet."""
    weights: tuple[Weight, ...] = (w,) if isinstance(w, jax.Array | Prepared) else w
    return [each if isinstance(each, Prepared) else prepare(each, jnp.dtype("float32"), implementation) for each in weights]


def as_given(w: Weights, outputs: list[jax.Array]) -> Any:
    """Products with the weights as `w` asks for them: one, or a tuple."""
    return outputs[0] if isinstance(w, jax.Array | Prepared) else tuple(outputs)


def like(weights: list[Prepared]) -> list[jax.Array]:
    """Empty arrays of the types of their gradients."""
    return [jnp.zeros((0,), each.weight.dtype) for each in weights]


def gradients_of(gradients: list[jax.Array], types: list[jax.Array]) -> list[Prepared]:
    """Gradients of weights as those of `Prepared`; `types` is what `like` made of the weights."""
    return [Prepared(None, each.astype(own.dtype)) for each, own in zip(gradients, types)]  # type: ignore[arg-type]

"""Operands of float8 products, quantised ahead: weights before loops that multiply by them, rows before they travel.

Gradients pass by the codes: an operand that is quantised ahead has, beside them, an array that stands for the numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.precision.fp8 import SMALLEST_AMAX, quantize_blocks, quantize_tiles


class Quantized(NamedTuple):
    """A matrix in float8; each axis of `scales` is as long as that of `codes`, or has one scale for 128 entries."""

    codes: jax.Array
    scales: jax.Array


class Prepared(NamedTuple):
    """An operand whose products need the numbers themselves no longer."""

    quantized: Quantized
    """Without a gradient."""
    place: jax.Array
    """Read by no one: it has the numbers' shape, takes their gradient, and says in which type."""

    @property
    def dtype(self) -> jnp.dtype:
        """Of the gradient; of rows also that in which products with them come."""
        return self.place.dtype


Operand = jax.Array | Prepared
Operands = Operand | tuple[Operand, ...]
KERNELS = ("triton", "mosaic")
"""Implementations of the products by kernels for GPUs, which take operands that kernels quantise."""


def prepare_rows(x: Operand, implementation: str = "dot_general") -> Prepared:
    """Rows [N, K] in tiles of 1 x 128, for products by this implementation."""
    if isinstance(x, Prepared):
        return x
    rows = jax.lax.stop_gradient(x)
    if implementation in KERNELS:
        from deepseek_jax.kernels.triton_quantize import quantize

        codes, scales = quantize(rows[None], SMALLEST_AMAX)
        return Prepared(Quantized(codes[0], scales[0]), x)
    return Prepared(Quantized(*quantize_tiles(rows, axis=1)), x)


def prepare_weight(weight: jax.Array, dtype: jnp.dtype, implementation: str = "dot_general") -> Prepared:
    """A master weight [K, M] or [E, K, M] in blocks of 128 x 128; `dtype` is its gradient's."""
    wide = jax.lax.stop_gradient(weight).astype(jnp.float32)
    if implementation in KERNELS:
        from deepseek_jax.kernels.triton_quantize import quantize

        stack = quantize(wide.reshape(-1, *wide.shape[-2:]), SMALLEST_AMAX, in_blocks=True)
        quantized = Quantized(*(each.reshape(*wide.shape[:-2], *each.shape[1:]) for each in stack))
    else:
        quantized = Quantized(*quantize_blocks(wide))
    return Prepared(quantized, weight.astype(dtype))


def prepare_weights(w: Operands, implementation: str) -> list[Prepared]:
    """One weight or several, of which those are quantised that are not yet."""
    weights: tuple[Operand, ...] = (w,) if isinstance(w, jax.Array | Prepared) else w
    wide = jnp.dtype("float32")
    return [each if isinstance(each, Prepared) else prepare_weight(each, wide, implementation) for each in weights]


def as_given(w: Operands, outputs: list[jax.Array]) -> Any:
    """Products with the weights as `w` asks for them: one, or a tuple."""
    return outputs[0] if isinstance(w, jax.Array | Prepared) else tuple(outputs)


def like(weights: list[Prepared]) -> list[jax.Array]:
    """Empty arrays of the types of their gradients."""
    return [jnp.zeros((0,), each.dtype) for each in weights]


def gradient_of(numbers: jax.Array) -> Prepared:
    """The gradient of a `Prepared`, from that of the numbers."""
    return Prepared(None, numbers)  # type: ignore[arg-type]


def part(operand: Operand) -> tuple[Quantized | None, jax.Array]:
    """What no gradient goes to, if anything, and what takes it; `join` puts them together."""
    return (operand.quantized, operand.place) if isinstance(operand, Prepared) else (None, operand)


def join(quantized: Quantized | None, place: jax.Array) -> Operand:
    """Inverse of `part`."""
    return place if quantized is None else Prepared(quantized, place)


def to_bytes(rows: Quantized) -> jax.Array:
    """Rows of codes [N, K], each with its scales behind it: uint8 [N, K + 4 ceil(K/128)]."""
    scales = jax.lax.bitcast_convert_type(rows.scales, jnp.uint8).reshape(len(rows.scales), -1)
    return jnp.concatenate([jax.lax.bitcast_convert_type(rows.codes, jnp.uint8), scales], axis=1)


def from_bytes(rows: jax.Array, width: int) -> Quantized:
    """Inverse of `to_bytes`, of rows of `width` numbers."""
    codes = jax.lax.bitcast_convert_type(rows[:, :width], jnp.float8_e4m3fn)
    return Quantized(codes, jax.lax.bitcast_convert_type(rows[:, width:].reshape(len(rows), -1, 4), jnp.float32))

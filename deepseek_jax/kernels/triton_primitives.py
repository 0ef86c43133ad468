"""What Pallas' Triton lowering lacks for float8: its product on Hopper's tensor cores, and the IEEE quotient.

Both stand on private interfaces of JAX: this is the one place to mend if those change.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.triton import dialect as triton_dialect
from jax._src.pallas.triton import lowering as triton_lowering
from jax.extend.core import Primitive
from jax.interpreters import mlir


def _primitive(name: str, interpreted: Callable[..., jax.Array], lowered: Callable[..., Any]) -> Primitive:
    """An operation whose result is like its last operand."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda *operands: operands[-1])
    mlir.register_lowering(primitive, mlir.lower_fun(interpreted, multiple_results=False))
    triton_lowering.register_lowering(primitive)(lowered)
    return primitive


def float8_dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """left [N, K] times right [M, K], both float8_e4m3fn: [N, M] float32, for which the tensor cores add all K products.

    Triton takes wgmma on E4M3 only if told that so many may be added in the tensor cores' own precision, some 14 bits; it is
    not by Pallas' `dot`, and then multiplies in float16 at half the rate or less.
    """
    return _float8_dot.bind(left, right, jnp.zeros((left.shape[0], right.shape[0]), jnp.float32))


def _float8_dot_interpreted(left: jax.Array, right: jax.Array, zeros: jax.Array) -> jax.Array:
    return zeros + lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _float8_dot_lowered(context: Any, left: Any, right: Any, zeros: Any) -> Any:
    depth = context.avals_in[0].shape[1]
    return triton_dialect.dot(left, triton_dialect.trans(right, (1, 0)), zeros, max_num_imprecise_acc=depth)


_float8_dot = _primitive("float8_dot", _float8_dot_interpreted, _float8_dot_lowered)


def quotient(x: jax.Array, by: jax.Array) -> jax.Array:
    """x / by, rounded once, of float32; Triton's own division errs in the last bits. `by` is broadcast."""
    return _quotient.bind(x, jnp.broadcast_to(by, x.shape))


def _quotient_interpreted(x: jax.Array, by: jax.Array) -> jax.Array:
    # As in `precision.fp8`: a divisor that does not depend on x would be turned into a factor.
    return x / jnp.where(jnp.isnan(x), jnp.nan, by)


def _quotient_lowered(context: Any, *operands: Any) -> Any:
    return triton_dialect.precise_divf(*map(triton_lowering._ensure_ir_value, operands, context.avals_in))


_quotient = _primitive("quotient", _quotient_interpreted, _quotient_lowered)

"""The tile product of float8 that Hopper's tensor cores make, which Pallas' own `dot` does not ask for.

Triton takes wgmma on E4M3 operands only if told that so many products may be added in the tensor cores' own precision (some
14 bits); JAX's lowering does not tell it, and then Triton multiplies in float16 at half the rate or less. So this primitive
has its own lowering, of a private interface of JAX: the one place to mend if that changes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.triton import dialect as triton_dialect
from jax._src.pallas.triton import lowering as triton_lowering
from jax.extend.core import Primitive
from jax.interpreters import mlir

_float8_dot = Primitive("float8_dot")


def float8_dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """left [N, K] times right [M, K], both float8_e4m3fn: [N, M] float32, of which the tensor cores add all K products."""
    return _float8_dot.bind(left, right, jnp.zeros((left.shape[0], right.shape[0]), jnp.float32))


@_float8_dot.def_abstract_eval
def _result(left: Any, right: Any, zeros: Any) -> Any:
    return zeros


def _interpreted(left: jax.Array, right: jax.Array, zeros: jax.Array) -> jax.Array:
    return zeros + lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


mlir.register_lowering(_float8_dot, mlir.lower_fun(_interpreted, multiple_results=False))


@triton_lowering.register_lowering(_float8_dot)
def _lowered(context: Any, left: Any, right: Any, zeros: Any) -> Any:
    depth = context.avals_in[0].shape[1]
    return triton_dialect.dot(left, triton_dialect.trans(right, (1, 0)), zeros, max_num_imprecise_acc=depth)

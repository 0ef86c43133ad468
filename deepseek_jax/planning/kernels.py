"""What kernels do inside a custom call, for which the compilers have no estimate: operations and bytes.

A kernel that states its own figures is believed; for the others the formula is here. Either way the time is that of
`KERNEL_SHARE` of the machine's peak, ours and others' alike.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepseek_jax.planning.program import Array, Instruction


class Work(NamedTuple):
    """Of one run of a kernel."""

    flops: int
    bytes: int


Operands = Sequence[Array]


def kernel_name(instruction: Instruction) -> str | None:
    """What a custom call runs; null if it is no kernel."""
    if instruction.opcode != "custom-call":
        return None
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    if target is None or not any(word in target[1] for word in ("tpu_custom_call", "triton", "mosaic_gpu", "fmha", "cublas")):
        return None
    if "fmha" in target[1] or "cublas" in target[1]:
        return target[1]
    within = re.search(
        r'op_name="[^"]*?([^"/()]+)\)?(?:/(?:pallas_call|mpmd_map))+"', instruction.rest
    )  # the last name around the call
    return within[1] if within else re.sub(r"[.\d]+$", "", instruction.name)


def kernel_work(name: str, instruction: Instruction, operands: Operands, even_rows: int | None) -> Work | None:
    """Operations and bytes of a kernel; null if nothing is known of it.

    Args:
        even_rows: rows that a grouped product works on under even routing, where there is room for more.
    """
    moved = sum(array.bytes for array in (*operands, *instruction.results))
    formula = next((count for word, count in FORMULAS.items() if word in name), None)
    stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.rest)
    if formula is not None:
        flops = formula(operands, instruction.results)
    elif stated is not None:
        flops = int(stated[1])
    else:
        return None
    if even_rows is not None and _is_grouped(name, operands, instruction.results):
        flops = flops * even_rows // max(_rows_worked_on(name, operands, instruction.results), even_rows)
    return Work(flops, moved)


def _is_grouped(name: str, operands: Operands, results: Operands) -> bool:
    """By its name, or, where XLA has left none, by operands that say where each matrix of a stack has its rows."""
    stacks = {array.shape[0] for array in (*operands, *results) if len(array.shape) == 3}
    tables = {array.shape[0] for array in operands if array.dtype == "s32" and len(array.shape) == 1}
    return any(word in name for word in GROUPED) or any(stack + 1 in tables for stack in stacks)


def _rows_worked_on(name: str, operands: Operands, results: Operands) -> int:
    if "of_rows_fp8" in name:
        tiles = _codes(operands)[0]
        return tiles.shape[0] * tiles.shape[2]
    if len(results[0].shape) == 3 and "grouped_matmul" not in name:  # tgmm, which may read the rows' transpose
        return max((max(array.shape) for array in operands if len(array.shape) == 2), default=0)
    return _rows(operands)


def _rows(operands: Operands) -> int:
    return max((array.shape[0] for array in operands if len(array.shape) == 2), default=0)


def _codes(operands: Operands) -> list[Array]:
    return [array for array in operands if array.dtype.startswith("f8")]


def _attention(widths: Callable[[int, int, bool], int], keys: int = -2) -> Callable[[Operands, Operands], int]:
    """Causal: half of the pairs of a query and a key meet.

    Args:
        keys: which of a key's axes counts them: in cuDNN's layout here, [B, T, H, D], not the last but one.
        widths: of all products that a pair is part of, by the widths of a key and a value, and whether the kernel returns
            the queries' gradient in parts, one for each block of keys.
    """

    def count(operands: Operands, results: Operands) -> int:
        q, k, v = [array for array in operands if len(array.shape) >= 3 and array.dtype in ("bf16", "f16", "f32")][:3]
        pairs = math.prod(q.shape[:-1]) * k.shape[keys]
        in_parts = any(len(array.shape) > len(q.shape) for array in results)
        return pairs * widths(q.shape[-1], v.shape[-1], in_parts)

    return count


def _grouped(operands: Operands, results: Operands) -> int:
    """Each row meets one matrix of every stack, read or made."""
    return sum(2 * _rows(operands) * math.prod(array.shape[1:]) for array in (*operands, *results) if len(array.shape) == 3)


def _fp8(operands: Operands, results: Operands) -> int:
    """As above; scales multiply nothing."""
    return _grouped(_codes(operands), ())


def _fp8_of_rows(operands: Operands, results: Operands) -> int:
    """[T, K, 128] by [T, M, 128]: every tile's rows give a product [K, M]."""
    left, right = _codes(operands)
    return 2 * math.prod(left.shape) * right.shape[1]


GROUPED = ("gmm", "grouped_matmul")
"""Part of the name of a kernel that multiplies rows by the weights of their groups."""
FORMULAS = {
    # Ours: JAX does not pass a Triton kernel's own estimate on.
    "quantize": lambda operands, results: 0,
    "of_rows_fp8": _fp8_of_rows,
    "matmul_fp8": _fp8,
    "grouped_matmul": _grouped,
    "splash_mha_fwd": _attention(lambda d, v, _: d + v),
    "splash_mha_dkv": _attention(lambda d, v, is_fused: 3 * d + 2 * v if is_fused else 2 * d + 2 * v),
    "splash_mha_dq": _attention(lambda d, v, _: 2 * d + v),  # MaxText's default: makes scores again, as dkv does
    "fmhaSoftmaxBackward": _attention(lambda d, v, _: 3 * d + 2 * v, keys=1),
    "fmhaSoftmax": _attention(lambda d, v, _: d + v, keys=1),
}
"""Part of a kernel's name -> its operations."""

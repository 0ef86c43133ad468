"""Operations that matrix products take, counted from a compiled program's own instructions: two for each multiply-add."""

import math
import re
from collections.abc import Sequence

from deepseek_jax.planning.program import Array, Instruction


def product_flops(instruction: Instruction, operands: Sequence[Array]) -> int:
    """Of one instruction; 0 if it is no product."""
    if instruction.opcode == "dot":
        return _dot(instruction, operands[0])
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands[0], operands[1])
    return 0


def _dot(instruction: Instruction, left: Array) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    summed = math.prod(left.shape[int(dim)] for dim in contracted[1].split(",") if dim) if contracted else 1
    return 2 * summed * math.prod(instruction.results[0].shape)


def _convolution(instruction: Instruction, left: Array, right: Array) -> int:
    """As the TPU's compiler writes products: batch and further contracted axes are windows.

    Padding and the holes of a dilation are not counted.
    """
    ((of_left, of_right, of_result),) = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    result = instruction.results[0].shape
    features = result[of_result.index("b")] * result[of_result.index("f")] * right.shape[of_right.index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or ["", ""])[1]))
    axes = sorted(label for label in of_result if label.isdigit())

    def of_axis(name: str, number: int, default: int) -> list[int]:
        given = window.get(name)
        return [int(n) for n in given.split("x")[number].split("_")] if given else [default]

    pairs = 1
    for number, axis in enumerate(axes):
        size, stride = of_axis("size", number, 1)[0], of_axis("stride", number, 1)[0]
        low = of_axis("pad", number, 0)[0]
        holes, steps = of_axis("lhs_dilate", number, 1)[0], of_axis("rhs_dilate", number, 1)[0]
        places, outputs = left.shape[of_left.index(axis)], result[of_result.index(axis)]
        pairs *= _pairs(size, stride, low, holes, steps, places, outputs)
    return 2 * features * pairs


def _pairs(size: int, stride: int, low: int, holes: int, steps: int, places: int, outputs: int) -> int:
    """(output, window element) that meet an element of the input rather than padding or a hole."""
    last = (places - 1) * holes
    return sum(
        0 <= (at := output * stride + element * steps - low) <= last and at % holes == 0
        for output in range(outputs)
        for element in range(size)
    )

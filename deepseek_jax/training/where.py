"""How it is told where numbers stopped being finite, in Hugging Face's names; for both siblings."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

MOST = 4
"""Modules that are named one by one."""


class Found(NamedTuple):
    """Where it began."""

    passed: str
    """`forward` or `backward`."""
    part: int
    """Number of the micro-batch, from 1, among `parts`."""
    parts: int
    modules: Sequence[str]


def describe(found: Optional[Found]) -> str:
    """In words; None is what does not happen again."""
    if found is None:
        return "made again, the same batch gives finite numbers, so look at the machine"
    more = len(found.modules) - MOST
    modules = ", ".join(found.modules[:MOST]) + (f" and {more} more" if more > 0 else "")
    return f"it began in the {found.passed} pass of micro-batch {found.part} of {found.parts}, in {modules}"


def too_many_skips(step: int, numbers: str, where: str, skipped: int) -> str:
    """The last words of a run whose every step is no number."""
    return (
        f"step {step}: {numbers}: {where}; {skipped} such steps in a row are train.max_skips: lower train.learning_rate, look "
        f"at the data, and go on from the last checkpoint"
    )


def backward_modules(tensors: Iterable[str]) -> list[str]:
    """The modules whose gradients go bad first, of the tensors whose gradients are bad at last.

    Backward from the loss all is finite down to the layer where it began, and little after it: of the layers the last
    one counts, and the head and the last norm before them.
    """
    layers: dict[int, list[str]] = {}
    for name in tensors:
        number = re.match(r"model\.layers\.(\d+)\.", name)
        order = int(number[1]) if number else {"lm_head": 10**6, "model.norm": 10**6}.get(name.rpartition(".")[0], -1)
        module = re.sub(r"\.experts\.\d+\.", ".experts.*.", name.rpartition(".")[0])
        layers.setdefault(order, []).append(module)
    return list(dict.fromkeys(layers[max(layers)]))

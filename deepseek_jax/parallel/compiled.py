"""A compiled program's own text, read as instructions with the number of times that each runs.

XLA counts the body of a loop once, whatever it counts. Here every instruction comes with the trip counts of the loops
around it, as far as the compiler knew them.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Array(NamedTuple):
    """Type and shape of an array as one device sees it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Without padding; a boolean takes one."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[0]) if bits else 0  # tokens and the like have none
        return -(-math.prod(self.shape) * width // 8)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    """What it makes, tuples within tuples flattened."""
    operands: tuple[str, ...]
    """Names of the instructions that make them."""
    rest: str
    """Of the line, from the operands on."""

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations that it runs, by the names under which it has them."""
        named = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return [name for names in named for name in re.findall(r"[\w.\-]+", names)]


class Visit(NamedTuple):
    """An instruction where it runs."""

    instruction: Instruction
    operands: tuple[Array, ...]
    depth: int
    """Computations around it: 0 for the program's own lines."""
    times: int
    """Runs in one execution of the program, every open loop passed once."""
    open_loops: tuple[str, ...]
    """Names of the enclosing loops, the outermost first, of which the compiler does not know the number of passes."""


def visits(text: str) -> Iterator[Visit]:
    """Every instruction that one device runs, in each place that it is run from.

    Args:
        text: `compiled.as_text()` of `jax.jit(...).lower(...).compile()`. Of branches all are taken to run.
    """
    computations, entry = computations_of(text)
    made = {i.name: i.results for instructions in computations.values() for i in instructions}

    def within(computation: str, depth: int, times: int, open_loops: tuple[str, ...]) -> Iterator[Visit]:
        for instruction in computations[computation]:
            operands = tuple(array for name in instruction.operands for array in made.get(name, ()))
            yield Visit(instruction, operands, depth, times, open_loops)
            if instruction.opcode == "while":
                (condition,) = instruction.called("condition")
                passes = annotated_passes(instruction) or counted_passes(computations[condition])
                inside = (times * passes, open_loops) if passes else (times, (*open_loops, instruction.name))
                for name in (condition, *instruction.called("body")):
                    yield from within(name, depth + 1, *inside)
            elif not instruction.opcode.endswith(("-update", "-done")):  # they name again what their start has run
                for name in instruction.called("calls", "to_apply", "branch_computations", "true_computation",
                                               "false_computation", "called_computations"):  # fmt: skip
                    yield from within(name, depth + 1, times, open_loops)

    return within(entry, 0, 1, ())


def dot_flops(visit: Visit) -> int:
    """Of a visited `dot`: two for each multiplication and addition."""
    left, _ = visit.operands
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", visit.instruction.rest)[1]
    summed = math.prod(left.shape[int(dim)] for dim in contracted.split(",") if dim)
    return 2 * summed * math.prod(visit.instruction.results[0].shape)


def annotated_passes(loop: Instruction) -> int | None:
    """How often a loop runs, by a note that XLA left at it."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(known[1]) if known else None


def counted_passes(condition: list[Instruction]) -> int | None:
    """How often a loop runs, by its condition; the TPU's compiler leaves no note.

    What is carried is less than a constant: then it counts from zero, as all loops that come from `scan` do.
    """
    made = {i.name: i for i in condition}
    compare = next((i for i in condition if i.opcode == "compare" and "direction=LT" in i.rest), None)
    if compare is None or sorted(i.opcode for i in condition) != ["compare", "constant", "get-tuple-element", "parameter"]:
        return None
    bound = made[compare.operands[1]]
    return int(re.match(r"\((-?\d+)\)", bound.rest)[1]) if bound.opcode == "constant" else None


def computations_of(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions by the name of their computation, and the name of the one that runs first."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and current is not None and (parts := re.match(r" +(?:ROOT )?%?([\w.\-]+) = ", line)):
            current.append(_instruction(parts[1], line[parts.end() :]))
    if entry is None:
        raise ValueError("not the text of a compiled program: it has no ENTRY")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closed(rest) if rest.startswith("(") else rest.index(" ")
    results, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closed(rest)
    return Instruction(name, opcode, _arrays(results), tuple(re.findall(r"%([\w.\-]+)", rest[:end])), rest)


def _arrays(text: str) -> tuple[Array, ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", text)
    return tuple(Array(dtype, tuple(int(n.lstrip("<=")) for n in shape.split(",") if n)) for dtype, shape in found)


def _closed(text: str) -> int:
    """Where the bracket that opens a text is closed."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return place.end()
    raise ValueError(f"a bracket is not closed: {text[:80]}")

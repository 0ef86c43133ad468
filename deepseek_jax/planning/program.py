"""A compiled program's own text, read as instructions with the number of times that each runs.

XLA counts the body of a loop once, whatever it counts. Here every instruction comes with the trip counts of the loops
around it, as far as the compiler knew them.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

TRANSPARENT = ("call", "call-start", "async-start")
"""Opcodes whose computation's instructions run one by one."""


class Array(NamedTuple):
    """Type and shape of an array as one device sees it."""

    dtype: str
    shape: tuple[int, ...]

    layout: str = ""
    """As XLA writes it: the order of the axes, tiles, the memory space; where none is written, empty."""

    @property
    def bytes(self) -> int:
        """Without padding; a boolean takes one."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[0]) if bits else 0  # tokens and the like have none
        return -(-math.prod(self.shape) * width // 8)

    @property
    def in_main_memory(self) -> bool:
        """Whether it lives there, and not on the core or the host."""
        return "S(" not in self.layout

    @property
    def padded_bytes(self) -> int:
        """With what the tiles of its layout leave empty."""
        order, _, tiles = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if not tile or not self.shape:
            return self.bytes
        sides = [int(side) for side in tile[1].split(",")]
        sizes = [self.shape[int(axis)] for axis in reversed(order.split(","))]  # the slowest first
        if len(sides) > len(sizes):
            sizes = [1] * (len(sides) - len(sizes)) + sizes
        last = len(sizes) - len(sides)
        padded = sizes[:last] + [-(-size // side) * side for size, side in zip(sizes[last:], sides)]
        return self.bytes * math.prod(padded) // max(math.prod(self.shape), 1)


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


class Program:
    """A compiled program.

    Args:
        text: `compiled.as_text()` of `jax.jit(...).lower(...).compile()`.

    Raises:
        ValueError: the text is no compiled program.

    Attributes:
        computations: instructions by the name of their computation, in the order in which they run.
        entry: the computation that runs first.
    """

    def __init__(self, text: str):
        self.computations, self.entry = computations_of(text)
        self._made = {i.name: i.results for instructions in self.computations.values() for i in instructions}

    def operands(self, instruction: Instruction) -> tuple[Array, ...]:
        """What an instruction reads, tuples within tuples flattened."""
        return tuple(array for name in instruction.operands for array in self._made.get(name, ()))


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
    part_of: str = ""
    """The fusion, reduction or the like around it, which runs as one; none if it runs by itself."""
    branches: tuple[tuple[str, int], ...] = ()
    """The conditionals around it and the number of the branch that it is in, the outermost first."""


def visits(text: str) -> Iterator[Visit]:
    """Every instruction that one device runs, in each place that it is run from.

    Args:
        text: `compiled.as_text()` of `jax.jit(...).lower(...).compile()`. Of branches all are taken to run.
    """
    program = Program(text)
    computations = program.computations

    def within(computation: str, around: Visit) -> Iterator[Visit]:
        for instruction in computations[computation]:
            here = around._replace(instruction=instruction, operands=program.operands(instruction))
            yield here
            inside = here._replace(depth=here.depth + 1)
            if instruction.opcode == "while":
                (condition,) = instruction.called("condition")
                passes = annotated_passes(instruction) or counted_passes(computations[condition])
                if passes:
                    inside = inside._replace(times=here.times * passes)
                else:
                    inside = inside._replace(open_loops=(*here.open_loops, instruction.name))
                for name in (condition, *instruction.called("body")):
                    yield from within(name, inside)
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations", "true_computation", "false_computation")
                for number, name in enumerate(branches):
                    yield from within(name, inside._replace(branches=(*here.branches, (instruction.name, number))))
            elif not instruction.opcode.endswith(("-update", "-done")):  # they name again what their start has run
                if instruction.opcode not in TRANSPARENT:
                    inside = inside._replace(part_of=here.part_of or instruction.name)
                for name in instruction.called("calls", "to_apply", "called_computations"):
                    yield from within(name, inside)

    nothing = Instruction("", "", (), (), "")
    return within(program.entry, Visit(nothing, (), 0, 1, ()))


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
    literal = re.match(r"\((-?\d+)\)", bound.rest) if bound.opcode == "constant" else None
    return int(literal[1]) if literal else None


def computations_of(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions by the name of their computation, and the name of the one that runs first."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    text = re.sub(r"(kernel_metadata=\{)\n(.*)\n(\})", r"\1\2\3", text)  # what a kernel says of itself breaks its line
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and current is not None and (parts := re.match(r" +(?:ROOT )?%?([\w.\-]+) = ", line)):
            current.append(_instruction(parts[1], line[parts.end() :]))
    if entry is None:
        raise ValueError("not the text of a compiled program: it has no ENTRY")
    return {name: _with_transfers_named(name, instructions) for name, instructions in computations.items()}, entry


def _with_transfers_named(computation: str, instructions: list[Instruction]) -> list[Instruction]:
    """What TPUs' fusions do with collectives, in the opcodes that it has outside of them.

    An all-reduce of which each device takes its part is a reduce-scatter. A collective that runs beside other work is
    named whole in each of a chain of fusions: the one that starts it, those that keep it going, and the one that awaits it.
    """
    if computation.startswith("all-reduce-scatter"):
        return [i._replace(opcode="reduce-scatter") if i.opcode == "all-reduce" else i for i in instructions]
    if not any(chain_of(i) for i in instructions):
        return instructions
    targets = " ".join(i.rest for i in instructions if i.opcode == "custom-call")
    step = next((step for step in ("Start", "Done") if f'"AsyncCollective{step}"' in targets), "Update").lower()
    return [i._replace(opcode=f"{i.opcode}-{step}") if chain_of(i) else i for i in instructions]


def chain_of(instruction: Instruction) -> str:
    """By which the fusions of an asynchronous collective know each other; empty for all else."""
    found = re.search(r'frontend_attributes=\{[^}]*chain_id="(\w+)"', instruction.rest)
    return found[1] if found else ""


def _instruction(name: str, rest: str) -> Instruction:
    end = _closed(rest) if rest.startswith("(") else rest.index(" ")
    results, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closed(rest)
    return Instruction(name, opcode, _arrays(results), tuple(re.findall(r"%([\w.\-]+)", rest[:end])), rest)


def _arrays(text: str) -> tuple[Array, ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", text)
    return tuple(
        Array(dtype, tuple(int(n.lstrip("<=")) for n in shape.split(",") if n), layout) for dtype, shape, layout in found
    )


def _closed(text: str) -> int:
    """Where the bracket that opens a text is closed."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return place.end()
    raise ValueError(f"a bracket is not closed: {text[:80]}")

"""What the devices of a mesh send each other, read from the compiled program.

compiled = jax.jit(step).lower(...).compile()
print(table(collectives(compiled.as_text(), mesh)))
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from deepseek_jax.planning.parts import is_overflow
from deepseek_jax.planning.program import Array, Instruction, visits

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Collective(NamedTuple):
    """One collective operation of a program, in one of the places that it runs in."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which devices talk to each other."""
    group: tuple[int, ...]
    """The first devices that talk to each other, by their numbers in the mesh; other groups are alike."""
    arrays: tuple[Array, ...]
    """What is whole on a device: the results of an all-gather, the operands of all others; of a ragged all-to-all
    the smaller of the array that rows leave and the one that they arrive in."""
    times: int
    """Executions in a step; within open loops, those with one pass of each."""
    open_loops: int
    """How many loops around it make a number of passes that only running it tells."""
    op_name: str
    """The way through the model's code."""

    @property
    def devices(self) -> int:
        """How many talk to each other."""
        return len(self.group)

    @property
    def overflow(self) -> bool:
        """Whether it runs only for tokens that found no room in the first round, so never under even routing."""
        return is_overflow(self.op_name)

    @property
    def bytes(self) -> int:
        """Of `arrays`, for one execution."""
        return sum(array.bytes for array in self.arrays)

    @property
    def sent(self) -> int:
        """Bytes that leave a device in one execution, by the algorithm that sends the fewest.

        (n - 1) / n of `bytes` for an all-gather, a reduce-scatter and an all-to-all between n devices, twice as much
        for an all-reduce, all of them for a collective-permute. For a ragged all-to-all, as if rows filled `arrays` and
        went to all devices alike: what it does under even routing, while `bytes` bounds the mean over devices under any.
        """
        if self.kind == "collective-permute":
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.devices - 1) // self.devices


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a step, each asynchronous pair of start and done as one.

    Args:
        text: `compiled.as_text()`.
        mesh: that the program was compiled for.
    """
    return [
        describe(visit.instruction, visit.operands, mesh, visit.times, len(visit.open_loops))
        for visit in visits(text)
        if is_collective(visit.instruction)
    ]


def total(found: Iterable[Collective], of: Callable[[Collective], int] = lambda one: one.sent) -> int:
    """Sum over a step's executions, every open loop passed once, without `overflow`.

    The bytes that leave a device unless told otherwise.
    """
    return sum(one.times * of(one) for one in found if not one.overflow)


def table(found: Iterable[Collective]) -> str:
    """Collectives summed up by kind and axes, to be printed; without `overflow`."""
    sums: dict[tuple[str, str, bool], list[int]] = {}
    for one in (one for one in found if not one.overflow):
        row = sums.setdefault((one.kind, " ".join(one.axes), one.open_loops > 0), [0, 0, 0])
        row[:] = row[0] + one.times, row[1] + one.times * one.sent, max(row[2], one.sent)
    lines = [f"{'collective':19}{'over':18}{'executions':>12}{'bytes sent by a device':>25}{'by the largest':>17}"]
    for (kind, axes, is_open), (times, sent, largest) in sorted(sums.items()):
        lines.append(f"{kind:19}{axes:18}{times:12,}{sent:25,}{largest:17,}{'  a pass' if is_open else ''}")
    if any(is_open for _, _, is_open in sums):
        lines.append("a pass: of the loops around it, whose number the routing decides; even routing needs one")
    return "\n".join(lines)


def is_collective(instruction: Instruction) -> bool:
    """Whether it is one of KINDS, or the start of one."""
    return instruction.opcode.removesuffix("-start") in KINDS


def describe(
    instruction: Instruction, operands: Sequence[Array], mesh: Mesh, times: int = 1, open_loops: int = 0
) -> Collective:
    """One of KINDS, synchronous or the start of it, that runs so many times within so many open loops."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-gather":
        repeated = len(instruction.results) // 2 if instruction.opcode.endswith("-start") else 0  # the operands
        arrays = instruction.results[repeated:]
    elif kind == "ragged-all-to-all":
        arrays = (min(operands[:2], key=lambda array: array.bytes),)
    else:
        arrays = tuple(operands)
    axes, group = _axes(instruction.rest, mesh)
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, axes, group, arrays, times, open_loops, name[1] if name else "")


def _axes(rest: str, mesh: Mesh) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Axes along which the devices of a group differ, and the first group."""
    groups = _groups(rest, mesh.size)
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)  # [groups, devices, axes]
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, differs in zip(mesh.axis_names, differ) if differs), tuple(groups[0].tolist())


def _groups(rest: str, devices: int) -> np.ndarray:
    """Numbers of the devices that talk to each other, [groups, devices of a group]; of pairs, source and target.

    XLA writes them out, or as a transposed range, or as axes of a mesh of its own.
    """
    if written := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", rest):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", written[1])]
        return np.array(groups or [tuple(range(devices))])
    if of_range := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _range(*of_range.groups()[1:]).reshape(_numbers(of_range[1]))
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}"
    if of_mesh := re.search(mesh, rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", of_mesh[1])}
        places = _range(of_mesh[2] or str(devices), of_mesh[3]).reshape(*sizes.values())
        along = [list(sizes).index(axis) for axis in re.findall(r"'([^']+)'", of_mesh[4])]
        return np.moveaxis(places, along, range(-len(along), 0)).reshape(-1, math.prod(places.shape[axis] for axis in along))
    raise ValueError(f"groups of devices written in an unknown way: {rest[:200]}")


def _range(shape: str, order: str | None) -> np.ndarray:
    """Numbers in the order that XLA writes as [4,2]T(1,0)."""
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order) if order else range(numbers.ndim))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))

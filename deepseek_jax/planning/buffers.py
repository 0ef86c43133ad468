"""Which arrays are alive when a program needs the most memory, by following its schedule.

The compilers say how much a program needs, not for what. Here every array lives from the instruction that makes it to the
last one that reads it; a result takes the place of an operand of its size that dies there, as XLA's own assignment has
it, be it what a loop carries or a program is given. The sum is an estimate; the compiler's figure stands beside it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from deepseek_jax.planning.parts import Part, part_of
from deepseek_jax.planning.program import Array, Instruction, Program
from deepseek_jax.planning.schedule import op_name

RENAMES = ("bitcast", "get-tuple-element", "tuple", "optimization-barrier", "copy-done", "while", "conditional", "call-done",
           "all-gather-done", "all-reduce-done", "collective-permute-done", "async-done", "async-update")  # fmt: skip
"""What makes no array of its own."""

AsIf = Callable[[Instruction, Array], Array]


class Buffer(NamedTuple):
    """An array that is alive at the fullest moment."""

    bytes: int
    array: str
    """Type and shape."""
    op_name: str
    part: Part


class Fullest(NamedTuple):
    """The moment at which temporaries need the most room."""

    bytes: int
    buffers: list[Buffer]
    """The largest first."""


def fullest_moment(program: Program, as_if: AsIf = lambda instruction, array: array) -> Fullest:
    """Follow a program's schedule. Its arguments count as nothing, for they are there all the time.

    Args:
        as_if: what each array that an instruction makes counts as, to follow the same program with larger ones.
    """
    total, alive = _Follower(program, as_if).peak(program.entry, may_overwrite=True)
    return Fullest(total, sorted(alive, reverse=True, key=lambda buffer: buffer.bytes))


class _Follower:
    def __init__(self, program: Program, as_if: AsIf):
        self._program = program
        self._as_if = as_if
        self._known: dict[str, tuple[int, list[Buffer]]] = {}

    def peak(self, computation: str, may_overwrite: bool) -> tuple[int, list[Buffer]]:
        """Most bytes at one moment of a computation and what they are.

        What it is given counts with its caller, and so does what takes its place, where it may be overwritten.
        """
        if computation not in self._known:
            self._known[computation] = self._follow(self._program.computations[computation], may_overwrite)
        return self._known[computation]

    def _follow(self, instructions: list[Instruction], may_overwrite: bool) -> tuple[int, list[Buffer]]:
        leaves = _leaves(instructions)
        last_read: dict[int, int] = {}
        for place, instruction in enumerate(instructions):
            for buffer in self._read(instruction, leaves):
                last_read[buffer] = place
        if instructions:  # what a computation returns outlives it
            last_read.update(dict.fromkeys(leaves[instructions[-1].name], len(instructions)))

        given = self._given(instructions, leaves) if may_overwrite else {}
        alive: dict[int, Buffer] = {}
        size, most, then = 0, 0, []
        for place, instruction in enumerate(instructions):
            made = self._made(instruction, leaves)
            dying = [buffer for buffer in self._read(instruction, leaves) if last_read[buffer] == place]
            for buffer, array in made:
                takes = array.padded_bytes
                taken = next((old for old in dying if takes in (given.get(old), old in alive and alive[old].bytes)), None)
                if taken is not None:
                    dying.remove(taken)
                if taken in given:
                    given[buffer] = given.pop(taken)
                    continue
                if taken is not None:
                    size -= alive.pop(taken).bytes
                path = op_name(instruction)
                shape = f"{array.dtype}[{','.join(map(str, array.shape))}]"
                alive[buffer] = Buffer(takes, shape, path, part_of(path))
                size += takes
            inner, within = self._inside(instruction)
            if size + inner > most:
                most, then = size + inner, [*alive.values(), *within]
            for buffer in {*dying, *(buffer for buffer, _ in made if buffer not in last_read)}:
                if buffer in alive:
                    size -= alive.pop(buffer).bytes
        return most, then

    def _inside(self, instruction: Instruction) -> tuple[int, list[Buffer]]:
        if instruction.opcode == "while":
            names = instruction.called("body")
        elif instruction.opcode == "conditional":
            names = instruction.called("branch_computations", "true_computation", "false_computation")
        elif instruction.opcode == "call":
            names = instruction.called("to_apply")
        else:
            return 0, []
        is_loop = instruction.opcode == "while"
        return max((self.peak(name, is_loop) for name in names), key=lambda peak: peak[0], default=(0, []))

    def _read(self, instruction: Instruction, leaves: dict[str, list[int]]) -> Iterable[int]:
        if instruction.opcode in ("tuple", "get-tuple-element", "bitcast"):
            return ()
        return [buffer for name in instruction.operands for buffer in leaves.get(name, ())]

    def _made(self, instruction: Instruction, leaves: dict[str, list[int]]) -> list[tuple[int, Array]]:
        if instruction.opcode in (*RENAMES, "parameter"):
            return []
        return self._in_memory(instruction, leaves)

    def _given(self, instructions: list[Instruction], leaves: dict[str, list[int]]) -> dict[int, int]:
        parameters = [instruction for instruction in instructions if instruction.opcode == "parameter"]
        return {buffer: array.padded_bytes for each in parameters for buffer, array in self._in_memory(each, leaves)}

    def _in_memory(self, instruction: Instruction, leaves: dict[str, list[int]]) -> list[tuple[int, Array]]:
        pairs = [
            (buffer, self._as_if(instruction, array)) for buffer, array in zip(leaves[instruction.name], instruction.results)
        ]
        return [(buffer, array) for buffer, array in pairs if array.in_main_memory and array.bytes]


def _leaves(instructions: list[Instruction]) -> dict[str, list[int]]:
    """For each instruction the numbers of the buffers that its result lies in, one for each array of it."""
    leaves: dict[str, list[int]] = {}
    count = 0
    for instruction in instructions:
        of_operands = [leaves.get(name, []) for name in instruction.operands]
        if instruction.opcode == "get-tuple-element" and of_operands:
            index = int(instruction.rest.partition("index=")[2].split(",")[0].split("}")[0].split(" ")[0])
            whole = of_operands[0]
            leaves[instruction.name] = whole[index : index + 1] if len(instruction.results) == 1 else whole
        elif instruction.opcode == "tuple":
            leaves[instruction.name] = [buffer for operand in of_operands for buffer in operand]
        elif instruction.opcode in RENAMES and of_operands and of_operands[0]:
            leaves[instruction.name] = of_operands[0][-len(instruction.results) :] if instruction.results else []
        else:
            leaves[instruction.name] = list(range(count, count + len(instruction.results)))
            count += len(instruction.results)
    return leaves

"""A compiled program played through: which operation takes how long, and which collectives other work hides.

Operations run one after the other in the order that the compiler scheduled. A collective that the program starts in one
place and awaits in another runs beside what stands between (`planning.in_flight`); what of it is left at the second place is
waited for. Loops count as often as they run, and once where only the data tell how often.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from deepseek_jax.planning.collectives import Collective, is_collective
from deepseek_jax.planning.costs import Cost
from deepseek_jax.planning.in_flight import InFlight, Transfer
from deepseek_jax.planning.parts import Part, is_overflow, part_of
from deepseek_jax.planning.program import Array, Instruction, Program, annotated_passes, chain_of, counted_passes


class Entry(NamedTuple):
    """What one instruction adds to a step."""

    name: str
    op_name: str
    part: Part
    times: int
    """Runs in a step, every open loop passed once."""
    seconds: float
    """Of all these runs; of a collective, what is waited for it."""
    hidden: float = 0.0
    """Seconds of a collective that run under other work."""
    flops: int = 0
    kernel: str = ""
    collective: Collective | None = None
    is_known: bool = True


class Timeline(NamedTuple):
    """A whole step."""

    seconds: float
    entries: list[Entry]
    open_loops: list[str]
    """Where loops stand whose number of passes depends on data, by `op_name`: one is counted, but none of the exchange's
    further rounds, which routing near even has no need of."""


def play(
    program: Program,
    cost: Callable[[Instruction, Sequence[Array]], Cost],
    collective: Callable[[Instruction, Sequence[Array], int], Collective],
    link_seconds: Callable[[Collective], float],
) -> Timeline:
    """Play a program through.

    Args:
        cost: of what runs by itself.
        collective: describes an instruction that `is_collective` and runs so many times.
        link_seconds: of one execution of a collective.
    """
    return _Player(program, cost, collective, link_seconds).whole()


class _Player:
    def __init__(self, program: Program, cost: Callable, collective: Callable, link_seconds: Callable):
        self._program, self._cost, self._collective, self._link_seconds = program, cost, collective, link_seconds
        self._open_loops: dict[str, str] = {}

    def whole(self) -> Timeline:
        entries, seconds = self._run(self._program.entry, 1)
        return Timeline(seconds, entries, list(self._open_loops.values()))

    def _run(self, computation: str, times: int) -> tuple[list[Entry], float]:
        """Entries of a computation that runs so often, and the seconds of one run."""
        clock, entries, under_way = 0.0, [], InFlight()
        for instruction, operands in self._inline(computation):
            seconds = 0.0
            """Of other work, or waited."""
            kind = self._kind(instruction)
            if instruction.opcode in ("while", "conditional"):
                inner, seconds = self._nested(instruction, times)
                entries += inner
                under_way.work(seconds)
            elif (started := self._awaited(instruction, under_way.started)) is not None:
                transfer, seconds = under_way.wait(started)
                entries.append(self._transfer(instruction, times, transfer, seconds))
            elif kind is not None:
                told = self._collective(kind, self._program.operands(kind), times)
                name = chain_of(kind) or instruction.name
                under_way.start(name, told, self._link_seconds(told))
                if not (instruction.opcode.endswith("-start") or kind.opcode.endswith("-start")):
                    transfer, seconds = under_way.wait(name)
                    entries.append(self._transfer(instruction, times, transfer, seconds))
            else:
                cost = self._cost(instruction, operands)
                seconds = cost.seconds
                under_way.work(seconds)
                if cost.seconds or cost.flops or cost.kernel:
                    entries.append(self._operation(instruction, times, cost))
            clock += seconds
        return entries, clock

    def _inline(self, computation: str) -> Iterator[tuple[Instruction, Sequence[Array]]]:
        """Instructions of a computation, with those of what it merely calls in place of the call."""
        for instruction in self._program.computations[computation]:
            if instruction.opcode == "call":
                for name in instruction.called("to_apply"):
                    yield from self._inline(name)
            else:
                yield instruction, self._program.operands(instruction)

    def _kind(self, instruction: Instruction) -> Instruction | None:
        """The collective that an instruction is, or starts, or is made of; null if there is none."""
        if is_collective(instruction):
            return instruction
        if instruction.opcode in ("async-start", "call-start", "fusion"):  # a call is of a core beside, on v6e and tpu7x
            for name in instruction.called("to_apply" if instruction.opcode == "call-start" else "calls"):
                for inner in self._program.computations.get(name, ()):
                    if (found := self._kind(inner)) is not None:
                        return found
        return None

    def _awaited(self, instruction: Instruction, running: Iterable[str]) -> str | None:
        """Which of the running collectives an instruction waits for."""
        if instruction.opcode.endswith("-done"):
            return next((name for name in instruction.operands if name in running), None)
        inside = (inner for name in instruction.called("calls") for inner in self._program.computations.get(name, ()))
        return next(
            (chain_of(inner) for inner in inside if inner.opcode.endswith("-done") and chain_of(inner) in running), None
        )

    def _nested(self, instruction: Instruction, times: int) -> tuple[list[Entry], float]:
        """Entries and seconds of one run of a loop or of the costliest branch of a conditional."""
        computations = self._program.computations
        if instruction.opcode == "conditional":
            branches = instruction.called("branch_computations", "true_computation", "false_computation")
            return max((self._run(name, times) for name in branches), key=lambda branch: branch[1])
        (condition,), (body,) = instruction.called("condition"), instruction.called("body")
        passes = annotated_passes(instruction) or counted_passes(computations[condition])
        if passes is None:
            path = self._open_loops[instruction.name] = op_name(instruction)
            if is_overflow(path):
                return [], 0.0
            passes = 1
        parts = [self._run(name, times * passes) for name in (condition, body)]
        return [entry for entries, _ in parts for entry in entries], passes * sum(seconds for _, seconds in parts)

    def _operation(self, instruction: Instruction, times: int, cost: Cost) -> Entry:
        path = op_name(instruction)
        return Entry(
            instruction.name,
            path,
            part_of(path),
            times,
            times * cost.seconds,
            flops=times * cost.flops,
            kernel=cost.kernel,
            is_known=cost.is_known,
        )

    def _transfer(self, instruction: Instruction, times: int, done: Transfer, waited: float) -> Entry:
        path = op_name(instruction)
        told = done.collective
        return Entry(instruction.name, path, part_of(path), times, times * waited, times * done.hidden, collective=told)


def op_name(instruction: Instruction) -> str:
    """The way through the model's code that an instruction comes from; empty if XLA left none."""
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""

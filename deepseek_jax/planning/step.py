"""One training step as a compiler made it: what it holds, sends and takes, read from its text."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.planning.buffers import Fullest, fullest_moment
from deepseek_jax.planning.collectives import describe
from deepseek_jax.planning.costs import Costs
from deepseek_jax.planning.layout import reporting, temporary_bytes
from deepseek_jax.planning.links import Links
from deepseek_jax.planning.program import Program
from deepseek_jax.planning.schedule import Entry, Timeline, play
from deepseek_jax.planning.topologies import Topology

LARGEST = 8
"""Operations and arrays that a table names."""


@dataclass(frozen=True)
class CompiledText:
    """What is kept of a compilation: enough to read everything else from, without compiling again."""

    text: str
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    """Without those that lie in the place of arguments."""
    compile_seconds: float


@dataclass(frozen=True)
class PartTime:
    """Seconds of a step that one part of the model takes in one pass, and what its products would take at the peak."""

    part: str
    of_pass: str
    seconds: float
    ideal_seconds: float
    flops: float


@dataclass(frozen=True)
class Transfer:
    """A kind of collective over the same mesh axes, summed over a step."""

    kind: str
    over: str
    """Mesh axes, and the number of devices that talk to each other along them."""
    executions: int
    bytes: int
    """That leave a device."""
    waited_seconds: float
    hidden_seconds: float
    """Under other work."""


@dataclass(frozen=True)
class Line:
    """One operation, kernel or array among the largest."""

    name: str
    where: str
    size: float
    """Seconds, or bytes."""
    times: int = 1


@dataclass(frozen=True)
class StepFigures:
    """All that is read from one compiled step, for one device."""

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    memory_bytes: int
    """That a device has."""
    compile_seconds: float
    seconds: float
    """Estimated, of the whole step."""
    once_seconds: float
    """Of the whole step if every loop turned once, waits for links apart: a measure that layers alike do not lengthen."""
    loop_seconds: float
    """Of that what is in loops: one layer of each kind that is in a stack of several."""
    flops: float
    """Of its products, those made again included."""
    parts: list[PartTime]
    transfers: list[Transfer]
    slowest: list[Line]
    kernels: list[Line]
    unknown_kernels: list[str]
    """Kernels that count as nothing, for nothing is known of their work."""
    open_loops: list[str]
    """Loops whose number of passes depends on data, each counted as one pass."""
    fullest_bytes: int
    """By following the schedule; beside `temporary_bytes`, which is the compiler's."""
    fullest: list[Line] = field(default_factory=list)

    @property
    def needed_bytes(self) -> int:
        """Arguments, temporaries, and results that have no argument's place."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes

    @property
    def fits(self) -> bool:
        """Whether a device has that much."""
        return self.needed_bytes <= self.memory_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"needed_bytes": self.needed_bytes, "fits": self.fits}


def compile_text(config: Config, devices: Sequence[Any]) -> CompiledText:
    """Compile the step of a run over these devices; see `training.ahead.compile_step`."""
    from deepseek_jax.training.ahead import compile_step

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_step(config, devices, reporting(devices[0].platform, folder)).compiled
        laid_out = temporary_bytes(folder)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise RuntimeError(f"the compiler for {devices[0].device_kind} tells nothing of its programs")
    return CompiledText(
        text,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes if laid_out is None else laid_out,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        time.monotonic() - start,
    )


def read_step(compiled: CompiledText, mesh: Any, topology: Topology, even_rows: int | None) -> StepFigures:
    """Everything that the program's text tells.

    Args:
        mesh: that it was compiled for.
        even_rows: rows of a device's experts under even routing, for all its sequences of one accumulation part.
    """
    program, machine = Program(compiled.text), topology.machine
    timeline = timeline_of(program, mesh, topology, even_rows)
    fullest = fullest_moment(program)
    work = [entry for entry in timeline.entries if entry.collective is None]
    slowest = sorted((e for e in timeline.entries if not e.kernel), key=lambda e: -e.seconds)[:LARGEST]
    return StepFigures(
        compiled.argument_bytes,
        compiled.temporary_bytes,
        compiled.output_bytes,
        machine.memory,
        compiled.compile_seconds,
        timeline.seconds,
        sum(entry.seconds / entry.times for entry in work),
        sum(entry.seconds / entry.times for entry in work if entry.times > 1),
        float(sum(entry.flops for entry in timeline.entries)),
        _parts(timeline, machine.bf16_flops),
        _transfers(timeline),
        [Line(entry.name, _where(entry), entry.seconds, entry.times) for entry in slowest],
        _kernels(timeline),
        sorted({entry.kernel for entry in timeline.entries if not entry.is_known}),
        sorted(timeline.open_loops),
        fullest.bytes,
        lines_of(fullest),
    )


def lines_of(fullest: Fullest) -> list[Line]:
    """The largest arrays of a moment."""
    return [Line(each.array, f"{each.part.name}, {each.part.of_pass}", each.bytes) for each in fullest.buffers[:LARGEST]]


def timeline_of(program: Program, mesh: Any, topology: Topology, even_rows: int | None) -> Timeline:
    """A program played through as `read_step` does, with the costs and links of a topology's devices."""
    return play(
        program,
        Costs(program, topology.machine, even_rows).of,
        lambda instruction, operands, times: describe(instruction, operands, mesh, times),
        Links(mesh, topology.machine, topology.per_host).seconds,
    )


def _sums(entries: Sequence[Entry], key: Callable[[Entry], Any]) -> dict[Any, list[Entry]]:
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def _parts(timeline: Timeline, peak: float) -> list[PartTime]:
    """Collectives' waits are left to `transfers`."""
    groups = _sums([entry for entry in timeline.entries if entry.collective is None], lambda entry: entry.part)
    rows = []
    for part, entries in groups.items():
        flops = float(sum(entry.flops for entry in entries))
        rows.append(PartTime(part.name, part.of_pass, sum(entry.seconds for entry in entries), flops / peak, flops))
    return sorted(rows, key=lambda row: (row.part, row.of_pass))


def _transfers(timeline: Timeline) -> list[Transfer]:
    groups: dict[tuple[str, str], list[tuple[Entry, int]]] = {}
    for entry in timeline.entries:
        if (told := entry.collective) is not None:
            groups.setdefault((told.kind, f"{' '.join(told.axes)} {told.devices}"), []).append((entry, told.sent))
    return [
        Transfer(
            kind,
            over,
            sum(entry.times for entry, _ in found),
            sum(entry.times * sent for entry, sent in found),
            sum(entry.seconds for entry, _ in found),
            sum(entry.hidden for entry, _ in found),
        )
        for (kind, over), found in sorted(groups.items())
    ]


def _kernels(timeline: Timeline) -> list[Line]:
    groups = _sums([entry for entry in timeline.entries if entry.kernel], lambda entry: (entry.kernel, entry.part))
    lines = [
        Line(
            name,
            f"{part.name}, {part.of_pass}",
            sum(entry.seconds for entry in entries),
            sum(entry.times for entry in entries),
        )
        for (name, part), entries in groups.items()
    ]
    return sorted(lines, key=lambda line: -line.size)


def _where(entry: Entry) -> str:
    return f"{entry.part.name}, {entry.part.of_pass}"

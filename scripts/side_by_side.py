"""Two compiled steps of the same model in one table: time, memory, work, collectives and the longest operations."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from deepseek_jax.planning.machines import KERNEL_SHARE, LINK_SHARE, Machine
from deepseek_jax.planning.schedule import Entry, Timeline
from deepseek_jax.planning.step import CompiledText

LONGEST = 8
SAME = 0.01
"""How far apart, of the larger, the work of two kernels may be and still be called the same."""


class Side(NamedTuple):
    """One of the two programs, as `planning` reads it."""

    name: str
    compiled: CompiledText
    timeline: Timeline


Pair = tuple[Side, Side]


def report(sides: Pair, machine: Machine) -> str:
    """All tables."""
    unit = _Unit("million cycles", machine.clock / 1e6) if machine.clock else _Unit("ms", 1e3)
    return "\n\n".join([
        _memory(sides), _time(sides, unit), _kernels(sides, unit), _products(sides), _transfers(sides),
        *(_longest(side, unit) for side in sides), *_warnings(sides),
    ])  # fmt: skip


class _Unit(NamedTuple):
    """In which times are written."""

    name: str
    a_second: float


def _memory(sides: Pair) -> str:
    texts = [side.compiled for side in sides]
    rows = {
        "arguments": [text.argument_bytes / 1e9 for text in texts],
        "temporaries": [text.temporary_bytes / 1e9 for text in texts],
    }
    return "\n".join([
        f"{'memory of a device, GB':26}{_names(sides)}",
        *(f"  {name:24}{_pair(sizes)}" for name, sizes in rows.items()),
        f"{'compiled in, s':26}{_pair([text.compile_seconds for text in texts])}",
    ])  # fmt: skip


def _time(sides: Pair, unit: _Unit) -> str:
    """Every row with each loop body once and with the loops' trip counts."""

    def row(name: str, is_of: Callable[[Entry], bool]) -> str:
        chosen = [list(filter(is_of, side.timeline.entries)) for side in sides]
        once = [sum(entry.seconds / entry.times for entry in entries) * unit.a_second for entries in chosen]
        whole = [sum(entry.seconds for entry in entries) * unit.a_second for entries in chosen]
        return f"  {name:24}{_pair(once)}   {_pair(whole)}"

    def is_of_part(name: str) -> Callable[[Entry], bool]:
        return lambda entry: entry.part.name == name and entry.collective is None

    parts = Counter[str]()
    for entry in (entry for side in sides for entry in side.timeline.entries if entry.collective is None):
        parts[entry.part.name] += entry.seconds
    return "\n".join([
        f"estimated time, {unit.name}; kernels at {KERNEL_SHARE:.0%} of the peak, links at {LINK_SHARE:.0%} of theirs",
        f"{'':26}{'each loop body once':>32}   {'with trip counts':>32}",
        f"{'':26}{_names(sides)}   {_names(sides)}",
        row("operations", _is_operation),
        row("kernels", lambda entry: bool(entry.kernel)),
        row("waits for links", lambda entry: entry.collective is not None),
        row("all", lambda entry: True),
        row("of it, in loops", lambda entry: entry.times > 1),
        "operations and kernels by part",
        *(row(name, is_of_part(name)) for name, seconds in parts.most_common() if seconds),
    ])  # fmt: skip


def _kernels(sides: Pair, unit: _Unit) -> str:
    """What is counted as the work of kernels, by part, and whether it is the same on both sides."""
    lines = [
        f"kernels' work, with trip counts: runs, TFLOP, {unit.name}",
        f"{'':44}" + "".join(f"{side.name:>28}" for side in sides),
    ]
    by_part = [_sums(side, lambda entry: bool(entry.kernel), lambda entry: entry.part.name) for side in sides]
    by_name = [_sums(side, lambda entry: bool(entry.kernel), lambda entry: (entry.part.name, entry.kernel)) for side in sides]
    differing = []
    for part in sorted({*by_part[0], *by_part[1]}):
        sums = [found.get(part, _Sum()) for found in by_part]
        lines.append(f"  {part:42}{_works(sums, unit)}")
        for name in sorted({name for found in by_name for of, name in found if of == part}):
            lines.append(f"    {name:40}{_works([found.get((part, name), _Sum()) for found in by_name], unit)}")
        if abs(sums[0].flops - sums[1].flops) > SAME * max(sums[0].flops, sums[1].flops):
            differing.append(part)
    verdict = f"differs in {', '.join(differing)}" if differing else f"is the same on both sides, within {SAME:.0%}"
    return "\n".join([*lines, f"  what counts as the work of kernels {verdict}"])


def _works(sums: list["_Sum"], unit: _Unit) -> str:
    return "".join(f"{one.runs:7,}{one.flops / 1e12:10.3f}{one.seconds * unit.a_second:11.1f}" for one in sums)


def _products(sides: Pair) -> str:
    lines = ["products, TFLOP, with trip counts, those of kernels too", f"{'':26}{_names(sides)}"]
    works = [_sums(side, lambda entry: entry.flops > 0, lambda entry: entry.part.name) for side in sides]
    for part in sorted({*works[0], *works[1]}):
        lines.append(f"  {part:24}{_pair([work.get(part, _Sum()).flops / 1e12 for work in works])}")
    return "\n".join([*lines, f"  {'all':24}{_pair([sum(one.flops for one in work.values()) / 1e12 for work in works])}"])


def _transfers(sides: Pair) -> str:
    lines = [
        "collectives, with trip counts: times, GB that leave a device, ms waited, ms hidden under other work",
        f"{'':32}" + "".join(f"{side.name:>20}{'':14}" for side in sides),
    ]

    def key(entry: Entry) -> tuple[str, str]:
        return entry.collective.kind, " ".join(entry.collective.axes)

    found = [_sums(side, lambda entry: entry.collective is not None, key) for side in sides]
    for kind, axes in sorted({*found[0], *found[1]}):
        ones = [sums.get((kind, axes), _Sum()) for sums in found]
        lines.append(f"  {kind + ' ' + axes:30}" + "".join(_transfer(one) for one in ones))
    total = [_Sum(*map(sum, zip(*sums.values()))) if sums else _Sum() for sums in found]
    return "\n".join([*lines, f"  {'all':30}" + "".join(_transfer(one) for one in total)])


def _transfer(one: "_Sum") -> str:
    return f"{one.runs:7,}{one.sent / 1e9:9.2f}{one.seconds * 1e3:9.2f}{one.hidden * 1e3:9.2f}"


def _longest(side: Side, unit: _Unit) -> str:
    entries = sorted(filter(_is_operation, side.timeline.entries), key=lambda entry: -entry.seconds)
    lines = [f"{side.name}: the longest operations, {unit.name} of all their runs"]
    for entry in entries[:LONGEST]:
        where = f"{entry.part.name}, {entry.part.of_pass}"
        lines.append(f"  {entry.seconds * unit.a_second:9.1f}  {entry.times:4,} x  {entry.name[:44]:46}{where}")
    return "\n".join(lines)


def _warnings(sides: Pair) -> list[str]:
    found = []
    for side in sides:
        if count := len(side.timeline.open_loops):
            found.append(f"{side.name}: {count} loops whose number of passes depends on data, each counted as one pass")
        if unknown := sorted({entry.kernel for entry in side.timeline.entries if not entry.is_known}):
            found.append(f"{side.name}: kernels of which nothing is known, counted as nothing: {', '.join(unknown)}")
    return found


class _Sum(NamedTuple):
    """Of several entries, all their runs."""

    runs: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    sent: int = 0
    hidden: float = 0.0


def _sums(side: Side, is_of: Callable[[Entry], bool], key: Callable[[Entry], object]) -> dict:
    sums: dict = {}
    for entry in filter(is_of, side.timeline.entries):
        old, sent = sums.get(key(entry), _Sum()), entry.times * entry.collective.sent if entry.collective else 0
        sums[key(entry)] = _Sum(*map(sum, zip(old, (entry.times, entry.seconds, entry.flops, sent, entry.hidden))))
    return sums


def _is_operation(entry: Entry) -> bool:
    return not entry.kernel and entry.collective is None


def _names(sides: Pair) -> str:
    return f"{sides[0].name:>12}{sides[1].name:>12}{'ratio':>8}"


def _pair(values: list[float]) -> str:
    """Both, and the ratio of the first to the second."""
    ratio = f"{values[0] / values[1]:8.2f}" if values[1] else f"{'':8}"
    return "".join(f"{value:12,.1f}" for value in values) + ratio

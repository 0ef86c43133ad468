"""A plan as text of at most 100 columns."""

from collections import Counter
from collections.abc import Iterable

from deepseek_jax.config import MESH_AXES, Config
from deepseek_jax.parallel.summary import readable_bytes
from deepseek_jax.planning.machines import FP8_KERNEL_SHARE, KERNEL_SHARE, LINK_SHARE
from deepseek_jax.planning.parts import PASSES, is_overflow, part_of
from deepseek_jax.planning.run import RunFigures
from deepseek_jax.planning.step import Line, PartTime, StepFigures, Transfer
from deepseek_jax.planning.topologies import Topology

NAMES = {"again": "made again", "weights": "weights gathered", "layers": "around the layers"}


def step_report(config: Config, topology: Topology, step: StepFigures) -> str:
    """One compiled step; of CPUs no times, for none are known."""
    sections = [_heading(config, topology, step), _memory(step)]
    if topology.machine.platform != "cpu":
        sections += [_time(step), _largest(step)]
    return "\n\n".join([*sections, _transfers(step.transfers), *_warnings(step)])


def run_report(config: Config, topology: Topology, run: RunFigures, bubble: float | None) -> str:
    """The whole run."""
    tflops = run.model_flops_per_chip / 1e12
    lines = [
        "the run, estimated from that step",
        f"  a step      {run.step_seconds:.3f} s for {run.step_tokens:,} tokens",
        f"  pace        {run.tokens_per_second:,.0f} tokens/s, {run.tokens_per_second_per_chip:,.0f} a chip",
        f"  products    {tflops:.3g} TFLOP/s a chip, {run.mfu:.1%} of the bfloat16 peak (MFU)",
        f"  all of it   {run.total_tokens:,} tokens in {config.train.steps:,} steps: {run.days:,.1f} days, "
        f"{run.chip_hours:,.0f} chip-hours",
    ]
    if bubble is not None:
        lines.append(f"  pipeline    the bubble is {bubble:.1%} of the stages' time, and part of the step above")
    lines.append("  left out: latency of collectives, the input, evaluation, checkpoints, failures; uneven routing")
    return "\n".join(lines)


def _heading(config: Config, topology: Topology, step: StepFigures) -> str:
    parallel, train, model = config.parallel, config.train, config.model
    mesh = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in MESH_AXES if getattr(parallel, axis) > 1) or "one device"
    parts = train.gradient_accumulation_steps
    return "\n".join(
        [
            f"{topology.name}: {topology.devices:,} devices, {mesh}; compiled in {step.compile_seconds:.0f} s",
            f"a step of {train.batch_size:,} sequences of {train.sequence_length:,} tokens in {parts} "
            f"part{'s' if parts > 1 else ''}, {model.precision}, remat {model.remat};",
            f"attention {model.attention}, grouped_matmul {model.grouped_matmul}, exchange {parallel.exchange}",
        ]
    )


def _memory(step: StepFigures) -> str:
    left = step.memory_bytes - step.needed_bytes
    verdict = f"fits, {readable_bytes(left)} left" if step.fits else f"does not fit: {readable_bytes(-left)} too much"
    lines = [
        "memory of a device",
        f"  arguments (state and batch)  {readable_bytes(step.argument_bytes):>10}",
        f"  temporaries                  {readable_bytes(step.temporary_bytes):>10}",
        f"  of                           {readable_bytes(step.memory_bytes):>10}   {verdict}",
        f"  alive at the fullest moment, by following the schedule ({readable_bytes(step.fullest_bytes)} in all):",
    ]
    lines += [f"    {readable_bytes(line.size):>9}  {line.name[:44]:46}{line.where}" for line in step.fullest]
    return "\n".join(lines)


def _time(step: StepFigures) -> str:
    """Time by part and pass, what is waited for collectives last."""
    columns = "".join(f"{NAMES.get(name, name):>12}" for name in PASSES)
    lines = ["time of a step by part, ms, estimated; `ideal` is its products at the machine's peak"]
    lines.append(f"  {'':18}{columns}{'all':>11}{'ideal':>10}{'share':>8}")
    rows = by_part(step.parts)
    for name, passes in rows.items():
        ideal = sum(row.ideal_seconds for row in passes.values())
        lines.append(
            _time_row(NAMES.get(name, name), [passes[p].seconds if p in passes else 0.0 for p in PASSES], ideal, step)
        )
    waited = sum(transfer.waited_seconds for transfer in step.transfers)
    lines.append(f"  {'waits for links':18}{'':36}{waited * 1e3:11.2f}{'':10}{_share(waited, step.seconds):>8}")
    ideal = sum(row.ideal_seconds for row in step.parts)
    lines.append(f"  {'all':18}{'':36}{step.seconds * 1e3:11.2f}{ideal * 1e3:10.2f}")
    lines.append(
        f"  each loop once, no waits{'':30}{step.once_seconds * 1e3:11.2f}   of it {step.loop_seconds * 1e3:.2f} in loops"
    )
    return "\n".join(lines)


def by_part(parts: Iterable[PartTime]) -> dict[str, dict[str, PartTime]]:
    """Rows by part and then by pass, the longest part first."""
    rows: dict[str, dict[str, PartTime]] = {}
    for row in parts:
        rows.setdefault(row.part, {})[row.of_pass] = row
    return dict(sorted(rows.items(), key=lambda item: -sum(row.seconds for row in item[1].values())))


def _time_row(name: str, seconds: list[float], ideal: float, step: StepFigures) -> str:
    cells = "".join(f"{value * 1e3:12.2f}" if value else f"{'':12}" for value in seconds)
    ideal_cell = f"{ideal * 1e3:10.2f}" if ideal else f"{'':10}"
    return f"  {name:18}{cells}{sum(seconds) * 1e3:11.2f}{ideal_cell}{_share(sum(seconds), step.seconds):>8}"


def _transfers(transfers: list[Transfer]) -> str:
    lines = [f"collectives of a step, at {LINK_SHARE:.0%} of the links' rate; hidden is under other work"]
    lines.append(f"  {'':20}{'over':18}{'times':>9}{'GB sent':>10}{'waited ms':>12}{'hidden ms':>12}")
    for one in transfers:
        lines.append(
            f"  {one.kind:20}{one.over:18}{one.executions:9,}{one.bytes / 1e9:10.2f}"
            f"{one.waited_seconds * 1e3:12.2f}{one.hidden_seconds * 1e3:12.2f}"
        )
    return "\n".join(lines) if transfers else "no collectives"


def _largest(step: StepFigures) -> str:
    lines = ["the longest operations, ms, all their runs"]
    lines += [_line(line) for line in step.slowest]
    if step.kernels:
        lines.append(f"kernels, ms, at {KERNEL_SHARE:.0%} of the peak, of float8's {FP8_KERNEL_SHARE:.0%}")
        lines += [_line(line) for line in step.kernels]
    return "\n".join(lines)


def _line(line: Line) -> str:
    return f"  {line.size * 1e3:9.2f}  {line.times:5,} x  {line.name[:44]:46}{line.where}"


def _warnings(step: StepFigures) -> list[str]:
    found = []
    if step.open_loops:
        counted = Counter(
            ("overflow" if is_overflow(path) else part_of(path).name, part_of(path).of_pass) for path in step.open_loops
        )
        rows = "\n".join(f"  {count} in {name}, {of_pass}" for (name, of_pass), count in sorted(counted.items()))
        found.append(
            "loops whose number of passes depends on data, each counted as one pass; those of the exchange's\n"
            f"further rounds (overflow), which routing near even has no need of, as none:\n{rows}"
        )
    if step.unknown_kernels:
        found.append(f"kernels of which nothing is known, counted as nothing: {', '.join(step.unknown_kernels)}")
    return found


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""

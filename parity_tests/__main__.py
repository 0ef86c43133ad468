"""Do the siblings compute the same? `python -m parity_tests --config configs/tiny.yaml` tells for any config.

Every module runs in both frameworks on the same weights and inputs, forward and backward, in each
precision. A module that parts from its sibling fails, and so do those that contain it: the first
row that fails is where to look. With `--checkpoint` real weights go through both, and through transformers,
layer by layer; with `--against` they are compared with another checkpoint's.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek_jax.config import ModelConfig, load_config
from deepseek_jax.errors import UserError, run_command
from parity_tests.checkpoint_report import report_against, report_frameworks
from parity_tests.comparison import TOLERANCES, Difference, difference
from parity_tests.modules import Case, Results, Siblings, cases, run_both

ROUTED = ("moe layer", "mtp module", "whole model")
"""Left out under fp8: where float8 comes before a router, rounding alone makes it choose other experts."""


class Row(NamedTuple):
    """One module in one precision."""

    module: str
    precision: str
    forward: Difference
    backward: Difference
    verdict: str
    """`equal`, or what is wrong."""


class Breach(UserError):
    """The siblings differ by more than rounding."""


def main() -> None:
    """Parse the command line, print the table, exit with 1 on a breach."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tiny", help="a .yaml file or a preset; its size is what is computed")
    defaults = [precision for precision in TOLERANCES if precision != "fp8"]
    parser.add_argument(
        "--precision", nargs="+", choices=TOLERANCES, help=f"default: {' '.join(defaults)}; of a checkpoint float32"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: 11; of a checkpoint's 64)")
    parser.add_argument("--checkpoint", metavar="DIR", help="a Hugging Face directory or a hub's name, run layer by layer")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the checkpoint is to read (default: random tokens)")
    parser.add_argument("--against", metavar="DIR", help="compare the checkpoint's tensors with these instead")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_args()
    if args.checkpoint is None and (args.against or args.text):
        parser.error("--against and --text need a --checkpoint")
    if args.checkpoint is None:
        args.precision, args.length = args.precision or defaults, args.length or 11
        run_command(lambda: report(args))
    elif args.against is not None:
        run_command(lambda: report_against(args.checkpoint, args.against))
    else:
        if set(precisions := args.precision or ["float32"]) - {"float64", "float32"}:
            parser.error("a checkpoint is run in float32 or float64")
        run_command(lambda: [report_frameworks(args.checkpoint, args.text, args.length or 64, p) for p in precisions] and None)


def report(args: argparse.Namespace) -> None:
    """Compare and print; raises `Breach` if any module differs."""
    model = load_config(args.config, args.overrides).model
    console = Console(width=100)
    rows = []
    for precision in args.precision:
        with console.status(f"{precision} ..."):
            rows += compare(model, precision, args.batch, args.length)
    console.print(_table(rows))
    breaches = [row for row in rows if row.verdict != "equal"]
    if breaches:
        first = breaches[0]
        raise Breach(f"{len(breaches)} of {len(rows)} comparisons failed, first {first.module} in {first.precision}")


def _table(rows: list[Row]) -> Table:
    table = Table(title="JAX against PyTorch: largest difference, absolute and relative to the largest entry")
    for heading in ("module", "precision", "forward abs.", "rel.", "backward abs.", "rel.", "allowed", "verdict"):
        table.add_column(heading)
    for before, row in zip([None, *rows], rows):
        if before and before.precision != row.precision:
            table.add_section()
        numbers = [f"{number:.1e}" for number in (*row.forward, *row.backward)]
        style = None if row.verdict == "equal" else "bold red"
        table.add_row(row.module, row.precision, *numbers, f"{TOLERANCES[row.precision]:.0e}", row.verdict, style=style)
    return table


def compare(model: ModelConfig, precision: str, batch: int, length: int) -> list[Row]:
    """Every module of the model in one precision."""
    siblings = Siblings(dataclasses.replace(model, precision=precision))
    chosen = [case for case in cases(siblings, batch, length) if precision != "fp8" or case.name not in ROUTED]
    return [_row(case, precision, *run_both(case, siblings)) for case in chosen]


def _row(case: Case, precision: str, ours: Results, theirs: Results) -> Row:
    forward, backward = (_worst(getattr(ours, kind), getattr(theirs, kind)) for kind in ("outputs", "gradients"))
    allowed = TOLERANCES[precision]
    if any(not np.array_equal(ours.exact[name], theirs.exact[name]) for name in ours.exact):
        verdict = "other experts chosen"
    elif forward.relative > allowed or backward.relative > allowed:
        verdict = "DIFFERENT"
    else:
        verdict = "equal"
    return Row(case.name, precision, forward, backward, verdict)


def _worst(ours: dict, theirs: dict) -> Difference:
    found = [difference(ours[name], theirs[name]) for name in theirs if theirs[name] is not None]
    return Difference(*(max(values) for values in zip(*found))) if found else Difference(0.0, 0.0)


if __name__ == "__main__":
    main()

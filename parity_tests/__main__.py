"""Do the siblings compute the same? `python -m parity_tests --config configs/tiny.yaml` tells for any config.

Every module runs in both frameworks on the same weights and inputs, forward and backward, in each
precision. A module that parts from its sibling fails, and so do those that contain it: the first
row that fails is where to look.
"""

import argparse
import dataclasses
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek_jax.config import ModelConfig, load_config
from deepseek_jax.errors import UserError, run_command
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
    parser.add_argument("--precision", nargs="+", choices=TOLERANCES, default=defaults)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=11, help="tokens of a sequence")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_args()
    run_command(lambda: report(args))


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

"""What a run tells while it goes: metrics.jsonl for programs, a progress line for people."""

import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepseek_jax.config import HELD_OUT

METRICS_FILE = "metrics.jsonl"
WIDTH = 100
"""Columns that a line may fill."""


class MetricsFile:
    """Lines of JSON, one per step or evaluation, each on disk as soon as it is written."""

    def __init__(self, run_dir: Path, last_step: int, is_writer: bool = True):
        """Open for appending; lines after `last_step`, which a resumed run repeats, are dropped.

        Of several processes one is the writer; in the others nothing is written.
        """
        self._file = None
        if not is_writer:
            return
        self.path = run_dir / METRICS_FILE
        kept = [line for line in read_metrics(run_dir) if line["step"] <= last_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics; a last line cut short by a crash is left out."""
    lines = []
    path = run_dir / METRICS_FILE
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def evaluation_line(bits: Mapping[str, float]) -> dict[str, Any]:
    """What metrics.jsonl says of an evaluation: `bits_per_byte` held out, and `eval` by the names of `data.eval`, if any."""
    others = {name: value for name, value in bits.items() if name != HELD_OUT}
    return {"bits_per_byte": bits[HELD_OUT]} | ({"eval": others} if others else {})


def evaluation_text(step: int, bits: Mapping[str, float]) -> str:
    """The same for people."""
    text = f"step {step}: {bits[HELD_OUT]:.3f} bits per byte on the held-out text"
    text += "".join(f", {value:.3f} on {name}" for name, value in bits.items() if name != HELD_OUT)
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


class Progress:
    """One line that tells where a run is, rewritten in place on a terminal, else printed now and then."""

    def __init__(self, steps: int):
        self._steps = steps
        self._tokens = 0
        self._start = self._shown = time.monotonic()
        self._done = 0
        self._live = sys.stdout.isatty()

    def step(self, step: int, tokens: int, **values: float) -> None:
        """Count a step, after which so many tokens were seen, and show it if it is time to.

        The first step, which includes compilation, does not count towards the speed.
        """
        now = time.monotonic()
        self._done += 1
        if self._done == 1:
            self._start, self._tokens = now, tokens
        if now - self._shown < (0.2 if self._live else 5) and step < self._steps and self._done > 1:
            return
        self._shown = now
        text = f"step {step:>{len(str(self._steps))}}/{self._steps}"
        text += "".join(f"  {name} {value:.4g}" for name, value in values.items())
        if self._done > 1:
            seconds = (now - self._start) / (self._done - 1)
            rate = (tokens - self._tokens) / (now - self._start)
            text += f"  {rate:,.0f} tokens/s  {duration(seconds * (self._steps - step))} left"
        self._print(text, keep=step == self._steps)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent within does not count as training."""
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(text, keep=True)

    def _print(self, text: str, keep: bool) -> None:
        end = "\n" if keep or not self._live else ""
        print(f"\r\033[K{text}" if self._live else text, end=end, flush=True)


def duration(seconds: float) -> str:
    """`75` as `1m15s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"

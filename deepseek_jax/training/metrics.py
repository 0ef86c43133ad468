"""What a run tells while it goes: metrics.jsonl for programs, a progress line for people."""

import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import numpy as np

from deepseek_jax.config import HELD_OUT, ConfigError
from deepseek_jax.training.trackers import Tracker, numbers_of

METRICS_FILE = "metrics.jsonl"
WIDTH = 100
"""Columns that a line may fill."""
ROUGHLY = ("grad", "lr", "load")
"""Numbers of which three digits are enough."""
SAY_LEAST = ("max_attention_score", "lr", "grad", "dropped")
"""What a progress line that is too long goes without."""


class MetricsFile:
    """Lines of JSON, one per step or evaluation, each on disk as soon as it is written."""

    def __init__(self, run_dir: Path, last_step: int, is_writer: bool = True, trackers: Sequence[Tracker] = ()):
        """Open for appending; lines after `last_step`, which a resumed run repeats, are dropped.

        Of several processes one is the writer; in the others nothing is written. The trackers get all that is.
        """
        self._file, self._trackers = None, list(trackers)
        if not is_writer:
            return
        self.path = run_dir / METRICS_FILE
        kept = [line for line in read_metrics(run_dir) if line["step"] <= last_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")

    def close(self) -> None:
        """No line comes after this."""
        self._pass_on(lambda tracker: tracker.close())
        if self._file is not None:
            self._file.close()

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        self._pass_on(lambda tracker: tracker.write(values["step"], numbers_of(values)))

    def _pass_on(self, tell: Callable[[Tracker], None]) -> None:
        """A tracker that fails costs a line and not the run, and gets no more."""
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:  # of many kinds: a full disk, a helper that has died
                self._trackers.remove(tracker)
                told = f"{type(tracker).__name__} gets no more metrics: {type(error).__name__}: {error}"
                print(" ".join(told.split()), file=sys.stderr, flush=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics; a last line cut short by a crash is left out.

    Raises:
        ConfigError: a line is none that a run writes.
    """
    path, lines = run_dir / METRICS_FILE, []
    texts = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("tokens"), int):
            lines.append(line)
        elif text.endswith("\n"):
            raise ConfigError(f"{path}:{number}: is no line of a run's metrics; move the file away")
    return lines


def check_metrics(run_dir: Path, step: int, tokens: int) -> None:
    """Refuse to go on in the metrics of another run, given what the checkpoint says; a file that is missing is no harm.

    Raises:
        ConfigError: a line is none of ours, or that of the checkpoint's step or of one before it saw other tokens.
    """
    path = run_dir / METRICS_FILE
    last = next((line for line in reversed(read_metrics(run_dir)) if line["step"] <= step), None)
    if last is None:
        return
    if last["tokens"] != tokens if last["step"] == step else last["tokens"] >= tokens:
        raise ConfigError(f"{path}: is of another run: its step {last['step']} saw {last['tokens']:,} tokens and the "
                          f"checkpoint's step {step} {tokens:,}; move the file away")  # fmt: skip
    if last["step"] < step:
        print(f"{path}: lacks steps {last['step'] + 1} to {step}; if it is of another run, stop and move the file away")


def evaluation_line(bits: Mapping[str, float]) -> dict[str, Any]:
    """What metrics.jsonl says of an evaluation: `bits_per_byte` held out, and `eval` by the names of `data.eval`, if any."""
    others = {name: value for name, value in bits.items() if name != HELD_OUT}
    return {"bits_per_byte": bits[HELD_OUT]} | ({"eval": others} if others else {})


def evaluation_text(step: int, bits: Mapping[str, float]) -> str:
    """The same for people."""
    text = f"step {step}: {bits[HELD_OUT]:.3f} bits per byte on the held-out text"
    return text + "".join(f", {value:.3f} on {name}" for name, value in bits.items() if name != HELD_OUT)


def expert_line(counts: Mapping[str, Any]) -> dict[str, Any]:
    """What metrics.jsonl says of the experts' load, given the tokens that chose each: [layers, E] for each stack.

    `max_expert_load` is the fullest expert's over all layers, as a multiple of its layer's mean; `max_violation` is by how
    much of the mean it is exceeded in each layer (MaxVio of arXiv 2408.15664), MTP modules last.
    """
    layers = [layer for stack in counts.values() for layer in np.asarray(stack, np.float64)]
    loads = [float(layer.max() / layer.mean()) for layer in layers]
    violations = {"max_violation": [round(load - 1, 3) for load in loads]} if loads else {}
    return {"max_expert_load": max(loads, default=1.0)} | violations


class Progress:
    """One line that tells where a run is, rewritten in place on a terminal, else printed now and then.

    Args:
        share_of_peak: of so many tokens a second, where the devices' peak is known.
    """

    def __init__(self, steps: int, share_of_peak: Optional[Callable[[float], float]] = None):
        self._steps, self._share_of_peak = steps, share_of_peak
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
        parts = {"step": f"step {step:>{len(str(self._steps))}}/{self._steps}"}
        parts |= {name: f"{name} {value:.{3 if name in ROUGHLY else 4}g}" for name, value in values.items()}
        if self._done > 1:
            seconds = (now - self._start) / (self._done - 1)
            rate = (tokens - self._tokens) / (now - self._start)
            parts["rate"] = f"{rate:,.0f} tokens/s" if rate < 1e6 else f"{rate / 1e6:,.1f}M tokens/s"
            if self._share_of_peak is not None:
                parts["mfu"] = f"MFU {self._share_of_peak(rate):.0%}"
            parts["left"] = f"{duration(seconds * (self._steps - step))} left"
        self._print(one_line(parts), keep=step == self._steps)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent within does not count as training."""
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin

    def note(self, text: str) -> None:
        """A line that stays, or several where it is long."""
        lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        self._print("\n".join(lines), keep=True)

    def _print(self, text: str, keep: bool) -> None:
        end = "\n" if keep or not self._live else ""
        print(f"\r\033[K{text}" if self._live else text, end=end, flush=True)


def one_line(parts: dict[str, str]) -> str:
    """Parts side by side within WIDTH: closer where they must be, and then without those that say least."""
    shown = dict(parts)
    for last in ("", *SAY_LEAST):
        shown.pop(last, None)
        for space in ("  ", " "):
            if len(text := space.join(shown.values())) <= WIDTH:
                return text
    return text[:WIDTH]


def duration(seconds: float) -> str:
    """`75` as `1m15s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"

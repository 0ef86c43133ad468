"""Where a run's time goes: the share of it that trained, over all of its starts."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

TIMES_FILE = "times.jsonl"
"""In a run directory: seconds so far of each start, in lines of which the last of a start counts."""
SECONDS_BETWEEN_LINES = 30
KINDS = ("trained", "compiling", "evaluating", "saving", "skipped")
"""What a run does with its time; the rest, such as reading text and restoring a checkpoint, goes before its first step."""

_spans: deque[tuple[float, float]] = deque(maxlen=1000)
"""Beginnings and seconds of what was compiled."""
_compiled = [0.0]


def _count(event: str, duration_secs: float, **_: Any) -> None:
    """Tracing, lowering and compiling; what is traced within something else counts once."""
    if event.startswith("/jax/core/compile/"):
        begin = time.monotonic() - duration_secs
        while _spans and _spans[-1][0] >= begin:
            _compiled[0] -= _spans.pop()[1]
        _spans.append((begin, duration_secs))
        _compiled[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)


class Times:
    """Counts one start's seconds by what they were spent on, for `TIMES_FILE`.

    Time comes from a clock that no one sets. A step counts as trained when it is told of, less what was compiled
    and done aside since the one before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """From now on."""
        self._clock, self._begin = clock, clock()
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._mark, self._compiled, self._aside = self._begin, _compiled[0], 0.0
        self._path: Path | None = None
        self._written = -1e9

    def start(self, run_dir: Path | None) -> None:
        """The first step begins; of several processes the first alone has a directory to write to."""
        self._path = None if run_dir is None else run_dir / TIMES_FILE
        self._spent["compiling"] += self._since_compiled()
        self._mark = self._clock()

    @contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """What is done within is no training, but of this kind."""
        begin = self._clock()
        yield
        seconds = self._clock() - begin
        self._since_compiled()  # it is of this kind, too
        self._spent[kind] += seconds
        self._aside += seconds

    def stepped(self, step: int, skipped: bool) -> None:
        """A step's numbers have come."""
        now, compiled = self._clock(), self._since_compiled()
        worked = max(now - self._mark - self._aside - compiled, 0.0)
        self._spent["skipped" if skipped else "trained"] += worked
        self._spent["compiling"] += compiled
        self._mark, self._aside = now, 0.0
        if now - self._written >= SECONDS_BETWEEN_LINES:
            self.write(step)

    def write(self, step: int) -> None:
        """Append what has come together by this step."""
        if self._path is not None:
            self._written = now = self._clock()
            rounded = {kind: round(seconds, 2) for kind, seconds in self._spent.items()}
            line = {"start": f"{self._begin:.3f}", "step": step, "all": round(now - self._begin, 2)} | rounded
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _since_compiled(self) -> float:
        since, self._compiled = _compiled[0] - self._compiled, _compiled[0]
        return since


def goodput(run_dir: Path, step: int) -> dict[str, float] | None:
    """Seconds of all starts of a run, `all` and of each kind, or None of a run that never wrote any.

    Args:
        step: the last that counts: what was trained after it was lost, and is to be made again.
    """
    ends: dict[str, dict[str, Any]] = {}
    trained: dict[str, float] = {}
    for line in _lines(run_dir / TIMES_FILE):
        if line["step"] <= step:
            trained[line["start"]] = line["trained"]
        ends[line["start"]] = line
    if not ends:
        return None
    sums = {kind: sum(end[kind] for end in ends.values()) for kind in ("all", *KINDS)}
    return sums | {"trained": sum(trained.values()), "lost": sums["trained"] - sum(trained.values())}


def goodput_text(seconds: dict[str, float]) -> str:
    """One line: the share that trained, and what took the rest."""
    rest = seconds["all"] - sum(seconds[kind] for kind in (*KINDS, "lost"))
    others = {kind: seconds[kind] for kind in (*KINDS[1:], "lost")} | {"starting": max(rest, 0.0)}
    shares = sorted(((value / seconds["all"], kind) for kind, value in others.items()), reverse=True)
    told = ", ".join(f"{kind} {share:.0%}" for share, kind in shares if share >= 0.005)
    trained = f"goodput: {seconds['trained'] / seconds['all']:.0%} of {seconds['all']:,.0f} s trained"
    return f"{trained}; {told}" if told else trained


def _lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole and have all that they should."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            numbers = [line[name] for name in ("step", "all", *KINDS)]
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(line["start"], str) and all(isinstance(number, int | float) for number in numbers):
            found.append(line)
    return found

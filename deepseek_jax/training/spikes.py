"""Losses that jump: told at once, so that a person can look at the data or the rate of that step."""

from collections import deque

import numpy as np

WINDOW, LEAST = 100, 20
"""Losses that are looked back on: at most, and at least."""
DEVIATIONS, SHARE = 8.0, 0.05
"""How far beyond their median a loss must be: in deviations as a normal distribution's, and as a share of it."""


class SpikeWatch:
    """Compares each loss with the median of those before it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._within = False

    def look(self, loss: float) -> float | None:
        """The median, if here a spike begins."""
        losses = np.array(self._losses)
        self._losses.append(loss)
        if len(losses) < LEAST:
            return None
        median = float(np.median(losses))
        deviation = 1.4826 * float(np.median(np.abs(losses - median)))
        was, self._within = self._within, loss > median + max(DEVIATIONS * deviation, SHARE * median)
        return median if self._within and not was else None

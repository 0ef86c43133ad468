"""Which process holds the others up: all of them wait for the slowest at every step, so that each looks at itself alone."""

import socket
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

SLOW = 1.5
"""Times as long as the others' median that are told of."""
LEAST = 2e-3
"""Seconds more than the others' that matter."""
PROBES, SIZE = 20, 512


class Stragglers:
    """Compares processes by two things that no other has a part in: a fixed product on their devices, and reading batches."""

    def __init__(self) -> None:
        self._product = jax.jit(lambda x: jnp.tanh(x @ x))
        self._inputs = [jax.device_put(np.ones((SIZE, SIZE), np.float32), device) for device in jax.local_devices()]
        self._reading, self._steps = 0.0, 0
        self._probe()  # compiles
        self._hosts = _gathered_text(socket.gethostname())

    def read(self, seconds: float) -> None:
        """A batch was read in so many."""
        self._reading += seconds
        self._steps += 1

    def look(self) -> list[str]:
        """A line for each process that is slow; all processes call it at the same step."""
        own = np.array([self._probe(), self._reading / max(self._steps, 1)])
        self._reading, self._steps = 0.0, 0
        work, reading = np.asarray(multihost_utils.process_allgather(own)).T
        told = partial(slow_ones, hosts=self._hosts)
        return told(work, what="a fixed product") + told(reading, what="reading a batch")

    def _probe(self) -> float:
        """Seconds of the product on the slowest of this process's devices."""
        slowest = 0.0
        for x in self._inputs:
            jax.block_until_ready(x)
            begin = time.monotonic()
            for _ in range(PROBES):
                x = self._product(x)
            jax.block_until_ready(x)
            slowest = max(slowest, time.monotonic() - begin)
        return slowest / PROBES


def slow_ones(seconds: Sequence[float] | np.ndarray, hosts: Sequence[str], what: str) -> list[str]:
    """A line for each process, of these seconds, that is much slower than the others."""
    told = []
    for process, own in enumerate(seconds):
        others = float(np.median([other for number, other in enumerate(seconds) if number != process]))
        if own > SLOW * others and own - others > LEAST:
            times = f"{own / others:.1f} times as long" if others else "long"
            told.append(
                f"process {process} on {hosts[process]} is slow: {what} takes {1000 * own:.3g} ms, {times} as elsewhere"
            )
    return told


def _gathered_text(text: str) -> list[str]:
    line = np.zeros(64, np.uint8)
    content = text.encode()[:64]
    line[: len(content)] = np.frombuffer(content, np.uint8)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(multihost_utils.process_allgather(line))]

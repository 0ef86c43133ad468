"""Prepare what comes next, by several threads, while what came is being written, in memory that is bounded."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

BYTES_AHEAD = 32 * 2**20
"""Of items that are begun and not yet taken; one alone may be larger."""
THREADS = min(8, os.cpu_count() or 1)


def ahead(make: Callable[[Item], Made], items: Iterable[Item], nbytes: Callable[[Item], int]) -> Generator[Made, None, None]:
    """`make` of each item, in their order, made before it is asked for.

    An error in making one is raised where that one is asked for. The threads end with the generator.

    Args:
        make: called in any of the threads.
        nbytes: an item's size, known before it is made.
    """
    begun: deque[tuple[Future[Made], int]] = deque()
    held = 0
    threads = ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            size = nbytes(item)
            while begun and held + size > BYTES_AHEAD:
                held -= begun[0][1]
                yield begun.popleft()[0].result()
            begun.append((threads.submit(make, item), size))
            held += size
        while begun:
            yield begun.popleft()[0].result()
    finally:
        threads.shutdown(cancel_futures=True)

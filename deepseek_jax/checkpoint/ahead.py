"""Prepare what comes next while what came is being written, in memory that is bounded."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

BYTES_AHEAD = 32 * 2**20
"""Of items that are ready and not yet taken; one more may be larger."""


def ahead(items: Iterator[Item], nbytes: Callable[[Item], int]) -> Generator[Item, None, None]:
    """The same items in the same order, each made by a thread of its own before it is asked for.

    An error in making one is raised where that one is asked for. The thread ends with the generator.
    """
    ready: deque[tuple[str, Any, int]] = deque()
    changed, state = threading.Condition(), {"held": 0, "stopped": False}

    def put(kind: str, value: Any, size: int) -> bool:
        with changed:
            changed.wait_for(lambda: state["stopped"] or not ready or state["held"] + size <= BYTES_AHEAD)
            ready.append((kind, value, size))
            state["held"] += size
            changed.notify_all()
            return not state["stopped"]

    def make() -> None:
        try:
            for item in items:
                if not put("item", item, nbytes(item)):
                    return
                del item  # not kept while the next is made
            put("end", None, 0)
        except BaseException as error:
            put("error", error, 0)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: bool(ready))
                kind, value, size = ready.popleft()
                state["held"] -= size
                changed.notify_all()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
            del value
    finally:
        with changed:
            state["stopped"] = True
            changed.notify_all()
        thread.join()

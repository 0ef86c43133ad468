"""Preparing ahead changes neither what comes nor its order, and stays within its bounds."""

import threading
import time

import pytest

from deepseek_jax.checkpoint.ahead import BYTES_AHEAD, ahead


def test_the_same_items_in_order_and_errors_where_they_belong():
    assert list(ahead(iter(range(100)), lambda item: BYTES_AHEAD // 3)) == list(range(100))
    assert list(ahead(iter(()), lambda item: 1)) == []

    def fails_at_three():
        yield from range(3)
        raise OSError("broken")

    seen = []
    with pytest.raises(OSError, match="broken"):
        for item in ahead(fails_at_three(), lambda item: 1):
            seen.append(item)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("size", [BYTES_AHEAD // 4, BYTES_AHEAD * 2])
def test_no_more_is_made_than_there_is_room_for(size):
    made, before = [], threading.active_count()

    def items():
        for number in range(50):
            made.append(number)
            yield number

    taken = ahead(items(), lambda item: size)
    for number in taken:
        time.sleep(0.001)
        # What is taken, what is ready, and one that waits for room.
        assert len(made) <= number + 1 + max(BYTES_AHEAD // size, 1) + 1
        if number == 20:
            break
    taken.close()
    assert threading.active_count() == before
    assert len(made) < 40

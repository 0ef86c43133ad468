"""Preparing ahead changes neither what comes nor its order, and stays within its bounds."""

import threading
import time

import pytest

from deepseek_jax.checkpoint.ahead import BYTES_AHEAD, ahead


def test_the_same_items_in_order_and_errors_where_they_belong():
    def late(number):
        time.sleep(0.002 * (number % 3))
        return number

    assert list(ahead(late, range(30), lambda item: BYTES_AHEAD // 3)) == list(range(30))
    assert list(ahead(late, (), lambda item: 1)) == []

    def fails_at_three(number):
        if number == 3:
            raise OSError("broken")
        return number

    seen = []
    with pytest.raises(OSError, match="broken"):
        for item in ahead(fails_at_three, range(9), lambda item: 1):
            seen.append(item)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("size", [BYTES_AHEAD // 4, BYTES_AHEAD * 2])
def test_no_more_is_made_than_there_is_room_for(size):
    begun, before = [], threading.active_count()
    taken = ahead(lambda number: begun.append(number) or number, range(50), lambda item: size)
    for number in taken:
        time.sleep(0.001)
        assert len(begun) <= number + 1 + max(BYTES_AHEAD // size, 1)  # what is taken, and what there is room for
        if number == 20:
            break
    taken.close()
    assert threading.active_count() == before
    assert len(begun) < 40

"""Files of tokens to windows, in an order that a seed gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.documents import DataError
from deepseek_jax.data.loader import Windows, window_length
from deepseek_jax.data.shuffle import permute
from parity_tests.texts import SMALL, tiny


@SMALL
@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 2**40))
def test_permutation_has_every_number_once(size, seed, epoch):
    order = permute(np.arange(size), size, seed, epoch)
    assert sorted(order) == list(range(size))
    assert permute(np.array([size - 1]), size, seed, epoch) == order[-1]


def test_permutation_is_even_and_stays_the_same():
    assert permute(np.arange(10), 10, seed=0).tolist() == [9, 4, 5, 3, 0, 8, 2, 6, 1, 7]
    for size in (3, 50):
        epochs = np.arange(20_000)
        places = permute(np.full_like(epochs, size // 2), size, seed=5, epochs=epochs)
        expected = len(epochs) / size
        chi_square = ((np.bincount(places, minlength=size) - expected) ** 2 / expected).sum()
        assert chi_square < size + 5 * (2 * size) ** 0.5
    order = permute(np.arange(2**16 + 1), 2**16 + 1, seed=5)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert (np.diff(order) == 1).mean() < 0.001


def test_epochs_hold_every_window_once_in_another_order():
    tokens, window, stride = np.arange(1000, dtype=np.uint16), 13, 10
    windows = Windows(tokens, window, stride, seed=3)
    assert len(windows) == 99
    epochs = [windows.take(epoch * 99, 99) for epoch in range(3)]
    for epoch in epochs:
        assert epoch.dtype == np.int32 and (np.diff(epoch, axis=1) == 1).all()
        assert sorted(epoch[:, 0]) == list(range(0, 990, 10))
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
    assert (Windows(tokens, window, stride, seed=4).take(0, 99) != epochs[0]).any()


def test_any_stretch_is_the_stretch_of_the_whole():
    windows = Windows(np.arange(100, dtype=np.uint32), 7, 4, seed=1)
    whole = windows.take(0, 200)
    for start, count in ((0, 1), (13, 30), (23, 2), (150, 50), (5, 0)):
        assert (windows.take(start, count) == whole[start : start + count]).all()
    assert windows.take(10**15, 3).shape == (3, 7)


def test_without_seed_windows_are_in_order():
    windows = Windows(np.arange(24), 6, 5, seed=None)
    assert windows.take(0, 5)[:, 0].tolist() == [0, 5, 10, 15, 0]


def test_windows_need_one_window_of_tokens():
    assert len(Windows(np.arange(6), 6, 5, seed=0)) == 1
    with pytest.raises(DataError, match="has 5 tokens and one sequence needs 6"):
        Windows(np.arange(5), 6, 5, seed=0)


def test_window_has_the_targets_of_every_depth():
    assert window_length(tiny("x")) == 32 + 1 + 1

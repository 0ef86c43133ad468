"""A seeded permutation that costs no memory: any element of it is computed alone.

An epoch over billions of sequences cannot be an array in every process, and a resumed run must not
replay what came before. A Feistel network permutes the numbers of 2k bits whatever its round function
is; numbers that fall outside the range are sent through again until they fall inside (cycle walking).
Unlike a generator's `permutation`, the result can never change with NumPy's version.
"""

import numpy as np

ROUNDS = 8
MIN_HALF_BITS = 4


def permute(indices: np.ndarray, size: int, seed: int, epochs: np.ndarray | int = 0) -> np.ndarray:
    """Where each of `indices` goes in the permutation of range(size) that belongs to `seed` and its epoch.

    Args:
        indices: whole numbers in [0, size), any shape.
        epochs: which of the seed's permutations, one for all or one for each index.

    Returns:
        int64 of the shape of `indices`.
    """
    half_bits = max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    indices = np.asarray(indices, np.uint64)
    key = _mix(_mix(np.uint64(seed) + np.zeros_like(indices)) ^ np.asarray(epochs, np.uint64))
    values, keys = indices.ravel().copy(), key.ravel()
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], half_bits)
        outside = outside[values[outside] >= size]
    return values.reshape(indices.shape).astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return left << shift | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""Exact and near copies among documents, of which the first is kept.

A document's signature is a hash of its text and a MinHash of its shingles (Broder 1997). Documents that agree in one
of the bands of their MinHash are compared by all of it. Signatures lie in a file; the bands are found by sorting, some at
a time, so that a million documents take 528 MB of disk and 300 MB of memory, whatever their length.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence

import numpy as np
from rensa import RMinHash

PERMUTATIONS, ROWS = 128, 4
"""Bands of 4 of 128 meet with probability 1 - (1 - s^4)^32 at similarity s: 0.87 at 0.5, 0.9998 at 0.7."""
EXACT = 4
"""Words of 32 bits that hash the text itself; a signature is these and the MinHash."""
WIDTH = EXACT + PERMUTATIONS
SHINGLE = 5
BANDS_AT_ONCE = 8
PAIRS_AT_ONCE = 2**14
SEED = 1

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese: written without spaces, so that each character counts as a word."""
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def shingles(text: str) -> np.ndarray:
    """Hashes of every five words in a row, uint64; of all words where there are fewer, of the text where there is none."""
    words = WORD.findall(text.lower()) or [text.strip()]
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    width = min(SHINGLE, len(words))
    hashes = np.zeros(len(words) - width + 1, np.uint64)
    for place in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + len(hashes)] + np.uint64(1)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 [documents, WIDTH]."""
    sets = [shingles(text) for text in texts]
    ends = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
    flat = np.concatenate([np.zeros(0, np.uint64), *sets])
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, PERMUTATIONS, SEED).to_rows() if texts else []
    exact = [np.frombuffer(hashlib.blake2b(text.strip().encode(), digest_size=16).digest(), "<u4") for text in texts]
    result = np.empty((len(texts), WIDTH), np.uint32)
    for i, (row, own) in enumerate(zip(rows, exact)):
        result[i, :EXACT], result[i, EXACT:] = own, row
    return result


def find_originals(known: np.ndarray, count: int, threshold: float) -> np.ndarray:
    """Which document each one is a copy of.

    Args:
        known: signatures, uint32 [documents, WIDTH]; a memory map stays one.
        count: how many of the first are there already and stay.
        threshold: similarity from which a document is a near copy; 1 looks for exact ones alone.

    Returns:
        int64 [documents]: the number of a kept document, or -1 of a document that is kept itself.
    """
    original = np.full(len(known), -1, np.int64)
    exact = np.ascontiguousarray(known[:, :EXACT]).view("<u8")
    _drop_alike(original, _mixed(exact[:, 0], exact[:, 1]), count, None, 0)
    if threshold < 1:
        for first in range(EXACT, WIDTH, ROWS * BANDS_AT_ONCE):
            columns = np.array(known[:, first : first + ROWS * BANDS_AT_ONCE])
            for band in range(0, columns.shape[1], ROWS):
                pairs = np.ascontiguousarray(columns[:, band : band + ROWS]).view("<u8")
                _drop_alike(original, _mixed(pairs[:, 0], pairs[:, 1]), count, known, threshold)
    return _roots(original)


def _mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * np.uint64(0x9E3779B97F4A7C15)) ^ (second * np.uint64(0xC2B2AE3D27D4EB4F) + (first >> np.uint64(31)))


def _drop_alike(original: np.ndarray, keys: np.ndarray, count: int, known: np.ndarray | None, threshold: float) -> None:
    """Among documents still kept, those whose key an earlier one has are copies of it, if `known` agrees."""
    alive = np.flatnonzero(original < 0)
    alive = alive[np.argsort(keys[alive], kind="stable")]
    begins = np.flatnonzero(np.r_[True, keys[alive][1:] != keys[alive][:-1]])
    sizes = np.diff(np.r_[begins, len(alive)])
    firsts = np.repeat(alive[begins], sizes)
    for earlier in (firsts, np.r_[alive[:1], alive[:-1]]):  # the first of its kind, and the one before
        pairs = np.flatnonzero((earlier < alive) & (alive >= count) & (original[alive] < 0) & (keys[earlier] == keys[alive]))
        if known is not None:
            pairs = pairs[_similarities(known, earlier[pairs], alive[pairs]) >= threshold]
        original[alive[pairs]] = earlier[pairs]


def _similarities(known: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimated from the MinHashes: the share in which they agree."""
    result = np.empty(len(first))
    for start in range(0, len(first), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        result[part] = (known[first[part], EXACT:] == known[second[part], EXACT:]).mean(axis=1)
    return result


def _roots(original: np.ndarray) -> np.ndarray:
    """A copy of what turned out to be a copy is one of the same original."""
    while True:
        copies = np.flatnonzero(original >= 0)
        further = copies[original[original[copies]] >= 0]
        if not len(further):
            return original
        original[further] = original[original[further]]

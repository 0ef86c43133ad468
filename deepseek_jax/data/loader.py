"""Deterministic training sequences: any stretch of an endless shuffled stream, from its number alone.

Nothing is kept between calls, so that a resumed run, another number of processes or the sibling in the
other framework sees the same sequences.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from deepseek_jax.config import Config, TrainConfig
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.shuffle import permute


def part_size(train: TrainConfig) -> int:
    """Sequences of an accumulation part: the first batch's, however large batches grow, so that one program takes them all."""
    return (train.batch_size_start or train.batch_size) // train.gradient_accumulation_steps


def window_length(config: Config) -> int:
    """Tokens of one training sequence with its targets: the next token and one more per MTP depth (report 2.2)."""
    return config.train.sequence_length + 1 + config.model.num_nextn_predict_layers


def stride(config: Config) -> int:
    """Tokens between the beginnings of two sequences: of text they overlap by their targets, conversations are not cut."""
    return window_length(config) if config.data.format == "chat" else config.train.sequence_length


class TokenRow(Protocol):
    """One row of token ids, such as an array, a memory map, or `shards.Tokens`."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Windows:
    """An endless stream of windows into a flat array of tokens; each epoch holds every window once.

    Window k covers tokens[k * stride : k * stride + window]; a last one that would be too short is left out.

    Args:
        tokens: what lies on disk stays there.
        window: tokens of a sequence with its targets.
        stride: tokens between the beginnings of neighbours.
        seed: order within the epochs, another in each; None keeps the order of the text.

    Raises:
        DataError: when `tokens` is shorter than one window.
    """

    def __init__(self, tokens: TokenRow, window: int, stride: int, seed: int | None):
        if len(tokens) < window:
            raise DataError(f"the text has {len(tokens)} tokens and one sequence needs {window}; give more text")
        self.tokens, self.window, self.stride, self.seed = tokens, window, stride, seed

    def __len__(self) -> int:
        """Windows in one epoch."""
        return (len(self.tokens) - self.window) // self.stride + 1

    def take(self, start: int, count: int) -> np.ndarray:
        """Sequences number start .. start + count - 1 of the stream, int32 [count, window]."""
        return self.at(np.arange(start, start + count, dtype=np.int64))

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """The sequences of these numbers, int32 [numbers, window]."""
        epochs, windows = np.divmod(numbers, len(self))
        if self.seed is not None:
            windows = permute(windows, len(self), self.seed, epochs)
        result = np.empty((len(numbers), self.window), np.int32)
        for row, begin in zip(result, (windows * self.stride).tolist()):
            row[:] = self.tokens[begin : begin + self.window]
        return result


class Mixture:
    """An endless stream of sequences from several, each by its weight.

    Every `block` sequences hold the weights' shares of each, to the nearest whole, in an order of the seed's.

    Args:
        parts: the streams.
        weights: how much of each, in any unit.
    """

    def __init__(self, parts: Sequence[Windows], weights: Sequence[float], seed: int, block: int = 1000):
        shares = np.asarray(weights, np.float64) / sum(weights) * block
        counts = np.floor(shares).astype(np.int64)
        counts[np.argsort(counts - shares, kind="stable")[: block - counts.sum()]] += 1
        self._parts, self._counts, self._seed, self._block = list(parts), counts, seed, block
        self.window = parts[0].window

    def __len__(self) -> int:
        """Windows of all streams; how often each is read depends on its weight."""
        return sum(map(len, self._parts))

    def take(self, start: int, count: int) -> np.ndarray:
        """Sequences number start .. start + count - 1 of the stream, int32 [count, window]."""
        blocks, places = np.divmod(np.arange(start, start + count, dtype=np.int64), self._block)
        places = permute(places, self._block, self._seed, blocks)
        ends = np.cumsum(self._counts)
        owners = np.searchsorted(ends, places, side="right")
        numbers = blocks * self._counts[owners] + places - (ends - self._counts)[owners]
        result = np.empty((count, self.window), np.int32)
        for owner, part in enumerate(self._parts):
            own = owners == owner
            result[own] = part.at(numbers[own])
        return result


def training_sequences(config: Config, sets: Sequence[TokenRow]) -> Windows | Mixture:
    """The stream of sequences that a run trains on, from the tokens of one set or several.

    Raises:
        DataError: when a set is shorter than one sequence.
    """
    seed = config.data.seed
    streams = [Windows(tokens, window_length(config), stride(config), seed) for tokens in sets]
    return streams[0] if len(streams) == 1 else Mixture(streams, weights_of(config, sets), seed)


def evaluation_sequences(config: Config, texts: Sequence[TokenRow], weights: Sequence[float]) -> Windows | Mixture:
    """What a run is evaluated on, of which it takes train.eval_sequences: a text's first, or of several in these shares.

    Raises:
        DataError: as `training_sequences`.
    """
    streams = [Windows(tokens, config.train.sequence_length + 1, stride(config), seed=None) for tokens in texts]
    count = min(config.train.eval_sequences, sum(map(len, streams)))
    return streams[0] if len(streams) == 1 else Mixture(streams, weights, config.data.seed, count)


def weights_of(config: Config, sets: Sequence[TokenRow]) -> list[float]:
    """How much is read of each set, in any unit."""
    return config.data.weights or [len(tokens) for tokens in sets]

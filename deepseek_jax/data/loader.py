"""Deterministic training sequences: any stretch of an endless shuffled stream, from its number alone.

Nothing is kept between calls, so that a resumed run, another number of processes or the sibling in the
other framework sees the same sequences.
"""

import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.shuffle import permute


def window_length(config: Config) -> int:
    """Tokens of one training sequence with its targets: the next token and one more per MTP depth (report 2.2)."""
    return config.train.sequence_length + 1 + config.model.num_nextn_predict_layers


class Windows:
    """An endless stream of windows into a flat array of tokens; each epoch holds every window once.

    Window k covers tokens[k * stride : k * stride + window]; a last one that would be too short is left out.

    Args:
        tokens: one-dimensional token ids; a memory map stays one.
        window: tokens of a sequence with its targets.
        stride: tokens between the beginnings of neighbours.
        seed: order within the epochs, another in each; None keeps the order of the text.

    Raises:
        DataError: when `tokens` is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, window: int, stride: int, seed: int | None):
        if len(tokens) < window:
            raise DataError(f"the text has {len(tokens)} tokens and one sequence needs {window}; give more text")
        self.tokens, self.window, self.stride, self.seed = tokens, window, stride, seed

    def __len__(self) -> int:
        """Windows in one epoch."""
        return (len(self.tokens) - self.window) // self.stride + 1

    def take(self, start: int, count: int) -> np.ndarray:
        """Sequences number start .. start + count - 1 of the stream, int32 [count, window]."""
        epochs, windows = np.divmod(np.arange(start, start + count, dtype=np.int64), len(self))
        if self.seed is not None:
            windows = permute(windows, len(self), self.seed, epochs)
        positions = windows[:, None] * self.stride + np.arange(self.window)
        return np.asarray(self.tokens[positions], np.int32)

"""How well a model predicts text it was not trained on, in a unit that no tokenizer can flatter."""

import math

import numpy as np
import torch

from deepseek_jax.config import HELD_OUT, Config
from deepseek_jax.data.loader import Mixture, Windows, part_size
from deepseek_jax.data.marks import counts, read_marks
from deepseek_jax.data.packing import PreparedData
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.training.loss import cross_entropy


class Evaluation:
    """Bits per byte of the first train.eval_sequences sequences held out, and of each set of `data.eval`."""

    def __init__(self, config: Config, data: PreparedData):
        self._chunk = config.train.loss_chunk_tokens
        self._data = config.data
        self._batches = {name: _batches(config, text) for name, text in data.to_evaluate(config).items()}
        self._bytes = dict.fromkeys(self._batches, 0)
        for name, batches in self._batches.items():
            for batch in batches:
                marked = read_marks(config.data, batch)
                which = counts(marked)
                self._bytes[name] += int(data.token_bytes[marked.ids[:, 1:]][... if which is None else which].sum())

    def by_set(self, model: DeepseekV3) -> dict[str, float]:
        """`bits_per_byte` of every text by its name, HELD_OUT first."""
        return {name: self.bits_per_byte(model, name) for name in self._batches}

    @torch.no_grad()
    def bits_per_byte(self, model: DeepseekV3, name: str = HELD_OUT) -> float:
        """Of a text's own bytes, ends of documents counted in the bits but not in the bytes."""
        nats = 0.0
        model.eval()  # every choice of an expert is served
        for batch in self._batches[name]:
            marked = read_marks(self._data, torch.from_numpy(batch).long())
            ends = None if marked.ends is None else marked.ends[:, :-1]
            hidden, targets, which = model.hidden_states(marked.ids[:, :-1], ends), marked.ids[:, 1:], counts(marked)
            by_token = cross_entropy(hidden.flatten(0, 1), model.head(), targets.flatten(), self._chunk)
            nats += (by_token if which is None else by_token * which.flatten()).sum().item()
        return nats / math.log(2) / self._bytes[name]


def _batches(config: Config, windows: Windows | Mixture) -> list[np.ndarray]:
    """The first sequences, [B, T + 1] each."""
    train = config.train
    count = min(train.eval_sequences, len(windows))
    size = min(part_size(train), count)
    return [windows.take(start, min(size, count - start)) for start in range(0, count, size)]

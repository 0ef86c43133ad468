"""How well a model predicts text it was not trained on, in a unit that no tokenizer can flatter."""

import math

import numpy as np
import torch

from deepseek_jax.config import Config
from deepseek_jax.data.loader import Windows
from deepseek_jax.data.packing import PreparedData
from deepseek_torch.model.transformer import DeepseekV3
from deepseek_torch.training.loss import cross_entropy


class Evaluation:
    """Bits per byte of the first train.eval_sequences sequences of the held-out text."""

    def __init__(self, config: Config, data: PreparedData):
        train = config.train
        windows = Windows(data.held_out, train.sequence_length + 1, train.sequence_length, seed=None)
        count = min(train.eval_sequences, len(windows))
        size = min(train.batch_size // train.gradient_accumulation_steps, count)
        self._chunk = train.loss_chunk_tokens
        self._batches = [windows.take(start, min(size, count - start)) for start in range(0, count, size)]
        self._end = config.data.end_of_document if config.data.mask_documents else None
        self._bytes = 0
        for batch in self._batches:  # what follows an end of a document nothing of its own predicts
            counts = np.ones_like(batch[:, 1:], bool) if self._end is None else batch[:, :-1] != self._end
            self._bytes += int(data.token_bytes[batch[:, 1:]][counts].sum())

    @torch.no_grad()
    def bits_per_byte(self, model: DeepseekV3) -> float:
        """Of the text's own bytes, ends of documents counted in the bits but not in the bytes."""
        nats = 0.0
        model.eval()  # every choice of an expert is served
        for batch in self._batches:
            tokens = torch.from_numpy(batch).long()
            hidden, targets = model.hidden_states(tokens[:, :-1], self._end), tokens[:, 1:]
            by_token = cross_entropy(hidden.flatten(0, 1), model.head(), targets.flatten(), self._chunk)
            counts = torch.ones_like(by_token) if self._end is None else (tokens[:, :-1] != self._end).flatten()
            nats += (by_token * counts).sum().item()
        return nats / math.log(2) / self._bytes

"""How well a model predicts text it was not trained on, in a unit that no tokenizer can flatter."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.data.loader import Windows
from deepseek_jax.data.packing import PreparedData
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.training.loss import cross_entropy
from deepseek_jax.training.step import TrainState


class Evaluation:
    """Bits per byte of the first train.eval_sequences sequences of the held-out text."""

    def __init__(self, config: Config, data: PreparedData):
        train = config.train
        windows = Windows(data.held_out, train.sequence_length + 1, train.sequence_length, seed=None)
        count = min(train.eval_sequences, len(windows))
        size = min(train.batch_size // train.gradient_accumulation_steps, count)
        self._batches = [windows.take(start, size) for start in range(0, count - size + 1, size)]
        self._bytes = sum(int(data.token_bytes[batch[:, 1:]].sum()) for batch in self._batches)
        self._nats = jax.jit(partial(evaluation_nats, config=config))

    def bits_per_byte(self, state: TrainState) -> float:
        """Of the text's own bytes, ends of documents counted in the bits but not in the bytes."""
        nats = sum(float(self._nats(state.params, state.router_state, batch)) for batch in self._batches)
        return nats / math.log(2) / self._bytes


def evaluation_nats(params: Any, router_state: Any, tokens: jax.Array, config: Config) -> jax.Array:
    """Sum of the next tokens' nats over sequences [B, T + 1], main model only."""
    model = DeepseekV3(config.model)
    variables = {"params": params, "router_state": router_state}
    hidden = model.apply(variables, tokens[:, :-1], method="hidden_states")
    targets = tokens[:, 1:].reshape(-1)
    head = model.apply(variables, method="head")
    ones = jnp.ones(targets.shape, hidden.dtype)
    return cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, targets, ones, config.train.loss_chunk_tokens)[0]

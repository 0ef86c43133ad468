"""How well a model predicts text it was not trained on, in a unit that no tokenizer can flatter."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.config import HELD_OUT, MESH_AXES, Config, DataConfig
from deepseek_jax.data.loader import Mixture, Windows, part_size
from deepseek_jax.data.marks import counts, read_marks
from deepseek_jax.data.packing import PreparedData
from deepseek_jax.model.router import dropless
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.parallel.context import devices_of_a_sequence, own_tokens
from deepseek_jax.parallel.sharding import Division, place_batch
from deepseek_jax.parallel.weights import collect, gather_unstacked
from deepseek_jax.training.adapters import scaled
from deepseek_jax.training.loss import cross_entropy
from deepseek_jax.training.step import TrainState


class Evaluation:
    """Bits per byte of the first train.eval_sequences sequences held out, and of each set of `data.eval`."""

    def __init__(self, config: Config, data: PreparedData, division: Optional[Division] = None):
        train, windows = config.train, data.to_evaluate(config)
        counts = {name: min(train.eval_sequences, len(of_text)) for name, of_text in windows.items()}
        unit = 1 if division is None else division.batch_unit()
        size = -(-min(part_size(train), max(counts.values())) // unit) * unit
        self._batches, self._bytes = {}, {}
        for name, count in counts.items():
            of_text = windows[name]
            self._batches[name] = [_Batch(of_text, start, size, count, division) for start in range(0, count, size)]
            self._bytes[name] = sum(counted_bytes(config.data, of_text.take(i, 1), data.token_bytes) for i in range(count))
        self._nats = jax.jit(partial(evaluation_nats, config=config, division=division))

    def bits_per_byte(self, state: TrainState, name: str = HELD_OUT) -> float:
        """Of a text's own bytes, ends of documents counted in the bits but not in the bytes."""
        nats = sum(float(self._nats(state.params, state.router_state, *batch.arrays())) for batch in self._batches[name])
        return nats / math.log(2) / self._bytes[name]

    def by_set(self, state: TrainState) -> dict[str, float]:
        """`bits_per_byte` of every text by its name, HELD_OUT first."""
        return {name: self.bits_per_byte(state, name) for name in self._batches}


def counted_bytes(data: DataConfig, windows: np.ndarray, token_bytes: np.ndarray) -> int:
    """Bytes of the targets that count in sequences [B, T + 1]."""
    marked = read_marks(data, windows)
    which = counts(marked)
    return int(token_bytes[marked.ids[:, 1:]][... if which is None else which].sum())


@dataclass(frozen=True)
class _Batch:
    """Sequences start and on of a text that has `count`; what is missing to `size` repeats the last, without weight."""

    windows: Windows | Mixture
    start: int
    size: int
    count: int
    division: Optional[Division]

    def arrays(self) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]:
        """Tokens [size, T + 1], and whether a sequence counts: [size]."""
        tokens = place_batch(self.division, (self.size, self.windows.window), 0, self._tokens)
        return tokens, place_batch(self.division, (self.size,), 0, self._weights)

    def _tokens(self, start: int, end: int) -> np.ndarray:
        numbers = np.minimum(np.arange(self.start + start, self.start + end), self.count - 1)
        return np.concatenate([self.windows.take(number, 1) for number in numbers])

    def _weights(self, start: int, end: int) -> np.ndarray:
        return (np.arange(self.start + start, self.start + end) < self.count).astype(np.float32)


def evaluation_nats(
    params: Any, router_state: Any, tokens: jax.Array, weights: jax.Array, config: Config, division: Optional[Division]
) -> jax.Array:
    """Sum of the next tokens' nats over sequences [B, T + 1] times their weights [B], main model only."""
    if division is None:
        return _nats(params, router_state, tokens, weights, config, None)

    def of_device(params: Any, router_state: Any, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        params, router_state = collect(division, config.model, params, router_state)
        params = gather_unstacked(division, config.model, params, tokens[:, :-1].size // devices_of_a_sequence(division))
        return jax.lax.psum(_nats(params, router_state, tokens, weights, config, division), MESH_AXES)

    batch, whole = division.batch_spec(axis=0), PartitionSpec()
    specs = division.param_specs(), whole, batch, batch
    return jax.shard_map(of_device, mesh=division.mesh, in_specs=specs, out_specs=whole, check_vma=False)(
        params, router_state, tokens, weights
    )


def _nats(
    params: Any, router_state: Any, tokens: jax.Array, weights: jax.Array, config: Config, division: Optional[Division]
) -> jax.Array:
    model = DeepseekV3(dropless(config.model), division)
    variables = {"params": scaled(params, config.lora), "router_state": router_state}
    marked = read_marks(config.data, tokens)
    ends = None if marked.ends is None else marked.ends[:, :-1]
    hidden = model.apply(variables, marked.ids[:, :-1], ends, method="hidden_states")
    length = tokens.shape[1] - 1
    targets = own_tokens(division, marked.ids, length, ahead=1).reshape(-1)
    head = model.apply(variables, method="head")
    by_token = jnp.repeat(weights, hidden.shape[1]).astype(hidden.dtype)
    which = counts(marked)
    if which is not None:
        by_token *= own_tokens(division, which, length).reshape(-1)
    return cross_entropy(hidden.reshape(-1, hidden.shape[-1]), head, targets, by_token, config.train.loss_chunk_tokens)[0]

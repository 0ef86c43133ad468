"""How likely a model finds text: nats of every token, of texts of any length, exactly once each."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.router import dropless
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.parallel.weights import gather_unstacked
from deepseek_jax.training.loss import cross_entropy

SHORTEST, CHUNK_TOKENS = 32, 1024
"""What shorter texts are padded to; and tokens whose logits exist at one time."""


class Scored(NamedTuple):
    """Of a sequence's targets, the tokens after its first.

    Attributes:
        nats: [T] negative log-likelihoods.
        greedy: [T] whether each is the likeliest token.
    """

    nats: np.ndarray
    greedy: np.ndarray


class _Window(NamedTuple):
    """A stretch of a sequence that the model reads at once: positions first to first + length of it, told from `told` on."""

    sequence: int
    first: int
    told: int
    last: int


class Scorer:
    """A model ready to score.

    Args:
        variables: of a `DeepseekV3`; on a mesh as `checkpoint.on_mesh` loads them, stacked.
        context: tokens that a target may look back on, at most; sequences beyond it are read in windows.
        stride: new targets of each window after the first; fewer leave each of them more to look back on.
        batch_size: windows read at once; on a mesh rounded up to a multiple of its devices.
        division: the mesh whose devices share windows and experts; null is one device.
    """

    def __init__(
        self, config: ModelConfig, variables: dict[str, Any], context: int, stride: int, batch_size: int,
        division: Optional[Division] = None,
    ):  # fmt: skip
        self.context, self._stride = context, stride
        unit = 1 if division is None else division.mesh.size
        self._batch_size = -(-batch_size // unit) * unit
        self._variables = jax.device_put(variables) if division is None else variables
        self._score = jax.jit(partial(_score, config, division))

    def score(self, sequences: Iterable[Sequence[int]]) -> Iterator[Scored]:
        """Every target of every sequence, in their order.

        Args:
            sequences: token ids; the first of each is given, and no target.
        """
        waiting: list[tuple[Sequence[int], int]] = []
        windows: list[_Window] = []
        done: dict[int, list[Scored]] = {}
        told = 0
        for number, sequence in enumerate(sequences):
            new = self._windows(number, len(sequence))
            waiting.append((sequence, len(new)))
            windows += new
            done[number] = []
            while len(windows) >= self._batch_size:
                batch, windows = windows[: self._batch_size], windows[self._batch_size :]
                self._read(batch, waiting, told, done)
            while waiting and len(done[told]) == waiting[0][1]:
                yield _joined(done.pop(told))
                waiting.pop(0)
                told += 1
        if windows:
            self._read(windows, waiting, told, done)
        for number in range(told, told + len(waiting)):
            yield _joined(done.pop(number))

    def _windows(self, number: int, length: int) -> list[_Window]:
        """Of a sequence: each target is told by one window."""
        windows, told = [], 0
        while told < length - 1:
            last = min(length - 1, self.context if told == 0 else told + self._stride)
            windows.append(_Window(number, max(last - self.context, 0), told, last))
            told = last
        return windows

    def _read(
        self, windows: list[_Window], waiting: list[tuple[Sequence[int], int]], told: int, done: dict[int, list[Scored]]
    ) -> None:
        longest = max(window.last - window.first for window in windows)
        length = min(max(SHORTEST, 1 << (longest - 1).bit_length()), self.context)  # few lengths are compiled
        tokens = np.zeros((self._batch_size, length + 1), np.int32)
        for row, window in zip(tokens, windows):
            piece = waiting[window.sequence - told][0][window.first : window.last + 1]
            row[: len(piece)] = piece
        nats, greedy = jax.device_get(self._score(self._variables, tokens))
        for number, window in enumerate(windows):
            part = slice(window.told - window.first, window.last - window.first)
            done[window.sequence].append(Scored(nats[number, part], greedy[number, part]))


def _joined(parts: list[Scored]) -> Scored:
    empty = Scored(np.zeros(0), np.zeros(0, bool))
    return Scored(*map(np.concatenate, zip(*parts))) if parts else empty


def _score(
    config: ModelConfig, division: Optional[Division], variables: dict[str, Any], tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the targets of sequences [B, T + 1]: nats, and whether they are the likeliest, both [B, T]."""
    if division is None:
        return _score_own(config, None, variables, tokens)

    def of_device(variables: dict[str, Any], tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = gather_unstacked(division, config, variables["params"], tokens[:, :-1].size)
        return _score_own(config, division, variables | {"params": params}, tokens)

    specs = {"params": division.param_specs(), "router_state": PartitionSpec()}
    batch = division.batch_spec(axis=0)
    return jax.shard_map(of_device, mesh=division.mesh, in_specs=(specs, batch), out_specs=batch, check_vma=False)(
        variables, tokens
    )


def _score_own(
    config: ModelConfig, division: Optional[Division], variables: dict[str, Any], tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_score` of this device's sequences."""
    model = DeepseekV3(dropless(config), division)
    hidden = model.apply(variables, tokens[:, :-1], method="hidden_states")
    head, targets = model.apply(variables, method="head"), tokens[:, 1:]
    flat = hidden.reshape(-1, hidden.shape[-1])
    _, nats = cross_entropy(flat, head, targets.reshape(-1), jnp.ones(len(flat), hidden.dtype), CHUNK_TOKENS)
    likeliest = _likeliest(flat, head)
    return nats.reshape(targets.shape), likeliest.reshape(targets.shape) == targets


def _likeliest(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """The likeliest token after each state [N, d], in chunks as `cross_entropy`."""
    size = min(CHUNK_TOKENS, len(hidden))
    chunks = jnp.pad(hidden, ((0, -len(hidden) % size), (0, 0))).reshape(-1, size, hidden.shape[-1])
    return jax.lax.map(lambda chunk: jnp.argmax(chunk @ head, axis=-1), chunks).reshape(-1)[: len(hidden)]

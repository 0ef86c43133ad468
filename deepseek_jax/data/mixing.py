"""Domains to the asked shares of the tokens: some documents left out, some repeated, none cut."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np

from deepseek_jax.data.documents import DataError
from deepseek_jax.data.shuffle import permute


@dataclass(frozen=True)
class Mixed:
    """What a domain became."""

    asked: float
    """Share of the tokens."""
    share: float
    tokens_in: int
    tokens: int
    documents: int
    repetition: float
    """Times that a token is read."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def shares_of(mix: Mapping[str, float]) -> dict[str, float]:
    """A mix in any unit as shares of 1."""
    total = sum(mix.values())
    return {domain: share / total for domain, share in mix.items()}


def mix_documents(
    domains: np.ndarray,
    lengths: np.ndarray,
    names: Sequence[str],
    shares: Mapping[str, float],
    total: Optional[int],
    max_repetition: float,
    seed: int,
) -> tuple[np.ndarray, dict[str, Mixed]]:
    """Choose documents, some more than once, and shuffle them.

    Args:
        domains: number of each document's name, [documents].
        lengths: their tokens.
        total: tokens wanted; None wants as many as the domains asked for have. There are fewer where max_repetition does
            not allow it, with the same shares.

    Returns:
        Numbers of documents in the order in which they are packed, and by domain what was done.

    Raises:
        DataError: naming a domain that is asked for and has no document.
    """
    own = {name: np.flatnonzero(domains == number) for number, name in enumerate(names)}
    sizes = {name: int(lengths[chosen].sum()) for name, chosen in own.items()}
    asked = {name: share for name, share in shares.items() if share > 0}
    for name in asked:
        if not sizes[name]:
            raise DataError(f"prepare.mix.{name}={asked[name]:g}: no document of this domain is left to train on; give text "
                            f"of it or set prepare.mix.{name}=0")  # fmt: skip
    total = total or sum(sizes[name] for name in asked)
    wanted = min([total, *(max_repetition * sizes[name] / share for name, share in asked.items())])
    picked = {name: _pick(own[name], lengths, asked[name] * wanted, seed) for name in asked}
    tokens = {name: int(lengths[chosen].sum()) for name, chosen in picked.items()}
    everything = sum(tokens.values())
    told = {
        name: Mixed(shares.get(name, 0.0), tokens.get(name, 0) / max(everything, 1), sizes[name], tokens.get(name, 0),
                    len(picked.get(name, ())), tokens.get(name, 0) / max(sizes[name], 1))
        for name in names
    }  # fmt: skip
    order = np.concatenate([np.zeros(0, np.int64), *picked.values()])
    return order[permute(np.arange(len(order)), len(order), seed)], told


def _pick(own: np.ndarray, lengths: np.ndarray, target: float, seed: int) -> np.ndarray:
    """All documents as often as they fit whole, and of the rest, in an order of the seed's, those that still fit."""
    size = int(lengths[own].sum())
    times, rest = divmod(round(target), size)
    shuffled = own[permute(np.arange(len(own)), len(own), seed, 1)]
    further: list[np.ndarray] = []
    while len(shuffled) and rest > 0:
        ends = np.cumsum(lengths[shuffled])
        fitting = int(np.searchsorted(ends, rest, side="right"))
        further.append(shuffled[:fitting])
        rest -= int(ends[fitting - 1]) if fitting else 0
        shuffled = shuffled[fitting + 1 :]
        shuffled = shuffled[lengths[shuffled] <= rest]
    return np.concatenate([*[own] * times, *further, np.zeros(0, np.int64)]).astype(np.int64)

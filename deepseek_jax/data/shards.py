"""Shards of tokens on disk, and many of them as one row of tokens that is never held in memory.

A shard is a file in Arrow's streaming format of one record batch: `input_ids`, a large list of uint16 or, beyond 65536
ids, uint32; `domain` and `source`, text. One row is one document, its end-of-document token included. Arrow keeps all ids
of the batch in one stretch and the documents' ends beside it, so that a memory map of the file is the row of tokens.
`datasets.load_dataset("arrow", data_files="OUT/train-*.arrow")` reads them, too.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa

from deepseek_jax.data.documents import DataError

MANIFEST, TOKENIZER, SIGNATURES = "prepared.json", "tokenizer.json", "signatures.npy"
FORMAT = 1
PARTS = ("train", "held_out")


@dataclass(frozen=True)
class Shard:
    """One file, memory-mapped."""

    tokens: np.ndarray
    """[tokens], all documents one after the other."""
    ends: np.ndarray
    """Where each begins, and the end of the last: int64 [documents + 1]."""
    domains: pa.Array
    sources: pa.Array

    def __len__(self) -> int:
        return len(self.ends) - 1

    def document(self, row: int) -> np.ndarray:
        """The tokens of one document."""
        return self.tokens[self.ends[row] : self.ends[row + 1]]


def write_shard(
    path: Path, documents: Sequence[np.ndarray], domains: Sequence[str], sources: Sequence[str], dtype: np.dtype
) -> None:
    """Write a shard, whole or not at all."""
    ends = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=ends[1:])
    tokens = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype, copy=False)
    ids = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(tokens))
    batch = pa.record_batch(
        {"input_ids": ids, "domain": pa.array(domains, pa.string()), "source": pa.array(sources, pa.string())}
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_shard(path: Path) -> Shard:
    """Map a shard.

    Raises:
        DataError: naming the file when it is missing or no shard.
    """
    try:
        batch = pa.ipc.open_stream(pa.memory_map(str(path), "r")).read_next_batch()
        batch.validate(full=True)
    except (OSError, StopIteration, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a shard of tokens: {str(error).splitlines()[0]}") from None
    kind = batch.schema.field("input_ids").type if "input_ids" in batch.schema.names else None
    if kind not in (pa.large_list(pa.uint16()), pa.large_list(pa.uint32())) or {"domain", "source"} - {*batch.schema.names}:
        raise DataError(f"{path}: is no shard of tokens; it needs input_ids of uint16 or uint32, domain and source")
    ids = batch.column("input_ids")
    ends = ids.offsets.to_numpy()
    return Shard(ids.values.to_numpy(zero_copy_only=True), ends, batch.column("domain"), batch.column("source"))


class Tokens:
    """The tokens of many shards as one row; a slice of it is read from the files that it lies in.

    Args:
        paths: the files in order.
        counts: their tokens.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        self._paths = list(paths)
        self._starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, end, _ = part.indices(len(self))
        first = bisect_right(self._starts, start) - 1
        pieces = []
        while start < end:
            until = min(end, self._starts[first + 1])
            pieces.append(self._shard(first)[start - self._starts[first] : until - self._starts[first]])
            start, first = until, first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint16), *pieces])

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._open:
            tokens = open_shard(self._paths[number]).tokens
            if len(tokens) != self._starts[number + 1] - self._starts[number]:
                raise DataError(
                    f"{self._paths[number]}: holds {len(tokens)} tokens, not what {MANIFEST} says; prepare it again"
                )
            self._open[number] = tokens
        return self._open[number]


def write_manifest(directory: Path, fingerprint: str, shards: dict[str, list[dict[str, Any]]], **told: Any) -> None:
    """What makes a directory a prepared set; written last."""
    content = {"format": FORMAT, "fingerprint": fingerprint, **told, "shards": shards}
    partial = directory / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(directory / MANIFEST)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared set, checked.

    Raises:
        DataError: naming the directory or file at fault.
    """
    path = Path(directory).expanduser() / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{directory}: holds no {MANIFEST}; prepare it: python -m deepseek_jax.prepare") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: is not of format {FORMAT}, which this version reads; prepare it again")
    for part in PARTS:
        for shard in _shards(content, part):
            name, count = shard.get("file"), shard.get("tokens")
            if not isinstance(name, str) or Path(name).name != name or not isinstance(count, int) or count < 0:
                raise DataError(f"{path}: {part} names no sound shard: {str(shard)[:80]}")
    return content


def _shards(content: dict[str, Any], part: str) -> Iterable[dict[str, Any]]:
    shards = content.get("shards")
    found = shards.get(part) if isinstance(shards, dict) else None
    return [shard if isinstance(shard, dict) else {} for shard in found] if isinstance(found, list) else []


def open_part(directory: Path, part: str, manifest: Optional[dict[str, Any]] = None) -> Tokens:
    """The tokens of a prepared set to train on, or those held out."""
    directory = Path(directory).expanduser()
    shards = list(_shards(manifest or read_manifest(directory), part))
    return Tokens([directory / shard["file"] for shard in shards], [shard["tokens"] for shard in shards])

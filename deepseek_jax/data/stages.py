"""The stages of preparing data, each a function of its settings and one shard, with a file for its result.

Any engine that maps a function over a list can run them, on as many machines as share a file system: what a stage needs
lies in the work directory, its memory is bounded by the shard, and a result that is there already is not made again.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from tokenizers import Tokenizer

from deepseek_jax.config import PrepareConfig
from deepseek_jax.data.dedup import signatures
from deepseek_jax.data.documents import READ_ROWS, DataError
from deepseek_jax.data.domains import DOMAINS, classify
from deepseek_jax.data.infilling import Marks, cut_for_infilling, find_marks
from deepseek_jax.data.quality import judge
from deepseek_jax.data.shards import Shard, open_shard, write_shard
from deepseek_jax.data.sources import Document, Fault, Piece, read_source
from deepseek_jax.data.tokenizer import end_of_document_id, largest_id, load_tokenizer, pieces

READ, SIGNED, JUDGED, ENCODED, PACKED = "read", "signed", "judged", "encoded", "packed"
ORIGINALS, TOKENIZER, PLAN, BASES = "originals.npy", "tokenizer.json", "plan", "bases.npy"
FAULTS_KEPT, SAMPLES_OF_A_RULE, SAMPLE_CHARACTERS = 100, 3, 500
BATCH_CHARACTERS = 2**20
STRICT = "mend it, or leave --strict out to pass over such"


@dataclass(frozen=True)
class Settings:
    """What every stage is told."""

    work: Path
    config: PrepareConfig
    strict: bool = False


def _once(settings: Settings, stage: str, name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `make` tells of its result, from a file that is written last; it gets the path of the result, without suffix."""
    folder = settings.work / stage
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    told = make(folder / name) | {"seconds": time.perf_counter() - begin}
    partial = folder / f".{name}.{os.getpid()}.partial"
    partial.write_text(json.dumps(told), encoding="utf-8")
    partial.replace(path)
    return told


def read_group(settings: Settings, task: tuple[int, list[Piece]]) -> dict[str, Any]:
    """Read some inputs into parts, parquet files of about `shard_bytes` of text each."""
    number, group = task
    config = settings.config

    def make(path: Path) -> dict[str, Any]:
        reasons: Counter[str] = Counter()
        faults: list[str] = []
        parts: list[dict[str, Any]] = []
        held: list[Document] = []
        size = 0

        def flush() -> None:
            if held:
                name = f"{path.name}-{len(parts):05d}"
                _write_documents(path.with_name(f"{name}.parquet"), held)
                parts.append({"name": name, "documents": len(held), "bytes": size})
                held.clear()

        for piece in group:
            for item in read_source(piece, config.text_field, config.domain_field, config.tokenizer):
                if isinstance(item, Fault):
                    if settings.strict:
                        raise DataError(f"{item.where}: {item.reason}; {STRICT}")
                    reasons[item.reason] += 1
                    faults += [f"{item.where}: {item.reason}"] if len(faults) < FAULTS_KEPT else []
                    continue
                held.append(item)
                size += len(item.text.encode())
                if size >= config.shard_bytes:
                    flush()
                    size = 0
        flush()
        return {"parts": parts, "reasons": dict(reasons), "faults": faults}

    return _once(settings, READ, f"{number:06d}", make)


def _write_documents(path: Path, documents: list[Document]) -> None:
    table = pa.table({
        "text": pa.array([document.text for document in documents], pa.large_string()),
        "source": pa.array([document.source for document in documents], pa.string()),
        "domain": pa.array([document.domain for document in documents], pa.string()),
    })  # fmt: skip
    parquet.write_table(table, path, row_group_size=READ_ROWS, compression="zstd", compression_level=1)


def read_part(settings: Settings, name: str) -> Iterator[list[dict[str, Any]]]:
    """The documents of a part, some at a time."""
    with parquet.ParquetFile(settings.work / READ / f"{name}.parquet") as table:
        for batch in table.iter_batches(READ_ROWS):
            yield batch.to_pylist()


def sign_part(settings: Settings, name: str) -> dict[str, Any]:
    """What copies are recognised by, for every document of a part."""

    def make(path: Path) -> dict[str, Any]:
        found = np.concatenate([signatures([row["text"] for row in rows]) for rows in read_part(settings, name)])
        np.save(path.with_suffix(".npy"), found)
        return {"documents": len(found)}

    return _once(settings, SIGNED, name, make)


def judge_part(settings: Settings, task: tuple[str, int]) -> dict[str, Any]:
    """Domain, score and rule of each document of a part, and whether it stays.

    Args:
        task: the part, and the number of its first document among all.
    """
    name, first = task

    def make(path: Path) -> dict[str, Any]:
        originals = np.load(settings.work / ORIGINALS, mmap_mode="r")[first:]
        random = np.random.default_rng((settings.config.seed, first))
        domains: list[int] = []
        scores: list[float] = []
        sizes: list[int] = []
        rules: Counter[str] = Counter()
        samples: dict[str, list[dict[str, Any]]] = {}
        unique: Counter[str] = Counter()
        for rows in read_part(settings, name):
            for row in rows:
                sizes.append(len(row["text"].encode()))
                if originals[len(domains)] >= 0:
                    domains.append(-1)
                    scores.append(np.nan)
                    continue
                domain = row["domain"] if row["domain"] in DOMAINS else classify(row["text"])
                score, rule = judge(row["text"], domain)
                domains.append(DOMAINS.index(domain))
                scores.append(score)
                unique[domain] += 1
                if score < settings.config.quality_threshold:
                    rules[rule] += 1
                    kept = samples.setdefault(rule, [])
                    place = len(kept) if len(kept) < SAMPLES_OF_A_RULE else int(random.integers(rules[rule]))
                    if place < SAMPLES_OF_A_RULE:
                        kept[place : place + 1] = [_shown(row, domain, score, rule)]
        np.savez(path.with_suffix(".npz"), domain=np.array(domains, np.int8), score=np.array(scores, np.float32),
                 bytes=np.array(sizes, np.int64))  # fmt: skip
        return {"rules": dict(rules), "unique": dict(unique), "samples": samples}

    return _once(settings, JUDGED, name, make)


def _shown(row: dict[str, Any], domain: str, score: float, rule: str) -> dict[str, Any]:
    return {"rule": rule, "score": round(score, 3), "domain": domain, "source": row["source"],
            "text": row["text"][:SAMPLE_CHARACTERS]}  # fmt: skip


def kept_rows(settings: Settings, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which documents of a part stay, as booleans; and what `judge_part` found of all of them."""
    with np.load(settings.work / JUDGED / f"{name}.npz", allow_pickle=False) as content:
        found = {key: content[key] for key in content.files}
    return found["score"] >= settings.config.quality_threshold, found  # NaN, of copies, is not


def kept_texts(settings: Settings, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number within the part, and the document, of those that stay."""
    kept, _ = kept_rows(settings, name)
    number = 0
    for rows in read_part(settings, name):
        for row in rows:
            if kept[number]:
                yield number, row
            number += 1


def encode_part(settings: Settings, task: tuple[str, int]) -> dict[str, Any]:
    """The tokens of the documents of a part that stay, as a shard.

    Args:
        task: as of `judge_part`.
    """
    name, first = task

    def make(path: Path) -> dict[str, Any]:
        tokenizer = load_tokenizer(settings.work / TOKENIZER)
        _, found = kept_rows(settings, name)
        rows: list[tuple[int, str]] = []

        def texts() -> Iterator[tuple[int, str]]:
            for number, row in kept_texts(settings, name):
                rows.append((number, row["source"]))
                yield first + number, row["text"]

        dtype = np.dtype("<u2" if largest_id(tokenizer) < 2**16 else "<u4")
        encoded = list(encode(texts(), tokenizer, settings.config.fim_rate, settings.config.seed, dtype))
        domains = [DOMAINS[found["domain"][number]] for number, _ in rows]
        write_shard(path.with_suffix(".arrow"), encoded, domains, [source for _, source in rows], dtype)
        begin = find_marks(tokenizer).begin if settings.config.fim_rate else None
        tokens: Counter[str] = Counter()
        infilled: Counter[str] = Counter()
        for domain, ids in zip(domains, encoded):
            tokens[domain] += len(ids)
            infilled[domain] += begin is not None and bool(ids[0] == begin)
        return {"documents": dict(Counter(domains)), "tokens": dict(tokens), "infilled": dict(infilled)}

    return _once(settings, ENCODED, name, make)


def encode(
    texts: Iterable[tuple[int, str]], tokenizer: Tokenizer, fim_rate: float, seed: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Token ids of each text with the end-of-document token, some texts rearranged for infilling.

    Args:
        texts: each with its number among all.
    """
    end = end_of_document_id(tokenizer)
    marks = find_marks(tokenizer) if fim_rate else None
    ids: list[np.ndarray] = []
    for batch in _batches(item for number, text in texts for item in (*_items(text, marks, fim_rate, (seed, number)), None)):
        encoded = iter(
            tokenizer.encode_batch_fast([item for item in batch if isinstance(item, str)], add_special_tokens=False)
        )
        for item in batch:
            if item is None:
                yield np.concatenate([*ids, np.array([end], dtype)])
                ids = []
            else:
                ids.append(np.array(next(encoded).ids if isinstance(item, str) else [item], dtype))


def _items(text: str, marks: Optional[Marks], fim_rate: float, key: tuple[int, int]) -> Iterator[str | int]:
    """Pieces of the text, and marks between them."""
    cut = cut_for_infilling(text, fim_rate, key) if marks else None
    if cut is None or marks is None:
        yield from pieces(text)
        return
    prefix, middle, suffix = cut
    for mark, part in ((marks.begin, prefix), (marks.hole, suffix), (marks.end, middle)):
        yield mark
        yield from pieces(part)


def _batches(items: Iterable[str | int | None]) -> Iterator[list[str | int | None]]:
    """So that the tokenizer has enough for its threads, and not more than memory holds."""
    batch: list[str | int | None] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item) if isinstance(item, str) else 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def pack_shard(settings: Settings, task: tuple[str, list[str]]) -> dict[str, Any]:
    """One shard of the result: the documents that the plan names, from the parts' shards.

    Args:
        task: name of the shard, and all parts in order.
    """
    name, parts = task

    def make(path: Path) -> dict[str, Any]:
        numbers = np.load(settings.work / PLAN / f"{name}.npy")
        bases = np.load(settings.work / BASES)
        places = np.searchsorted(bases, numbers, side="right") - 1
        opened: dict[int, Shard] = {}
        documents, domains, sources = [], [], []
        for place, number in zip(places.tolist(), numbers.tolist()):
            if place not in opened:
                opened[place] = open_shard(settings.work / ENCODED / f"{parts[place]}.arrow")
            shard, row = opened[place], number - int(bases[place])
            documents.append(shard.document(row))
            domains.append(shard.domains[row].as_py())
            sources.append(shard.sources[row].as_py())
        write_shard(path.with_suffix(".arrow"), documents, domains, sources, documents[0].dtype)
        return {"file": f"{name}.arrow", "tokens": sum(map(len, documents)), "documents": len(documents)}

    return _once(settings, PACKED, name, make)

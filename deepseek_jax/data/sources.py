"""Raw documents, one by one, with what was wrong between them: reading goes on after bad input and names it.

`data.input` of a training run is read by `documents`, which stops at the first fault instead.
"""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

from deepseek_jax.data.compressed import BROKEN, COMPRESSED_SUFFIXES, kind_of, open_binary
from deepseek_jax.data.documents import READ_ROWS, DataError
from deepseek_jax.data.megatron import read_megatron
from deepseek_jax.data.tokenizer import find_tokenizer

DATASET, PYTHON = "dataset:", "python:"
MAX_DOCUMENT_BYTES = 2**28
"""A longer file or line is no document, and might not fit in memory."""
TEXT = (
    ".txt",
    ".md",
    ".rst",
    ".tex",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".js",
    ".ts",
    ".java",
    ".go",
    ".rs",
    ".rb",
    ".sh",
)
SUFFIXES = (*(kind + packed for kind in (*TEXT, ".jsonl") for packed in ("", *COMPRESSED_SUFFIXES)), ".parquet", ".idx")
"""What is read of directories."""
LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "turtledemo", "lib2to3", "ensurepip",
    "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip
"""Folders of the standard library that hold others' code, tests or tables."""


@dataclass(frozen=True)
class Document:
    """One text, where it came from, and the domain that its record gives it, if any."""

    text: str
    source: str
    domain: Optional[str] = None


@dataclass(frozen=True)
class Fault:
    """Input that is no document: where (file and line) and why."""

    where: str
    reason: str


class Piece(NamedTuple):
    """What is read at once: a source, or a part of a large file."""

    name: str
    """A file, `python:` or `dataset:...`."""
    start: int = 0
    """Byte of a .jsonl file, or row group of a .parquet file."""
    stop: Optional[int] = None
    """Its end; null is the file's."""
    before: int = 0
    """Lines or rows before it."""


def read_source(piece: Piece, text_field: str, domain_field: str, tokenizer: Optional[str]) -> Iterator[Document | Fault]:
    """The documents of a file or a part of it, of the standard library, or of a `dataset:`.

    Args:
        tokenizer: with which Megatron's tokens become text again.
    """
    name = piece.name
    if name.startswith(PYTHON):
        yield from python_library()
    elif name.startswith(DATASET):
        yield from _read_dataset(name, text_field, domain_field)
    else:
        path = Path(name)
        try:
            kind = kind_of(path)
            if kind == ".jsonl":
                yield from _read_jsonl(path, piece, text_field, domain_field)
            elif kind == ".parquet":
                yield from _read_parquet(path, piece, text_field, domain_field)
            elif kind == ".idx":
                yield from _read_megatron(path, tokenizer)
            else:
                yield from _read_text(path)
        except OSError as error:
            yield Fault(name, f"cannot be read: {error.strerror or error}")


def _read_text(path: Path) -> Iterator[Document | Fault]:
    try:
        with open_binary(path) as file:
            content = file.read(MAX_DOCUMENT_BYTES + 1)
    except BROKEN:
        yield Fault(str(path), "damaged compression")
        return
    yield _document(content, str(path))


def _document(content: bytes, where: str, domain: Optional[str] = None) -> Document | Fault:
    if len(content) > MAX_DOCUMENT_BYTES:
        return Fault(where, f"longer than {MAX_DOCUMENT_BYTES} bytes")
    if 0 in content:
        return Fault(where, "binary or UTF-16: holds a zero byte")
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return Fault(where, "not UTF-8")
    return Document(text, where, domain) if text.strip() else Fault(where, "empty")


def _read_jsonl(path: Path, piece: Piece, text_field: str, domain_field: str) -> Iterator[Document | Fault]:
    number = piece.before
    try:
        with open_binary(path) as file:
            if piece.start:
                file.seek(piece.start)
            for number, line in enumerate(_lines(file, piece.stop), piece.before + 1):
                where = f"{path}:{number}"
                if len(line) > MAX_DOCUMENT_BYTES:
                    yield Fault(where, f"longer than {MAX_DOCUMENT_BYTES} bytes")
                elif line.strip():
                    yield _parsed(line, where, text_field, domain_field)
    except BROKEN:
        yield Fault(f"{path}:{number + 1}", "damaged compression")
    if not number:
        yield Fault(str(path), "empty")


def _lines(file: BinaryIO, stop: Optional[int]) -> Iterator[bytes]:
    """Lines to there, of which one that is too long comes cut, and is passed over to its end."""
    while (stop is None or file.tell() < stop) and (line := file.readline(MAX_DOCUMENT_BYTES + 1)):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(2**20)


def _parsed(line: bytes, where: str, text_field: str, domain_field: str) -> Document | Fault:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Fault(where, "not UTF-8")
    except (ValueError, RecursionError):
        return Fault(where, "not JSON")
    if not isinstance(record, dict):
        return Fault(where, "no JSON object")
    return _from_record(record, where, text_field, domain_field)


def _from_record(record: dict[str, Any], where: str, text_field: str, domain_field: str) -> Document | Fault:
    text, domain = record.get(text_field), record.get(domain_field)
    if not isinstance(text, str):
        return Fault(where, f"{'null' if text_field in record and text is None else 'no text'} in field {text_field}")
    if not text.strip():
        return Fault(where, "empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Fault(where, "half a surrogate pair")
    return Document(text, str(record.get("source") or where), domain if isinstance(domain, str) else None)


def _read_parquet(path: Path, piece: Piece, text_field: str, domain_field: str) -> Iterator[Document | Fault]:
    import pyarrow
    from pyarrow import parquet

    row = piece.before
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                yield Fault(str(path), f"has no column {text_field}")
                return
            wanted = [name for name in (text_field, domain_field, "source") if name in names]
            groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
            for batch in table.iter_batches(batch_size=READ_ROWS, row_groups=groups, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    yield _from_record(record, f"{path}:{row}", text_field, domain_field)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError):
        yield Fault(f"{path}:{row + 1}", "not sound parquet")


def _read_megatron(path: Path, tokenizer: Optional[str]) -> Iterator[Document | Fault]:
    if tokenizer is None:
        raise DataError(f"{path}: holds tokens; give the tokenizer that made them, prepare.tokenizer=PATH")
    known = find_tokenizer(tokenizer)
    try:
        for number, ids in enumerate(read_megatron(path)):
            yield _document(known.decode(ids.tolist()).encode(), f"{path}:{number + 1}")
    except DataError as error:
        yield Fault(str(path), str(error).removeprefix(f"{path}: "))


def _read_dataset(name: str, text_field: str, domain_field: str) -> Iterator[Document | Fault]:
    import datasets

    path, configuration, split = (*name.removeprefix(DATASET).split(","), "", "")[:3]
    try:
        rows = datasets.load_dataset(path, configuration or None, split=split or "train", streaming=True)
        for number, record in enumerate(rows, 1):
            yield _from_record(record, f"{name}:{number}", text_field, domain_field)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: datasets cannot open it: {str(error).splitlines()[0]}") from None


def python_library() -> Iterator[Document]:
    """Real text that every Python has: the chapters of the language reference, and the standard library's modules."""
    try:
        from pydoc_data import topics
    except ImportError:  # Left out by some distributions.
        chapters: dict[str, str] = {}
    else:
        chapters = topics.topics
    for name, text in chapters.items():
        if text.strip():
            yield Document(text, f"{PYTHON}topics/{name}")
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        within = path.relative_to(root)
        if LEFT_OUT.isdisjoint(within.parts) and not path.name.startswith("_sysconfigdata"):
            document = _document(path.read_bytes(), f"{PYTHON}{within}")
            if isinstance(document, Document):
                yield document

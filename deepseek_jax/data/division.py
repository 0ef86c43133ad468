"""Inputs as pieces of about one size, which are read side by side: several small files, or a part of a large one."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from deepseek_jax.data.documents import DataError, find_files
from deepseek_jax.data.sources import DATASET, PYTHON, SUFFIXES, Piece

BLOCK = 2**20


def plan_reading(inputs: Sequence[str], shard_bytes: int) -> list[list[Piece]]:
    """Inputs as groups of pieces that are read together, of about `shard_bytes`.

    A .jsonl file that is larger is divided between lines, a .parquet file between row groups; any other, and one that is
    packed, is a group of its own.

    Raises:
        DataError: an input that is not there.
    """
    if not inputs:
        raise DataError("prepare.input is empty; give prepare.input=FILE (text, .jsonl, .parquet, a directory or a glob)")
    groups: list[list[Piece]] = []
    room = 0
    for name in inputs:
        if name.startswith((DATASET, PYTHON)):
            groups.append([Piece(name)])
            room = 0
            continue
        for path in find_files([name], SUFFIXES, field="prepare.input", with_empty=True):
            for piece, size in _pieces(path, shard_bytes):
                if not groups or size > room:
                    groups.append([])
                    room = shard_bytes
                groups[-1].append(piece)
                room -= size
    return groups


def _pieces(path: Path, shard_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Pieces of a file, and about how many bytes each has."""
    size = path.stat().st_size
    try:
        if path.suffix == ".jsonl" and size > shard_bytes:
            yield from _between_lines(path, size, shard_bytes)
        elif path.suffix == ".parquet":
            yield from _between_row_groups(path, shard_bytes)
        else:
            yield Piece(str(path)), size
    except (OSError, pyarrow.ArrowException):  # reading it tells what is wrong
        yield Piece(str(path)), size


def _between_lines(path: Path, size: int, shard_bytes: int) -> Iterator[tuple[Piece, int]]:
    start, lines = 0, 0
    with path.open("rb") as file:
        while start < size:
            own, left, block = 0, shard_bytes, b""
            while left > 0 and (block := file.read(min(left, BLOCK))):
                own += block.count(b"\n")
                left -= len(block)
            while block and not block.endswith(b"\n"):  # to the end of the line
                block = file.readline(BLOCK)
                own += block.endswith(b"\n")
            yield Piece(str(path), start, file.tell(), lines), file.tell() - start
            start, lines = file.tell(), lines + own


def _between_row_groups(path: Path, shard_bytes: int) -> Iterator[tuple[Piece, int]]:
    with parquet.ParquetFile(path) as table:
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    first = rows = size = own = 0
    for number, group in enumerate(groups, 1):
        size, own = size + group.total_byte_size, own + group.num_rows
        if size >= shard_bytes or number == len(groups):
            yield Piece(str(path), first, number, rows), size
            first, rows, size, own = number, rows + own, 0, 0
    if not groups:
        yield Piece(str(path)), 0

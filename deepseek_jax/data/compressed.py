"""Files as they are, or as gzip or Zstandard made them smaller."""

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

COMPRESSED_SUFFIXES = (".gz", ".zst")
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
"""What reading a damaged one raises."""


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends as that of a packed one."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(zstandard.open(path, "rb", closefd=True), 2**20)  # type: ignore[arg-type]
    return path.open("rb")


def kind_of(path: Path) -> str:
    """The suffix that says what is in it, `.jsonl` of x.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix

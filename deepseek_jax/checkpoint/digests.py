"""Checksums of a checkpoint's files, kept among them: what a disk or a copy has changed is noticed, not trained on."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import read_object
from deepseek_jax.errors import write_atomically

DIGESTS = "digests.json"
"""In a step's folder: by a file's path within, its CRC-32."""
BLOCK, THREADS = 2**22, 4


def write_digests(folder: Path) -> None:
    """Take the sums of all files of a step's folder, when they are whole."""
    write_atomically(folder / DIGESTS, json.dumps(_digests(folder, folder), indent=1))


def damaged_file(folder: Path, item: str) -> str | None:
    """The first file of an item that is not what was written, or is missing or new; null if there is none.

    Args:
        folder: of a step. Without sums, as of a converted model, nothing is looked at.
    """
    if not (folder / DIGESTS).exists():
        return None
    try:
        kept = read_object(folder / DIGESTS)
    except CheckpointError:
        return DIGESTS
    there = _digests(folder, folder / item)
    expected = {name: digest for name, digest in kept.items() if name.startswith(f"{item}/")}
    return next((name for name in sorted(there | expected) if there.get(name) != expected.get(name)), None)


def _digests(folder: Path, within: Path) -> dict[str, int]:
    files = sorted(path for path in within.rglob("*") if path.is_file() and path.name != DIGESTS)
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip((path.relative_to(folder).as_posix() for path in files), threads.map(_crc32, files)))


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            total = zlib.crc32(block, total)
    return total

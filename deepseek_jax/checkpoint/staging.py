"""A directory appears whole or not at all: it is filled beside its place, and renamed when the disk has all of it."""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepseek_jax.checkpoint.tensors import CheckpointError

PARTIAL = ".deepseek-jax-partial"
"""End of a directory's name until it is whole."""
SYNCING = 8
"""Files at a time that the disk is asked for."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def staged_directory(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty hidden directory that becomes `destination` if the block ends well, else goes.

    What a killed process left of an earlier attempt is cleared first, so it can simply run again.

    Raises:
        CheckpointError: one line, if `destination` is taken, another process is filling it, or the
            disk is full or fails.
    """
    destination = Path(os.path.abspath(destination))
    if os.path.lexists(destination) and not _is_empty_directory(destination):
        raise CheckpointError(f"{destination}: is there already; remove it or choose another place")
    partial = destination.with_name(f".{destination.name}{PARTIAL}")
    with disk_errors(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _claim(handle, partial)
        try:
            with disk_errors(partial):
                _clear(partial)
            yield partial
            with disk_errors(destination):
                _sync_all(partial)
                os.rename(partial, destination)
                _sync(destination.parent)
        except BaseException:
            _remove(partial)
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system says while writing into a `CheckpointError` that names the file, or else `path`."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in DISK_FULL else error.strerror or type(error).__name__
        raise CheckpointError(f"{error.filename or path}: cannot be written: {reason}") from None


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _claim(handle: int, partial: Path) -> None:
    """Lock the open directory, so that two conversions cannot fill the same one."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{partial}: another process is writing there; let it end first") from None
    except OSError:
        pass  # A file system that cannot lock directories: two at once are then not told apart.
    if not partial.exists() or not os.path.samestat(os.fstat(handle), os.stat(partial)):
        raise CheckpointError(f"{partial}: another process has just finished there; look at what it wrote")


def _remove(directory: Path) -> None:
    """Remove a directory in which storage threads may still be writing: again, until it stays away."""
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.1)
        if not directory.exists():
            return


def _clear(directory: Path) -> None:
    for item in directory.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def _sync_all(directory: Path) -> None:
    """Wait until the disk has everything below, which costs one file system's journal less than file by file."""
    with ThreadPoolExecutor(SYNCING) as threads:
        list(threads.map(_sync, [*directory.rglob("*"), directory]))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

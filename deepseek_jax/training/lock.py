"""One run directory, one run: a lock that the kernel lets go of when its holder dies, however it dies."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepseek_jax.config import ConfigError

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system answers that has no locks."""


@contextmanager
def sole_use(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir`, made if need be, for as long as the body lasts; empty again, it is removed.

    Of several processes the first alone does so. On a file system without locks nothing is held.

    Raises:
        ConfigError: another run holds it; the line says which process of which host.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK_FILE
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held
        os.close(file)
        with suppress(OSError):  # it holds something
            run_dir.rmdir()


def _locked(path: Path) -> int:
    """A descriptor of the file at `path`, which this process holds."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ConfigError(f"{path.parent}: {holder} is at work there; wait for it, or give another run_dir") from None
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file).st_ino:
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return file
        os.close(file)  # its last holder has removed it meanwhile

"""How a command fails: a mistake the user can mend is one line on stderr and a non-zero exit."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend; the message is one line that says what and how."""

    exit_code = 1


def run_command(command: Callable[[], None]) -> None:
    """Run a command's main function; exit with its code after a `UserError`, 1 after an `OSError`, 130 after Ctrl-C."""
    try:
        command()
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
        _fail(f"{error.filename}: {reason}" if error.filename else reason, 1)


def _fail(message: str, code: int) -> None:
    report(message)
    sys.exit(code)


def report(message: str) -> None:
    """Tell the user of an error in one line, written at once: unbuffered, several processes may share the terminal."""
    sys.stdout.flush()
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.stderr.flush()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

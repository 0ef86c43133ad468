"""Several processes as one program: how they find each other, and how the others learn that one has died.

`jax.distributed` joins them. On top of it every process keeps one connection to the first: it closes the moment a
process dies, which is how the others can stop at once and say which it was, instead of waiting for what never comes.
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.errors import UserError, report

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables of a process that `scripts/launch_local`, or a launch of your own, started."""
SILENCE = 40
"""Seconds without a sign of life after which a process counts as dead, if its connection did not tell before."""
QUIET = 15
"""Seconds after which a process is named that gives no sign of life: it is stopped, or its machine hangs."""
STOPPED = 75
"""Exit code of a process that stops because another has died."""
ALIVE, DONE, FAILED = "alive", "done", "failed:"
"""What processes say. The last comes with an exit code and the reason; beyond them the first passes on who has died."""


def join(on_cluster: bool) -> None:
    """Become one of several processes, if there are several; call it before JAX touches a device.

    Args:
        on_cluster: whether SLURM, a TPU pod, Kubernetes or Open MPI started them, where `jax.distributed` finds the
            others by itself. Without it only the environment variables above count.

    Raises:
        UserError: the others cannot be found.
    """
    if not on_cluster and ADDRESS not in os.environ:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        count, index = (int(os.environ[name]) if name in os.environ else None for name in (COUNT, INDEX))
        jax.distributed.initialize(num_processes=count, process_id=index, heartbeat_timeout_seconds=2 * SILENCE)
    except Exception as error:  # of many kinds, by cluster
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the other processes were not found: {reason}; start them by scripts/launch_local or with "
            f"{ADDRESS}=HOST:PORT, {COUNT} and {INDEX} set, or add --distributed on a cluster"
        ) from None
    if jax.process_count() > 1:
        _watch()


def is_first() -> bool:
    """Whether this process is the one that talks and writes for all."""
    return jax.process_index() == 0


def first_alone(action: Callable[[], object]) -> None:
    """Run `action` in the first process while the others wait."""
    if is_first():
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first alone")


def of_first(flag: bool) -> bool:
    """What the first process says, in all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag))) if jax.process_count() > 1 else flag


@contextmanager
def together() -> Iterator[None]:
    """End with the others: after all have finished, or as soon as one fails, whose reason is told once."""
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
        multihost_utils.sync_global_devices("the end")
    except (UserError, OSError, KeyboardInterrupt) as error:
        _fail(str(error) or "interrupted", getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1))
    except Exception as error:
        time.sleep(SILENCE / 2)  # most likely another process has died, which `_stop` is about to tell
        traceback.print_exc()
        _fail(f"{type(error).__name__}, told above", 1)
    _leave(DONE)


def _fail(reason: str, code: int) -> None:
    """Tell why, once for all processes, and end all of them with this exit code."""
    _leave(f"{FAILED} {code} {reason}")
    if is_first():
        report(reason)
    _exit(code)


_leaving, _stopping = threading.Event(), threading.Lock()
_heard: dict[str, float] = {}
"""In the first process: when each other, by number and host, was last heard."""
_connections: list[socket.socket] = []
"""To the first process; in it, to all others."""


def _watch() -> None:
    """Connect all processes to the first, which passes on who has died."""
    host = os.environ.get(ADDRESS, "").rpartition(":")[0].strip("[]")
    listener = socket.create_server((host if host == "127.0.0.1" else "", 0)) if is_first() else None
    port = listener.getsockname()[1] if listener else 0
    token = int.from_bytes(os.urandom(4), "big") >> 1
    port, token = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array([port, token], np.int32)))
    host = host or _name_of_first()
    if listener:
        threading.Thread(target=_accept, args=(listener, token), daemon=True).start()
        threading.Thread(target=_look_out, daemon=True).start()
    else:
        try:
            connection = socket.create_connection((host, port), timeout=SILENCE)
        except OSError as error:
            print(f"process {jax.process_index()}: no connection to {host}:{port} ({error}); should a process die, this one "
                  f"learns it from jax.distributed alone", file=sys.stderr, flush=True)  # fmt: skip
        else:
            _connections.append(connection)
            _tell(f"{token} {jax.process_index()} {socket.gethostname()}")
            threading.Thread(target=_listen, args=(connection,), daemon=True).start()
    threading.Thread(target=_beat, daemon=True).start()
    multihost_utils.sync_global_devices("watch")


def _name_of_first() -> str:
    """Host name of the first process, as it calls itself."""
    name = np.zeros(256, np.uint8)
    own = socket.gethostname().encode()[:256]
    name[: len(own)] = np.frombuffer(own, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(name))).rstrip(b"\0").decode()


def _tell(line: str) -> None:
    for connection in _connections:
        with suppress(OSError):
            connection.sendall(f"{' '.join(line.split())}\n".encode())


def _leave(reason: str) -> None:
    """From now on this process may end without alarming the others."""
    _leaving.set()
    _tell(reason)


def _accept(listener: socket.socket, token: int) -> None:
    """In the first process: let all others connect."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_follow, args=(connection, token), daemon=True).start()


def _follow(connection: socket.socket, token: int) -> None:
    """In the first process: read one other's signs of life until there are no more."""
    connection.settimeout(SILENCE)
    lines = connection.makefile("r")
    try:
        given, index, host = lines.readline(1000).split()
        if int(given) != token:
            return
    except (OSError, ValueError):  # someone else's connection
        return
    _connections.append(connection)
    name = f"process {index} on {host}"

    def alive() -> None:
        _heard[name] = time.monotonic()

    alive()
    last = _last_words(lines, alive)
    _heard.pop(name, None)
    if last.startswith(FAILED):
        time.sleep(1)  # what failed there most likely fails here too, and is then told by the main thread
        code, _, reason = last.removeprefix(FAILED).strip().partition(" ")
        _stop(f"process {index}: {reason}", f"{FAILED} {code}", int(code))
    elif last != DONE:
        died = f"process {index} on {host} has died; --resume goes on from the last checkpoint"
        _stop(died, died)


def _listen(connection: socket.socket) -> None:
    """Stop when the first process says that another has died or failed, or is gone itself."""
    connection.settimeout(SILENCE)
    message = _last_words(connection.makefile("r"))
    if message.startswith(FAILED):
        _stop(code=int(message.removeprefix(FAILED).split()[0]))
    elif message != DONE:
        died = message or "process 0, the first, has died; --resume goes on from the last checkpoint"
        _stop(f"process {jax.process_index()} stops: {died}")


def _look_out() -> None:
    """In the first process: name others that are silent, for all wait for them, and say when they are back."""
    silent: set[str] = set()
    while not _leaving.wait(QUIET / 5):
        now = time.monotonic()
        quiet = {name for name, heard in list(_heard.items()) if now - heard > QUIET}
        for name in sorted(quiet - silent):
            print(f"{name} gives no sign of life; the others wait for it", file=sys.stderr, flush=True)
        for name in sorted((silent - quiet) & _heard.keys()):
            print(f"{name} is back", file=sys.stderr, flush=True)
        silent = quiet


def _last_words(lines: TextIO, alive: Callable[[], None] = lambda: None) -> str:
    """What the other side says besides that it is alive, when `alive` is called; nothing if it falls silent."""
    with suppress(OSError):
        for line in iter(lambda: lines.readline(1000), ""):
            alive()
            if line.strip() != ALIVE:
                return line.strip()
    return ""


def _beat() -> None:
    """Tell the other side every few seconds that this process is alive."""
    while not _leaving.wait(SILENCE / 8):
        _tell(ALIVE)


def _stop(message: str = "", for_others: str = DONE, code: int = STOPPED) -> None:
    """End this process from whatever thread: the main one may be waiting for the dead process."""
    with _stopping:
        if _leaving.is_set():
            return
        _leave(for_others)
        if message:
            report(message)
        _exit(code)


def _exit(code: int) -> None:
    """End without the orderly goodbyes of `jax.distributed`, the first after the others, who would miss it."""
    sys.stdout.flush()
    time.sleep(1.5 if is_first() else 0.1)
    os._exit(code)

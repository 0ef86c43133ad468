"""How XLA is asked to compile our larger programs, and where what it compiled is kept."""

import atexit
import hashlib
import json
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Optional

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from deepseek_jax.errors import write_atomically

OPTIONS = {
    # The order of work that needs the least memory: other orders save no time.
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    # What travels starts before work that does not wait for it.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": "True"},
    "tpu": {
        # Tokens travel to their experts and back beside other work; without it the core waits for them.
        "xla_tpu_enable_async_ragged_all_to_all": "true",
    },
}
SPARSE_CORES = {
    "tpu": {
        f"xla_tpu_enable_sparse_core_collective_offload_{kind}": "true"
        for kind in ("all_gather", "2d_all_gather", "reduce_scatter", "nd_reduce_scatter")
    },
}
"""Weights and their gradients' sums travel beside other work, where a chip has SparseCores; v5e takes these and changes
nothing. What is summed so must be whole in float32 first."""
CACHE_BYTES = 2 * 2**30
"""Of programs that are kept; those that were used longest ago go first."""
CACHE_SECONDS = 0.3
"""Programs that compile faster are not kept."""
PROGRAM, USED = "-cache", "-atime"
"""How JAX ends the names of a program's file, and of the one beside it that says when it was used."""
SUMS = "sums.json"
"""Each program's CRC-32 by its file's name. JAX may take one with a changed bit, and compute other numbers."""


@cache
def compiler_options(device: jax.Device, sparse_cores: bool = True) -> dict[str, str]:
    """What `jax.jit` takes for a device, which may be described only: of OPTIONS those that its compiler knows.

    Args:
        sparse_cores: whether those of SPARSE_CORES, too.
    """
    platform = device.platform
    options = OPTIONS.get(platform, {}) | (SPARSE_CORES.get(platform, {}) if sparse_cores else {})
    return {name: value for name, value in options.items() if _is_known(device, name, value)}


def _is_known(device: jax.Device, name: str, value: str) -> bool:
    """Whether the compiler takes an option: another version's may refuse programs for one that it never heard of."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.negative, compiler_options={name: value}).lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def cache_directory(place: str) -> Path:
    """Where programs are kept, by the field `compilation_cache`.

    Programs for CPUs hold instructions of the very kind of CPU: each kind has a directory of its own.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek_jax" / "xla"
    directory = base if place == "auto" else Path(place).expanduser()
    return directory / _cpu_kind() if jax.default_backend() == "cpu" else directory


def keep_programs(place: Optional[str]) -> None:
    """Keep what is compiled from now on, and use what was kept before; `place` is the field `compilation_cache`.

    What `JAX_COMPILATION_CACHE_DIR` or `jax.config` said before stays. A directory that cannot be written costs a
    line and the cache, not the run; a damaged program costs a line and is compiled again.
    """
    if place is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    directory = cache_directory(place)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(f"{directory}: not writable")
        _remove_half_written(directory)
        for name in _remove_damaged(directory):
            print(f"{directory / name}: not as it was written; that program is compiled again", file=sys.stderr, flush=True)
    except OSError as error:
        reason = error.strerror or error
        print(f"compilation_cache={place}: {reason}; programs are not kept", file=sys.stderr, flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHE_SECONDS)
    compilation_cache.reset_cache()  # a program may have been compiled already, without it
    atexit.register(_sum_up, directory)


def _remove_half_written(directory: Path) -> None:
    """Programs beside which JAX had no time to write when they were used; else it keeps no other any more."""
    for program in directory.glob(f"*{PROGRAM}"):
        if not program.with_name(program.name.removesuffix(PROGRAM) + USED).exists():
            program.unlink(missing_ok=True)


def _remove_damaged(directory: Path) -> list[str]:
    """Programs that are not as they were, by name; the sums of the rest are kept."""
    kept, programs = _kept_sums(directory), sorted(directory.glob(f"*{PROGRAM}"))
    with ThreadPoolExecutor() as threads:
        sums = dict(zip((program.name for program in programs), threads.map(_sum, programs)))
    damaged = [name for name, found in sums.items() if found is not None and kept.get(name, found) != found]
    for name in damaged:
        (directory / name).unlink(missing_ok=True)
        del sums[name]
    _keep_sums(directory, sums)
    return damaged


def _sum_up(directory: Path) -> None:
    """Keep the sums of what is there now, of what is new taken now."""
    kept = _kept_sums(directory)
    programs = directory.glob(f"*{PROGRAM}")
    _keep_sums(directory, {program.name: kept.get(program.name) or _sum(program) for program in programs})


def _sum(program: Path) -> Optional[int]:
    try:
        return zlib.crc32(program.read_bytes())
    except OSError:  # another process has removed it
        return None


def _kept_sums(directory: Path) -> dict[str, int]:
    try:
        return dict(json.loads((directory / SUMS).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _keep_sums(directory: Path, sums: dict[str, Optional[int]]) -> None:
    with suppress(OSError):  # the directory is gone or full: these go without
        write_atomically(directory / SUMS, json.dumps({name: found for name, found in sums.items() if found is not None}))


def _cpu_kind() -> str:
    """A short name of this CPU's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return "cpu-" + hashlib.sha256(flags.encode()).hexdigest()[:12]

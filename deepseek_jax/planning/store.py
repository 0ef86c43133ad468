"""Compiled steps kept from one plan to the next, since compiling takes minutes and reading seconds."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.planning.step import CompiledText


def store_directory() -> Path:
    """`deepseek_jax/plan` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek_jax" / "plan"


def kept(config: Config, topology_name: str, versions: dict[str, str]) -> CompiledText | None:
    """The step of a config on a topology as it was compiled before; null if it was not, or if anything differs since.

    What differs without mattering: the config's data and length of the run, this package's `planning`.
    """
    try:
        content: dict[str, Any] = json.loads(gzip.decompress(_path(config, topology_name, versions).read_bytes()))
        return CompiledText(**content)
    except (OSError, EOFError, ValueError, TypeError):  # not there, or damaged
        return None


def keep(config: Config, topology_name: str, versions: dict[str, str], compiled: CompiledText) -> None:
    """Keep a compiled step for `kept`. A plan that cannot be kept is still a plan."""
    path = _path(config, topology_name, versions)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode(), 5))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


def _path(config: Config, topology_name: str, versions: dict[str, str]) -> Path:
    return store_directory() / f"{_key(config, topology_name, versions)}.json.gz"


def _key(config: Config, topology_name: str, versions: dict[str, str]) -> str:
    fields = dataclasses.asdict(config)
    fields.pop("data")
    fields.pop("run_dir")
    fields.pop("stages")
    for name in ("steps", "seed", "eval_every", "eval_sequences", "checkpoint_every", "keep_checkpoints"):
        fields["train"].pop(name)
    content = json.dumps([fields, topology_name, versions, _code()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A digest of the sources that steps are made of, read once: edits made while a step compiles are not in it."""
    package = Path(__file__).resolve().parent.parent
    folders = [sorted((package / name).rglob("*.py")) for name in ("model", "precision", "parallel", "training", "kernels")]
    digest = hashlib.sha256()
    for path in (package / "compilation.py", package / "implementations.py", *itertools.chain(*folders)):
        digest.update(path.read_bytes())
    return digest.hexdigest()

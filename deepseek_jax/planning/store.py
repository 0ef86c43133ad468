"""Compiled steps kept from one plan to the next, since compiling takes minutes and reading seconds."""

import dataclasses
import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.planning.step import CompiledText


def store_directory() -> Path:
    """`deepseek_jax/plan` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek_jax" / "plan"


def kept(
    config: Config, topology_name: str, versions: dict[str, str], make: Callable[[], CompiledText]
) -> tuple[CompiledText, bool]:
    """The compiled step of a config on a topology, and whether it was kept from before.

    It is compiled anew where anything differs that could matter: the config but for its data and its run's length, this
    package's code but for `planning`, the compilers.
    """
    path = store_directory() / f"{_key(config, topology_name, versions)}.json.gz"
    found = _read(path)
    if found is not None:
        return found, True
    made = make()
    _write(path, made)
    return made, False


def _key(config: Config, topology_name: str, versions: dict[str, str]) -> str:
    fields = dataclasses.asdict(config)
    fields.pop("data")
    fields.pop("run_dir")
    for name in ("steps", "seed", "eval_every", "eval_sequences", "checkpoint_every", "keep_checkpoints"):
        fields["train"].pop(name)
    content = json.dumps([fields, topology_name, versions, _code()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _code() -> str:
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("model", "precision", "parallel", "training", "kernels"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> CompiledText | None:
    """What a file holds; null if it is not there or damaged."""
    try:
        content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        return CompiledText(**content)
    except (OSError, EOFError, ValueError, TypeError):
        return None


def _write(path: Path, compiled: CompiledText) -> None:
    """A plan that cannot be kept is still a plan."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode(), 5))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)

"""Reading what strangers wrote: JSON and file names out of a checkpoint that was downloaded.

Nothing here believes a size, a name or a nesting before it has looked at it, and every message is
one printable line however odd the content.
"""

import json
import os
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from omegaconf.errors import OmegaConfBaseException

from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.config import ConfigError, ModelConfig, from_mapping

MAX_JSON_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""

MAX_COUNT, MAX_EXPERTS = 10**4, 10**6
"""Of layers, or of experts in one, and of experts in all: listing their tensors must come to an end."""


def shown(value: Any) -> str:
    """`value` as a short, printable piece of one line."""
    if isinstance(value, str) and value.isprintable() and len(value) <= 200:
        return value
    return reprlib.repr(value)


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0 that fits 63 bits; true and false are not."""
    return type(value) is int and 0 <= value < 2**63


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `content` is, as the standard has it: UTF-8, each key once, no NaN.

    Raises:
        CheckpointError: one line that begins with `where`.
    """

    def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{where}: the key {shown(twice)} is given twice")
        return mapping

    def no_constant(name: str) -> NoReturn:
        raise CheckpointError(f"{where}: not JSON: {name}")

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=each_key_once, parse_constant=no_constant)
    except CheckpointError:
        raise
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON: {error.msg} at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{where}: JSON with a number too long or nested too deep") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: JSON, but not an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the regular file `path` (see `file_inside`); raises as `parse_object` does."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: {size} bytes, too long to be an index or a config")
            content = file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_object(content, str(path))


def file_inside(directory: Path, name: Any, where: str) -> Path:
    """The regular file `name` of `directory`, for a name that the untrusted file `where` gave.

    Links may lead to other files of the directory, and from a snapshot in the Hugging Face cache to
    the cache's own blobs, where that keeps every file's content; nowhere else.

    Raises:
        CheckpointError: if it is no plain file name, leads out of the directory, or is not there.
    """
    if not isinstance(name, str) or not name.isprintable() or name in ("", ".", "..") or set(name) & set("/\\"):
        raise CheckpointError(f"{where}: {shown(name)} is not the name of a file in {directory}")
    path = directory / name
    try:
        real, home = path.resolve(strict=True), directory.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file, though {where} names it") from None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise CheckpointError(f"{where}: {shown(name)}: cannot be read: {reason}") from None
    homes = [home]
    if home.parent.name == "snapshots" and len(home.parents) > 2:
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(f"{path}: a link that leads out of its directory, to {shown(str(real))}")
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    return path


def require(path: Path, key: str, value: Any, expected: Any) -> None:
    """Check that a key of the file `path` has the one value that is supported."""
    if value != expected or isinstance(value, bool) != isinstance(expected, bool):
        raise CheckpointError(f"{path}: {key} is {shown(value)}; only {shown(expected)} is supported")


def agree(path: Path, key: str, value: Any, other: str, fields: dict[str, Any]) -> None:
    """Take `value` for the field `other`, which must not say anything else."""
    if fields.setdefault(other, value) != value:
        raise CheckpointError(f"{path}: {key} is {shown(value)}, and {other} is {shown(fields[other])}")


def model_config(fields: dict[str, Any], where: str) -> ModelConfig:
    """The model that `fields` describe, all values checked.

    Raises:
        CheckpointError: one line that begins with `where` and names the field.
    """
    for name in ("num_hidden_layers", "num_nextn_predict_layers", "n_routed_experts"):
        if name in fields and not (is_count(fields[name]) and fields[name] <= MAX_COUNT):
            raise CheckpointError(f"{where}: {name} is {shown(fields[name])}; it must be a number from 0 to {MAX_COUNT}")
    try:
        # Any context is long enough for sequences of one token, and none but the model is asked for.
        model = from_mapping({"model": fields, "train": {"sequence_length": 1}}, where=where).model
    except (ConfigError, OmegaConfBaseException) as error:
        message = str(error).splitlines()[0]
        raise CheckpointError(message if message.startswith(where) else f"{where}: {message}") from None
    experts = (model.num_hidden_layers + model.num_nextn_predict_layers) * model.n_routed_experts
    if experts > MAX_EXPERTS:
        raise CheckpointError(f"{where}: {experts:,} experts in all; at most {MAX_EXPERTS:,} are supported")
    return model

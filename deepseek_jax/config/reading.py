"""From a preset's name or a YAML file, and words of the command line, to a checked `Config`."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepseek_jax.config.schema import Config, ConfigError, Phase
from deepseek_jax.config.validation import validate

OTHER_WORDS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size for a dense layer and moe_intermediate_size for an expert",
    "d_latent": "kv_lora_rank",
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_activated_experts": "num_experts_per_tok",
    "max_seq_len": "max_position_embeddings",
    "use_fp8": "precision=fp8",
}
"""What others call a field, and its name here."""


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or YAML file, apply `a.b=c` overrides, check it whole.

    Args:
        source: a path to a YAML file, or a preset's name such as `quickstart`.
        overrides: command-line words of the form `section.field=value`.

    Raises:
        ConfigError: one line naming the file or field at fault.
    """
    path = find_config(source)
    return from_mapping(_read_yaml(path), overrides, where=str(path))


def from_mapping(content: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> Config:
    """Build a checked `Config` from nested mappings; see `load_config`."""
    fields: Any = OmegaConf.to_container(OmegaConf.create(dict(content)))
    if overrides:
        _canonical(Config, fields, "", where)  # what is wrong in it is not the command line's
        where = "command line"
    for override in overrides:
        _apply_override(fields, override)
    fields = _canonical(Config, fields, "", where)
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), fields))
    except OmegaConfBaseException as error:
        name = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{where}: {name}: {str(error).splitlines()[0]}") from None
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def presets() -> dict[str, Path]:
    """Names of the presets that come with the package, and their files."""
    package = Path(__file__).resolve().parent.parent
    folder = next((d for d in (package / "configs", package.parent / "configs") if d.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(source: str | Path) -> Path:
    """The file that `source`, a path or a preset's name, stands for."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"config {path} is a directory; give a .yaml file in it")
    named = presets()
    # `configs/quickstart.yaml` names the preset from any working directory.
    is_name = path.parent in (Path("."), Path("configs")) and path.suffix in ("", ".yaml")
    if is_name and path.stem in named:
        return named[path.stem]
    raise ConfigError(f"no config {source}: give a .yaml file or one of the presets {', '.join(named)}")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; sections such as `model:` are expected")
    return content or {}


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.field=value")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
    *sections, name = key.split(".")
    node = content
    for depth, section in enumerate(sections):
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(sections[: depth + 1])} has no fields")
    node[name] = value


def _canonical(kind: Any, value: Any, name: str, where: str) -> Any:
    """`value` with shorthands written out and every key and type checked against the schema `kind`.

    A single value stands for a list of one, and a number for a `Phase` that is constant.
    """
    if kind is Any:  # a stage's, which are checked when they are put together
        return value
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        if value is None:
            return None
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    if dataclasses.is_dataclass(kind):
        if kind is Phase and _is_number(value):
            return {"to": float(value)}
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {name or 'config'} is {value!r}; it has fields: {_field_names(kind)}")
        hints = typing.get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise ConfigError(f"{where}: unknown field {_join(name, key)}; {_nearest(key, kind)}")
        return {key: _canonical(hints[key], item, _join(name, key), where) for key, item in value.items()}
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {name} is {value!r}; write it as {name}.NAME=VALUE")
        _, item_kind = typing.get_args(kind)
        return {str(key): _canonical(item_kind, item, _join(name, key), where) for key, item in value.items()}
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        (item_kind,) = typing.get_args(kind)
        return [_canonical(item_kind, item, f"{name}.{i}", where) for i, item in enumerate(items)]
    return _scalar(kind, value, name, where)


def _scalar(kind: type, value: Any, name: str, where: str) -> Any:
    if kind in (int, float) and isinstance(value, str):
        with suppress(ValueError):  # YAML reads 1e-3 as text, for want of a dot.
            value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and _is_number(value):
        return float(value)
    if kind is str and _is_number(value):
        return str(value)
    if type(value) is not kind:
        expected = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text, in quotes if it is not a plain word",
        }[kind]
        raise ConfigError(f"{where}: {name} is {value!r}; it must be {expected}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _join(section: str, key: Any) -> str:
    return f"{section}.{key}" if section else str(key)


def _field_names(kind: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))


def _nearest(key: Any, kind: Any) -> str:
    if key in OTHER_WORDS:
        return f"here it is {OTHER_WORDS[key]}"
    close = difflib.get_close_matches(str(key), [f.name for f in dataclasses.fields(kind)], n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"the fields here are {_field_names(kind)}"

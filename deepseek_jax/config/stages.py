"""A run in stages, such as one that lengthens its sequences twice (report 4.3): the config of each, checked beforehand."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.config.reading import from_mapping
from deepseek_jax.config.schema import HOW_COMPUTED, Config, ConfigError

SECTIONS = ("model", "train", "data", "parallel")
"""Of a config, what a stage may change."""
STRETCHED = ("rope_scaling", "max_position_embeddings")
"""Fields of `ModelConfig` by which weights are read for longer texts than they were trained on; the others stay."""


def stage_configs(config: Config) -> list[Config]:
    """The config of each stage: the run's own, and what each entry of `config.stages` makes of the one before it.

    A stage is a run of its own in `run_dir`/stage-N, from the weights that the one before has left; of one alone, `config`.

    Raises:
        ConfigError: one line on the entry that cannot work.
    """
    if not config.stages:
        return [config]
    found = [dataclasses.replace(config, stages=[], run_dir=str(stage_directory(config.run_dir, 1)))]
    for number, entry in enumerate(config.stages, start=2):
        where, before = f"stages.{number - 2}", found[-1]
        for section in entry:
            if section not in SECTIONS:
                raise ConfigError(f"{where}: unknown field {section}; a stage has fields of {', '.join(SECTIONS)}")
        content = _merged(dataclasses.asdict(before), entry)
        content |= {"run_dir": str(stage_directory(config.run_dir, number)), "init_from": before.run_dir}
        try:
            found.append(from_mapping(content, where=where))
        except ConfigError as error:
            raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        _check_follows(before, found[-1], where)
    return found


def stage_directory(run_dir: str | Path, number: int) -> Path:
    """Of stage `number`, from 1."""
    return Path(run_dir) / f"stage-{number}"


def last_stage(path: Path) -> Path:
    """Of a run in stages the directory of the last that has a checkpoint; else `path`."""
    number, found = 1, path
    while (stage_directory(path, number) / "checkpoints").is_dir():
        found, number = stage_directory(path, number), number + 1
    return found


def _merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A field that is a mapping in both keeps what the change does not name; any other is replaced."""
    result = dict(content)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(content.get(name), Mapping)
        result[name] = _merged(content[name], value) if both else value
    return result


def _check_follows(before: Config, after: Config, where: str) -> None:
    was, length = before.train.sequence_length, after.train.sequence_length
    if length < was:
        raise ConfigError(
            f"{where}: train.sequence_length={length}: a stage does not shorten sequences, which had {was} tokens before; "
            f"give {was} or more"
        )
    old, new = (dataclasses.asdict(each.model) for each in (before, after))
    for name, value in new.items():
        if value != old[name] and name not in (*STRETCHED, *HOW_COMPUTED):
            raise ConfigError(
                f"{where}: model.{name}={value}: the weights are those of the stage before, where it is {old[name]}; "
                f"a stage changes {' and '.join(STRETCHED)}, and how a model is computed"
            )

"""A model with all that says how it speaks, out of a run or of a Hugging Face directory."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import jax
from tokenizers import Tokenizer

from deepseek_jax.checkpoint.adapters import with_adapters_merged
from deepseek_jax.checkpoint.hf_config import CONFIG_JSON
from deepseek_jax.checkpoint.hf_source import HuggingFaceSource
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.on_mesh import load_on_mesh, serving_division, summary
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.checkpoint.source import Source
from deepseek_jax.checkpoint.tokenizer_files import TOKENIZER_JSON, read_text_files
from deepseek_jax.compilation import keep_programs
from deepseek_jax.config import Config, ConfigError, ModelConfig, load_config
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.precision.fp8 import require_fp8
from deepseek_jax.training.checkpoint import Checkpoints

CONFIG_YAML = "config.yaml"


class LoadedModel(NamedTuple):
    """What was read; see `TextFiles`, too.

    Attributes:
        variables: {"params": ..., "router_state": ...}; on a mesh as `load_on_mesh` gives them.
        division: the mesh; None is one device.
    """

    config: ModelConfig
    variables: dict[str, Any]
    tokenizer: Optional[Tokenizer]
    ends: tuple[int, ...]
    begin: Optional[int]
    directory: Path
    division: Optional[Division] = None


def load_model(path: Path, step: Optional[int] = None, parallel: Sequence[str] = (), stacked: bool = False) -> LoadedModel:
    """Read a Hugging Face directory or a name on its hub, or a run's checkpoint, by default the last.

    From now on what is compiled is kept, as in training.

    Args:
        parallel: fields such as "parallel.expert=8", by which the weights go straight to the devices of a mesh.
        stacked: as for `load_on_mesh`.

    Raises:
        UserError: one line naming what is missing or cannot be read, or the field at fault.
    """
    path = local_directory(path)
    if step is not None and (path / CONFIG_JSON).is_file():
        raise UserError(f"--step {step}: {path} is a Hugging Face directory, which has no steps")
    keep_programs("auto" if (path / CONFIG_JSON).is_file() else run_config(path).compilation_cache)
    config, variables, division = _weights(path, step, parallel, stacked)
    if division is not None:
        print(summary(division, variables), file=sys.stderr, flush=True)
    return LoadedModel(config, variables, *read_text_files(path), division)


def _weights(
    path: Path, step: Optional[int], parallel: Sequence[str], stacked: bool
) -> tuple[ModelConfig, dict[str, Any], Optional[Division]]:
    """Config, variables and mesh of what is at `path`."""
    if not parallel:
        if (path / CONFIG_JSON).is_file():
            return *load_pretrained(path), None
        run = run_config(path)
        return run.model, run_variables(path, run, step), None
    if (path / CONFIG_JSON).is_file():
        source: Source = HuggingFaceSource(path)
        config = source.config
    else:
        run = run_config(path)
        checkpoints = Checkpoints(path, run)
        source, config = checkpoints.source(_last(path, checkpoints, step)), run.model
    division = serving_division(config, parallel)
    assert division is not None
    return config, load_on_mesh(source, config, division, stacked), division


def load_run(run_dir: Path, step: int | None = None) -> tuple[ModelConfig, Tokenizer, dict[str, Any]]:
    """Model config, tokenizer and variables of a run's checkpoint, the last one by default."""
    config = run_config(run_dir)
    return config.model, load_tokenizer(run_dir / TOKENIZER_JSON), run_variables(run_dir, config, step)


def run_config(run_dir: Path) -> Config:
    """Of a run; raises `UserError` if there is none, or this machine cannot compute as it says."""
    path = run_dir / CONFIG_YAML
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such directory")
    if not path.is_file():
        raise UserError(f"{run_dir}: no model here: neither a run's {CONFIG_YAML} nor Hugging Face's {CONFIG_JSON}")
    try:
        config = load_config(path)
    except ConfigError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if config.model.precision == "fp8":
        require_fp8()
    return config


def run_variables(run_dir: Path, config: Config, step: int | None = None) -> dict[str, Any]:
    """Of a run's checkpoint, the last one by default; its adapters, if it has some, are merged."""
    checkpoints = Checkpoints(run_dir, config)
    variables = checkpoints.restore_variables(_last(run_dir, checkpoints, step))
    if not config.lora.rank:
        return variables
    return variables | {"params": with_adapters_merged(jax.device_get(variables["params"]), config.lora)}


def _last(run_dir: Path, checkpoints: Checkpoints, step: Optional[int]) -> int:
    """The last step, if none is given; raises `UserError` for one that is not there."""
    there = checkpoints.steps()
    if not there:
        raise UserError(f"{run_dir}: no checkpoint yet")
    if step is not None and step not in there:
        raise UserError(f"--step {step}: {run_dir} has checkpoints of step {', '.join(map(str, reversed(there)))}")
    return there[0] if step is None else step

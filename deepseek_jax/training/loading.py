"""A model with all that says how it speaks, out of a run or of a Hugging Face directory."""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tokenizers import Tokenizer

from deepseek_jax.checkpoint.hf_config import CONFIG_JSON
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.checkpoint.run_writer import COMPANIONS_FOLDER
from deepseek_jax.checkpoint.tokenizer_files import GENERATION_CONFIG, TOKENIZER_JSON
from deepseek_jax.checkpoint.untrusted import file_inside, is_count, read_object, shown
from deepseek_jax.config import Config, ModelConfig, load_config
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.tokenizer import end_of_document_id, load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.precision.fp8 import require_fp8
from deepseek_jax.training.checkpoint import Checkpoints

CONFIG_YAML = "config.yaml"


class LoadedModel(NamedTuple):
    """What was read.

    Attributes:
        variables: {"params": ..., "router_state": ...}.
        tokenizer: None where there is no tokenizer.json; token ids are then all that can be given.
        ends: tokens that end a text.
        begin: the token that texts are read after: the one that begins a text, or else ends one.
        directory: of the tokenizer's other files, where there are any.
    """

    config: ModelConfig
    variables: dict[str, Any]
    tokenizer: Optional[Tokenizer]
    ends: tuple[int, ...]
    begin: Optional[int]
    directory: Path


def load_model(path: Path, step: Optional[int] = None) -> LoadedModel:
    """Read a Hugging Face directory or a name on its hub, or a run's checkpoint, by default the last.

    Raises:
        UserError: one line naming what is missing or cannot be read.
    """
    path = local_directory(path)
    if (path / CONFIG_JSON).is_file():
        if step is not None:
            raise UserError(f"--step {step}: {path} is a Hugging Face directory, which has no steps")
        config, variables = load_pretrained(path)
        directory = texts = path
    else:
        run = run_config(path)
        config, variables = run.model, run_variables(path, run, step)
        directory = path / COMPANIONS_FOLDER if (path / COMPANIONS_FOLDER).is_dir() else path
        texts = path
    tokenizer = load_tokenizer(texts) if (texts / TOKENIZER_JSON).is_file() else None
    ends, begins = (_named_tokens(directory, name) for name in ("eos_token_id", "bos_token_id"))
    if not ends and tokenizer is not None:
        with suppress(DataError):  # then a limit alone ends a text
            ends = (end_of_document_id(tokenizer),)
    return LoadedModel(config, variables, tokenizer, ends, next(iter(begins + ends), None), directory)


def load_run(run_dir: Path, step: int | None = None) -> tuple[ModelConfig, Tokenizer, dict[str, Any]]:
    """Model config, tokenizer and variables of a run's checkpoint, the last one by default."""
    config = run_config(run_dir)
    return config.model, load_tokenizer(run_dir / TOKENIZER_JSON), run_variables(run_dir, config, step)


def run_config(run_dir: Path) -> Config:
    """Of a run; raises `UserError` if there is none, or this machine cannot compute as it says."""
    path = run_dir / CONFIG_YAML
    if not path.is_file():
        raise UserError(f"{run_dir}: no model here: neither a run's {CONFIG_YAML} nor Hugging Face's {CONFIG_JSON}")
    config = load_config(path)
    if config.model.precision == "fp8":
        require_fp8()
    return config


def run_variables(run_dir: Path, config: Config, step: int | None = None) -> dict[str, Any]:
    """Of a run's checkpoint, the last one by default."""
    checkpoints = Checkpoints(run_dir, config)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(f"{run_dir}: no checkpoint yet")
    return checkpoints.restore_variables(step)


def _named_tokens(directory: Path, field: str) -> tuple[int, ...]:
    """All that generation_config.json and config.json name under `field`."""
    found: list[int] = []
    for name in (GENERATION_CONFIG, CONFIG_JSON):
        if (directory / name).is_file():
            value = read_object(file_inside(directory, name, str(directory))).get(field)
            tokens = value if isinstance(value, list) else [] if value is None else [value]
            if not all(is_count(token) for token in tokens):
                raise UserError(f"{directory / name}: {field} is {shown(value)}; a token id or a list of them is expected")
            found += tokens
    return tuple(dict.fromkeys(found))

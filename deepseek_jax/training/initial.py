"""Training that begins with weights that are there and a fresh optimizer: `init_from`, a run or a Hugging Face directory."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.hf_config import CONFIG_JSON
from deepseek_jax.checkpoint.hf_source import HuggingFaceSource
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.checkpoint.tokenizer_files import TOKENIZER_JSON
from deepseek_jax.config import HOW_COMPUTED, Config, ConfigError, ModelConfig, from_mapping
from deepseek_jax.config.sizes import to_go_on
from deepseek_jax.config.stages import STRETCHED
from deepseek_jax.training.loading import run_config, run_variables

MTP = "num_nextn_predict_layers"


def config_of(overrides: Sequence[str]) -> Config:
    """Without a --config: the model of what `init_from=...` among the overrides names, to be trained on gently.

    Raises:
        ConfigError: one line naming what is at fault.
    """
    source = _named(overrides)
    model = _model_of(source)
    content = {"model": dataclasses.asdict(model), "train": dataclasses.asdict(to_go_on(model))}
    return from_mapping(content, overrides, where=str(source))


def is_named(overrides: Sequence[str]) -> bool:
    """Whether the overrides say what to start from."""
    return any(word.startswith("init_from=") for word in overrides)


def with_tokenizer(config: Config) -> Config:
    """`config` with the tokenizer of `init_from` where it names none: other tokens would mean nothing to the weights.

    Raises:
        ConfigError: when there is no tokenizer.json.
    """
    if config.init_from is None or config.data.tokenizer is not None:
        return config
    source = local_directory(config.init_from)
    if not (source / TOKENIZER_JSON).is_file():
        raise ConfigError(f"init_from={source}: has no {TOKENIZER_JSON}; name the tokenizer of its weights as data.tokenizer")
    data = dataclasses.replace(config.data, tokenizer=str((source / TOKENIZER_JSON).absolute()))
    return dataclasses.replace(config, data=data)


def initial_variables(config: Config) -> dict[str, Any]:
    """The weights that `config.init_from` names, {"params": ..., "router_state": ...}.

    MTP modules beyond model.num_nextn_predict_layers stay behind.

    Raises:
        UserError: one line naming the field or tensor that does not fit.
    """
    source = local_directory(str(config.init_from))
    if (source / CONFIG_JSON).is_file():
        found, variables = load_pretrained(source)
    else:
        run = run_config(source)
        found, variables = run.model, run_variables(source, run)
    _check_same(found, config.model, source)
    modules = config.model.num_nextn_predict_layers
    return {kind: _first_modules(tree, modules) for kind, tree in variables.items()}


def _named(overrides: Sequence[str]) -> Path:
    return local_directory(next(word.partition("=")[2] for word in overrides if word.startswith("init_from=")))


def _model_of(source: Path) -> ModelConfig:
    return HuggingFaceSource(source).config if (source / CONFIG_JSON).is_file() else run_config(source).model


def _check_same(found: ModelConfig, asked: ModelConfig, source: Path) -> None:
    for name, value in dataclasses.asdict(found).items():
        wanted = dataclasses.asdict(asked)[name]
        fits = wanted <= value if name == MTP else name in (*HOW_COMPUTED, *STRETCHED) or wanted == value
        if not fits:
            raise ConfigError(
                f"init_from={source}: its model.{name} is {json.dumps(value)}, and here it is {json.dumps(wanted)}; leave "
                "--config out, and the model is that of the weights"
            )


def _first_modules(tree: Mapping[str, Any], count: int) -> dict[str, Any]:
    def cut(node: Any) -> Any:
        return {key: cut(item) for key, item in node.items()} if isinstance(node, Mapping) else node[:count]

    return {name: cut(node) if name == "mtp_layers" else node for name, node in tree.items() if name != "mtp_layers" or count}

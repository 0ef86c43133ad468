"""The one schema of a run, read by both siblings; imports neither JAX nor PyTorch.

A config is a YAML file (a path, or the name of a preset in `configs/`) plus overrides of the form
`train.steps=200`. Whatever is wrong raises `ConfigError`, whose text is one line: the field, what it
holds and what would be right.
"""

from deepseek_jax.config.layers import expert_layers, has_experts, stretches
from deepseek_jax.config.reading import find_config, from_mapping, load_config, presets, to_yaml
from deepseek_jax.config.schema import (
    ATTENTIONS,
    EXCHANGES,
    FEED_FORWARDS,
    GROUPED_MATMULS,
    HELD_OUT,
    HOW_COMPUTED,
    MESH_AXES,
    MTP_FORMS,
    PRECISIONS,
    REMAT_CHOICES,
    ROPE_TYPES,
    SCORING_FUNCS,
    TOPK_METHODS,
    Config,
    ConfigError,
    DataConfig,
    LoraConfig,
    MixConfig,
    ModelConfig,
    ParallelConfig,
    Phase,
    PrepareConfig,
    RopeScaling,
    TrainConfig,
)
from deepseek_jax.config.validation import validate

__all__ = [
    "ATTENTIONS",
    "EXCHANGES",
    "FEED_FORWARDS",
    "GROUPED_MATMULS",
    "HELD_OUT",
    "HOW_COMPUTED",
    "MESH_AXES",
    "MTP_FORMS",
    "PRECISIONS",
    "REMAT_CHOICES",
    "ROPE_TYPES",
    "SCORING_FUNCS",
    "TOPK_METHODS",
    "Config",
    "ConfigError",
    "DataConfig",
    "LoraConfig",
    "MixConfig",
    "ModelConfig",
    "ParallelConfig",
    "Phase",
    "PrepareConfig",
    "RopeScaling",
    "TrainConfig",
    "expert_layers",
    "find_config",
    "from_mapping",
    "has_experts",
    "load_config",
    "presets",
    "stretches",
    "to_yaml",
    "validate",
]

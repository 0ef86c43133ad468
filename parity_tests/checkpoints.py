"""Checkpoints for tests: configs with every oddity that a layout can have, and random weights without compiling."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deepseek_jax.checkpoint.orbax_step import stacked_arrays
from deepseek_jax.checkpoint.pretrained import save_pretrained
from deepseek_jax.config import ModelConfig, RopeScaling, load_config

TINY = load_config("tiny").model
WIDE = dataclasses.replace(
    TINY, hidden_size=136, intermediate_size=200, moe_intermediate_size=132, q_lora_rank=None, n_group=1, topk_group=1,
    num_nextn_predict_layers=2, n_shared_experts=2,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.5),
)  # fmt: skip
"""Sizes beyond 128 and off it, no query compression, no groups, YaRN, MTP depth 2."""
CONFIGS = {
    "tiny": TINY,
    "wide": WIDE,
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True, mtp_hidden_after_norm=False),
    "tied, no mtp": dataclasses.replace(TINY, tie_word_embeddings=True, num_nextn_predict_layers=0),
    "all experts": dataclasses.replace(TINY, first_k_dense_replace=0, num_nextn_predict_layers=0),
    "all dense": dataclasses.replace(TINY, first_k_dense_replace=4, num_nextn_predict_layers=0),
}


def random_variables(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Variables that bfloat16 holds exactly, biases of either sign and in float32."""
    rng = np.random.default_rng(seed)
    variables: dict[str, Any] = {"params": {}, "router_state": {}}
    for path, array in stacked_arrays(config).items():
        values = rng.standard_normal(array.shape, np.float32)
        if path[-2].endswith("norm"):
            values = 1 + values / 8
        elif not array.is_bias:
            values *= config.initializer_range
        node = variables
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = values if array.is_bias else values.astype(ml_dtypes.bfloat16).astype(np.float32)
    return variables


def write_huggingface_directory(path: Path, config: ModelConfig = TINY, dtype: str = "float32", **options: Any) -> Path:
    """A Hugging Face directory of random weights at `path`."""
    save_pretrained(path, config, random_variables(config), dtype, **options)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}

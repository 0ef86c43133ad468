"""A model from a preset's name or from a few sizes, for those who write Python instead of YAML."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

from deepseek_jax.config.reading import from_mapping, load_config
from deepseek_jax.config.schema import ModelConfig, Phase, TrainConfig


def model_from(preset: Optional[str], sizes: Mapping[str, Any], where: str = "DeepSeekModel") -> ModelConfig:
    """The model of a preset or YAML file with some fields changed, or one of these sizes.

    Args:
        preset: None derives what `sizes` do not say from what they do; see `proportioned`.
        sizes: fields of `ModelConfig`.
        where: begins the message of an error.

    Raises:
        ConfigError: one line naming the field at fault.
    """
    fields = proportioned(sizes) if preset is None else dataclasses.asdict(load_config(preset).model)
    # Any context is long enough for sequences of one token, and none but the model is asked for.
    return from_mapping({"model": {**fields, **sizes}, "train": {"sequence_length": 1}}, where=where).model


def proportioned(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that are not given, from those that are, in DeepSeek-V3's proportions where these suit a small model.

    Heads are hidden_size / num_attention_heads wide, and half that for RoPE. The experts that serve a token are as wide
    as a dense layer between them, that is 18/7 of hidden_size. There is one dense layer, one group of experts, one MTP
    module, and no compression of queries.
    """

    def size(name: str, default: int) -> int:
        value = str(sizes.get(name))
        return int(value) if value.isdecimal() and int(value) else default  # what is wrong, reading the config says

    hidden, layers = size("hidden_size", 512), size("num_hidden_layers", 8)
    heads = size("num_attention_heads", max(hidden // 64, 1))
    head_dim = max(hidden // heads, 2)
    serving = size("num_experts_per_tok", 2) + size("n_shared_experts", 1)
    dense = size("intermediate_size", hidden * 18 // 7)
    width = size("moe_intermediate_size", _rounded_up(dense / serving, 32))
    return {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "first_k_dense_replace": min(1, layers - 1),
        "intermediate_size": width * serving,
        "num_attention_heads": heads,
        "q_lora_rank": None,
        "kv_lora_rank": max(hidden // 4, 1),
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": _rounded_up(head_dim / 2, 2),
        "v_head_dim": head_dim,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "n_group": 1,
        "topk_group": 1,
        "initializer_range": 0.02,
    }


def _rounded_up(size: float, multiple: int) -> int:
    return int(-(-size // multiple) * multiple)


def to_go_on(model: ModelConfig) -> TrainConfig:
    """To go on with a trained model: slower than from scratch, and MTP weighted as at the end (report 4.2)."""
    defaults = TrainConfig()
    return dataclasses.replace(
        defaults,
        sequence_length=min(defaults.sequence_length, model.max_position_embeddings),
        learning_rate=2.2e-5,
        warmup_steps=100,
        mtp_loss_weight=[Phase(0.1)],
    )

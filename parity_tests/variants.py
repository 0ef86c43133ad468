"""Tiny models of every form that has been released under this architecture, and the released sizes."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.pretrained import save_pretrained
from deepseek_jax.config import ModelConfig, RopeScaling, load_config
from parity_tests.checkpoints import random_variables

SMALL = dataclasses.replace(
    load_config("tiny").model, num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0,
    initializer_range=0.1, grouped_matmul="reference", remat="none", attention="reference",
)  # fmt: skip
V2 = dataclasses.replace(
    SMALL, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1,
    routed_scaling_factor=1.0, n_shared_experts=2,
)  # fmt: skip
YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, mscale=0.707, mscale_all_dim=0.707)
FORMS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "V2-Lite": (dataclasses.replace(V2, q_lora_rank=None, rope_scaling=YARN), {}),
    "V2": (
        dataclasses.replace(V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0), {},
    ),
    "Moonlight": (
        dataclasses.replace(SMALL, n_group=1, topk_group=1, q_lora_rank=None, routed_scaling_factor=2.446, n_shared_experts=2,
                            rope_theta=50000.0, rms_norm_eps=1e-5),
        {},
    ),
    "Kimi-K2": (
        dataclasses.replace(SMALL, n_group=1, topk_group=1, routed_scaling_factor=2.827,
                            rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=1.0)),
        {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}},
    ),
    "GigaChat3": (
        dataclasses.replace(SMALL, n_group=1, topk_group=1, q_lora_rank=None, rope_theta=1e5, num_nextn_predict_layers=1), {},
    ),
    "biases, halves turned": (dataclasses.replace(SMALL, attention_bias=True, rope_interleave=False), {}),
    "linear": (dataclasses.replace(SMALL, rope_scaling=RopeScaling("linear", 4.0)), {}),
    "dynamic": (dataclasses.replace(V2, rope_scaling=RopeScaling("dynamic", 4.0)), {}),
    "no shared experts, tied": (dataclasses.replace(SMALL, n_shared_experts=0, tie_word_embeddings=True), {}),
    "all dense, null groups": (
        dataclasses.replace(V2, first_k_dense_replace=2), {"n_group": None, "topk_group": None, "norm_topk_prob": None},
    ),
}  # fmt: skip
"""What it is, and what its config.json says otherwise than we would write it."""
EVERY_SECOND = dataclasses.replace(
    V2, num_hidden_layers=3, moe_layer_freq=2, topk_method="group_limited_greedy", n_group=4, topk_group=2,
    attention_bias=True, rope_interleave=False, n_shared_experts=0, rope_scaling=RopeScaling("linear", 2.0),
)  # fmt: skip
"""Forms that no class of transformers has together: the first and the last of three layers have experts."""

_MLA = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
RELEASED = {
    "V3": ("deepseek_v3", load_config("large_671b").model),
    "V2": ("deepseek_v2", dataclasses.replace(
        V2, vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
        first_k_dense_replace=1, num_attention_heads=128, q_lora_rank=1536, n_routed_experts=160, num_experts_per_tok=6,
        topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0, **_MLA,
    )),
    "V2-Lite": ("deepseek_v2", dataclasses.replace(
        V2, vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        first_k_dense_replace=1, num_attention_heads=16, q_lora_rank=None, n_routed_experts=64, num_experts_per_tok=6, **_MLA,
    )),
    "Moonlight-16B": ("deepseek_v3", dataclasses.replace(
        SMALL, vocab_size=163840, hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408, num_hidden_layers=27,
        first_k_dense_replace=1, num_attention_heads=16, q_lora_rank=None, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2, n_group=1, topk_group=1, **_MLA,
    )),
    "Kimi-K2": ("deepseek_v3", dataclasses.replace(
        SMALL, vocab_size=163840, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        first_k_dense_replace=1, num_attention_heads=64, q_lora_rank=1536, n_routed_experts=384, num_experts_per_tok=8,
        n_shared_experts=1, n_group=1, topk_group=1, **_MLA,
    )),
}  # fmt: skip
"""Model types and sizes, without MTP layers but for V3."""


def write_variant(path: Path, name: str, dtype: str = "float32") -> Path:
    """A directory of random weights in one of the `FORMS`."""
    config, changes = FORMS[name]
    plain = path.with_name(f"{path.name}-plain") if changes else path
    save_pretrained(plain, config, random_variables(config), dtype)
    if changes:
        content = json.loads((plain / "config.json").read_text())
        (plain / "config.json").write_text(json.dumps(content | changes, indent=1))
        shutil.move(plain, path)
    return path

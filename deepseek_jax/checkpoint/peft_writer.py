"""Write a run's adapter alone, as peft knows it: adapter_model.safetensors and adapter_config.json."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from deepseek_jax.checkpoint.finite import require_finite
from deepseek_jax.checkpoint.hub import ADAPTER_CONFIG
from deepseek_jax.checkpoint.orbax_source import OrbaxSource
from deepseek_jax.checkpoint.orbax_step import read_meta
from deepseek_jax.checkpoint.staging import disk_errors
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.tokenizer_files import write_json
from deepseek_jax.config import ModelConfig, expert_layers

ADAPTER_TENSORS = "adapter_model.safetensors"
PREFIX, SUFFIX = "base_model.model.", ".weight"
"""What peft puts around a module's name."""
FUSED = ("gate_proj", "up_proj", "down_proj")
"""Modules of these names peft takes for routed experts, wherever they are: others must be given as parameters."""


def require_exportable(source: OrbaxSource, step: Path) -> None:
    """Refuse a step of which an adapter would not be all that was learnt.

    Raises:
        CheckpointError: one line that says what it would lack.
    """
    train = read_meta(step).get("train", {})
    if not source.lora.rank:
        raise CheckpointError(f"{step}: has no adapter: it was trained without lora.rank")
    others = None
    if train.get("trainable"):
        others = f"weights of the model itself learnt, too (train.trainable={train['trainable']})"
    elif _has_biases(source.config) and any(phase.get("to") for phase in train.get("bias_update_speed", ())):
        others = "the routers' biases moved (train.bias_update_speed), which no adapter of peft's has"
    if others:
        raise CheckpointError(f"{step}: {others}; without --adapter it is written whole")


def write_adapter(directory: Path, source: OrbaxSource, base: str | None) -> tuple[int, int]:
    """Write both files, the tensors in float32.

    MTP modules, of which transformers has none, are left out.

    Args:
        directory: empty; see `staged_directory`.
        base: what the adapter belongs to, for adapter_config.json: a directory or a name on the hub.

    Returns:
        How many tensors were written, and how many left out.
    """
    tensors, modules, left_out = {}, [], 0
    for place, array in source.adapter():
        require_finite(array, f"{directory}: {place.name}")
        module = place.name.rpartition(".")[0]
        if int(module.split(".")[2]) >= source.config.num_hidden_layers:
            left_out += 1
            continue
        tensors[f"{PREFIX}{place.name}{SUFFIX}"] = np.ascontiguousarray(array, np.float32)
        modules.append(module)
    with disk_errors(directory / ADAPTER_TENSORS):
        save_file(tensors, directory / ADAPTER_TENSORS, metadata={"format": "pt"})
    write_json(directory / ADAPTER_CONFIG, _config(source, list(dict.fromkeys(modules)), base))
    return len(tensors), left_out


def _config(source: OrbaxSource, modules: list[str], base: str | None) -> dict[str, Any]:
    experts = {module.rpartition(".")[2] for module in modules if ".experts." in module}
    others = [module for module in modules if ".experts." not in module]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": source.lora.rank,
        "lora_alpha": source.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [*(module for module in others if not module.endswith(FUSED)), *sorted(experts)],
        "target_parameters": [f"{module}.weight" for module in others if module.endswith(FUSED)],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _has_biases(model: ModelConfig) -> bool:
    return model.topk_method == "noaux_tc" and expert_layers(model) > 0

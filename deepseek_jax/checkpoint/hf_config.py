"""`config.json` of a Hugging Face `deepseek_v3` directory, from and to our schema.

Field names are the same on both sides, so what this file knows is the rest: which keys say something
that our model does not compute, which forms of ours no `deepseek_v3` has, and that rotary parameters and
dtype go by two spellings each. Older readers know `rope_theta`, `rope_scaling` and `torch_dtype`; current
ones `rope_parameters` and `dtype`.

A model of other forms is written under a `model_type` of its own, so that transformers refuses it by name
and takes it for nothing else; both siblings read it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.fp8_blocks import BLOCK
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import file_inside, model_config, read_object, shown
from deepseek_jax.config import HOW_COMPUTED, ModelConfig, RopeScaling

CONFIG_JSON = "config.json"
MODEL_TYPE, OWN_MODEL_TYPE = "deepseek_v3", "deepseek_jax"

_OUR_FORMS = {"feed_forward": "swiglu", "shared_expert_gate": False, "mtp_form": "sequential"}
"""Fields of `ModelConfig` that Hugging Face does not know, and what deepseek_v3 computes."""
_V3_FORMS = {"scoring_func": "sigmoid", **_OUR_FORMS}
"""Those and one that it knows: what our model may have otherwise, and deepseek_v3 has not."""
_CONSTANTS = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
"""Keys that must hold these values where they are given: our model computes nothing else."""
_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}
_ROPE_CONSTANTS = {"truncate": True, "partial_rotary_factor": 1.0}
_ROPE_FIELDS = [field.name for field in dataclasses.fields(RopeScaling)]


def require_deepseek_v3(config: ModelConfig, where: str) -> None:
    """Refuse a model that a `deepseek_v3` cannot be.

    Raises:
        CheckpointError: one line that names `where` and every field at fault.
    """
    if faults := _other_forms(config):
        raise CheckpointError(
            f"{where}: Hugging Face's {MODEL_TYPE} has no {', '.join(faults)}; keep it as a run, or write it with "
            f"save_pretrained as model_type {OWN_MODEL_TYPE}, which only we read"
        )


def _other_forms(config: ModelConfig) -> list[str]:
    """What a deepseek_v3 cannot be, as `model.field=value`."""
    without_mtp = {"mtp_form"} if config.num_nextn_predict_layers == 0 else set()
    faults = {name for name, value in _V3_FORMS.items() if getattr(config, name) != value} - without_mtp
    faults |= set() if config.n_shared_experts else {"n_shared_experts"}
    return [f"model.{name}={str(getattr(config, name)).lower()}" for name in sorted(faults)]


def to_config_json(config: ModelConfig, form: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds for a checkpoint in `form` (see `forms.FORMS`).

    Args:
        token_ids: `bos_token_id`, `eos_token_id` and the like.
    """
    scaling = None if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
    is_own = bool(_other_forms(config))
    left_out = {*HOW_COMPUTED, "rope_theta", "rope_scaling", *(() if is_own else _OUR_FORMS)}
    fields = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig) if field.name not in left_out
    }
    dtype = "float32" if form == "float32" else "bfloat16"
    rope_type = "default" if scaling is None else "yarn"
    content = {
        "architectures": ["DeepSeekModel" if is_own else "DeepseekV3ForCausalLM"],
        "model_type": OWN_MODEL_TYPE if is_own else MODEL_TYPE,
        **token_ids,
        **fields,
        "num_key_value_heads": config.num_attention_heads,
        **({} if is_own else {"hidden_act": "silu"}),
        **_CONSTANTS,
        "rope_parameters": {"rope_type": rope_type, "rope_theta": config.rope_theta, **(scaling or {})},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {"type": rope_type, **scaling},
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if form == "fp8":
        content["quantization_config"] = _QUANTIZATION
    return content


def read_config_json(directory: Path) -> ModelConfig:
    """The model that `directory`/config.json describes, to be computed in its own dtype.

    Raises:
        UserError: one line naming the file and the key: another model type, a value out of range, or one
            that asks for mathematics that our model does not have.
    """
    path = file_inside(directory, CONFIG_JSON, str(directory))
    content = read_object(path)
    is_own = content.get("model_type") == OWN_MODEL_TYPE
    if not is_own:
        _require(path, "model_type", content.get("model_type"), MODEL_TYPE)
        if content.get("n_shared_experts") == 0:
            raise CheckpointError(f"{path}: n_shared_experts is 0; only 1 or more is supported")
    for key, value in (_CONSTANTS if is_own else {"hidden_act": "silu", **_CONSTANTS, **_V3_FORMS}).items():
        _require(path, key, content.get(key, value), value)
    heads = content.get("num_attention_heads", ModelConfig.num_attention_heads)
    if content.get("num_key_value_heads") is not None:
        _require(path, "num_key_value_heads", content["num_key_value_heads"], heads)
    _check_quantization(path, content.get("quantization_config"))
    names = {field.name for field in dataclasses.fields(ModelConfig)}.difference(HOW_COMPUTED)
    fields = {name: content[name] for name in names if name in content}
    # transformers has a second name for it.
    if "num_mtp_layers" in content:
        _agree(path, "num_mtp_layers", content["num_mtp_layers"], "num_nextn_predict_layers", fields)
    fields |= _rope(path, content)
    dtype = content.get("dtype") or content.get("torch_dtype")
    fields["precision"] = dtype if dtype in ("float32", "bfloat16") else "float32"
    return model_config(fields, str(path))


def _require(path: Path, key: str, value: Any, expected: Any) -> None:
    if value != expected or isinstance(value, bool) != isinstance(expected, bool):
        raise CheckpointError(f"{path}: {key} is {shown(value)}; only {shown(expected)} is supported")


def _agree(path: Path, key: str, value: Any, other: str, fields: dict[str, Any]) -> None:
    """Take `value` for the field `other`, which must not say anything else."""
    if fields.setdefault(other, value) != value:
        raise CheckpointError(f"{path}: {key} is {shown(value)}, and {other} is {shown(fields[other])}")


def _check_quantization(path: Path, quantization: Any) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config is {shown(quantization)}; an object is expected")
    for key in ("quant_method", "fmt", "weight_block_size"):
        expected = _QUANTIZATION[key]
        # transformers leaves the format out: it has only this one.
        value = quantization.get(key, expected if key == "fmt" else None)
        _require(path, f"quantization_config.{key}", value, expected)


def _rope(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Fields `rope_theta` and `rope_scaling` from whichever spelling there is; from both if they agree."""
    fields = {"rope_theta": content["rope_theta"]} if content.get("rope_theta") is not None else {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = content.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise CheckpointError(f"{path}: {key} is {shown(parameters)}; an object is expected")
        if "rope_theta" in parameters:
            _agree(path, f"{key}.rope_theta", parameters["rope_theta"], "rope_theta", fields)
        scaling = _scaling(path, key, parameters, content.get("max_position_embeddings"))
        _agree(path, key, scaling, "rope_scaling", fields)
    return fields


def _scaling(path: Path, key: str, parameters: dict[str, Any], context: Any) -> dict[str, Any] | None:
    """Fields of `RopeScaling` from Hugging Face's parameters, or None for plain rotary embedding."""
    for name, value in _ROPE_CONSTANTS.items():
        _require(path, f"{key}.{name}", parameters.get(name, value), value)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise CheckpointError(f"{path}: {key}.rope_type is {shown(kind)}; only default and yarn are supported")
    known = {"type", "rope_type", "rope_theta", *_ROPE_FIELDS, *_ROPE_CONSTANTS}
    for name, value in parameters.items():
        if name not in known and value is not None:
            raise CheckpointError(f"{path}: {key}.{name} is {shown(value)}; it is not supported")
    given = {name: parameters[name] for name in _ROPE_FIELDS if parameters.get(name) is not None}
    if "factor" not in given:
        raise CheckpointError(f"{path}: {key}.factor is missing")
    # What transformers takes for those that are left out; without mscale the factor alone counts.
    defaults = {"original_max_position_embeddings": context, "beta_fast": 32.0, "beta_slow": 1.0}
    return {**defaults, "mscale": 0.0, "mscale_all_dim": 0.0, **given}

"""`config.json` of a Hugging Face directory, from and to our schema.

Field names are the same on both sides, so what this file knows is the rest: which keys say something
that our model does not compute, and what the model types (`hf_types`) make of the others. Rotary parameters
are `hf_rope`'s. A file that came with the weights goes out with them again as it was, where it still describes them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.checkpoint import hf_rope
from deepseek_jax.checkpoint.fp8_blocks import BLOCK
from deepseek_jax.checkpoint.hf_types import MODEL_TYPES, OUR_FORMS, OWN_MODEL_TYPE, ModelType, other_forms, type_for
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import agree, file_inside, model_config, read_object, require, shown
from deepseek_jax.config import HOW_COMPUTED, ModelConfig
from deepseek_jax.errors import UserError

CONFIG_JSON = "config.json"
TEXT_CONFIG, TEXT_PREFIX = "text_config", "language_model."
"""Where a model of several kinds of input keeps its language model, and how that one's tensors begin."""

_CONSTANTS = {"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False}
"""Keys that must hold these values where they are given: our model computes nothing else."""
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}
_SCALE_FORMATS = (None, "float", "ue8m0")
_DTYPES = ("float32", "bfloat16", "float16")
_NO_MATHEMATICS = {
    "architectures", "model_type", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache", "_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux", "head_dim",
    "qk_head_dim", "output_router_logits", "router_aux_loss_coef", "num_key_value_heads", "quantization_config",
    "rope_theta", "rope_scaling", "rope_parameters", "num_mtp_layers", "_attn_implementation", "num_local_experts",
    "num_experts", *_CONSTANTS,
}  # fmt: skip
"""Known keys that are no fields of ours and say nothing of what a trained model computes, or are looked at elsewhere."""


class HuggingFaceConfig(NamedTuple):
    """What a config.json says."""

    model: ModelConfig
    """To be computed in its own dtype."""
    content: dict[str, Any]
    """Of the language model's part."""
    prefix: str
    """Of its tensors' names."""
    notes: list[str]
    """Lines for people on what is no fault and yet not as it looks."""


def require_known_type(config: ModelConfig, where: str, carried: Mapping[str, Any] | None = None) -> None:
    """Refuse a model that no model type of Hugging Face's can be.

    Args:
        carried: the config.json that came with it, see `carried_content`.

    Raises:
        CheckpointError: one line that names `where` and every field at fault.
    """
    if carried is None and type_for(config) == OWN_MODEL_TYPE:
        faults = {name: other_forms(config, name) for name in MODEL_TYPES if name != OWN_MODEL_TYPE}
        nearest = min(faults, key=lambda name: len(faults[name]))
        raise CheckpointError(
            f"{where}: Hugging Face's {nearest} has no {', '.join(faults[nearest])}; keep it as a run, or write it with "
            f"save_pretrained as model_type {OWN_MODEL_TYPE}, which only we read"
        )


def to_config_json(
    config: ModelConfig,
    form: str,
    token_ids: Mapping[str, Any],
    carried: Mapping[str, Any] | None = None,
    keeps_scales: bool = False,
) -> dict[str, Any]:
    """What config.json holds for a checkpoint in `form` (see `forms.FORMS`).

    Args:
        token_ids: `bos_token_id`, `eos_token_id` and the like.
        carried: the config.json that came with the weights, see `carried_content`.
        keeps_scales: whether float8 has the scales that it came with, which are then of the format that it came in.
    """
    dtype = form if form in _DTYPES else "bfloat16"
    content = _written(config, token_ids) if carried is None else {**carried}
    names = [name for name in ("dtype", "torch_dtype") if name in content] if carried is not None else []
    content |= dict.fromkeys(names or ("dtype", "torch_dtype"), dtype)
    if carried is None:
        content |= {"use_cache": True}
    quantization = content.pop("quantization_config", _QUANTIZATION)
    if form == "fp8":
        content["quantization_config"] = quantization if keeps_scales else _QUANTIZATION
    return content


def _written(config: ModelConfig, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    model_type = type_for(config)
    is_own = model_type == OWN_MODEL_TYPE
    left_out = {*HOW_COMPUTED, "rope_theta", "rope_scaling", *(() if is_own else OUR_FORMS)}
    if not is_own and config.num_nextn_predict_layers == 0:
        left_out |= {"mtp_hidden_after_norm"}
    fields = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig) if field.name not in left_out
    }
    return {
        "architectures": [MODEL_TYPES[model_type].architecture],
        "model_type": model_type,
        **token_ids,
        **fields,
        "num_key_value_heads": config.num_attention_heads,
        **({} if is_own else {"hidden_act": "silu"}),
        "attention_dropout": 0.0,
        **hf_rope.written(config),
    }


def carried_content(directory: Path | None, config: ModelConfig) -> dict[str, Any] | None:
    """The language model's part of the config.json that came with a model, if it still describes `config`.

    Args:
        directory: where it was kept.
    """
    if directory is None or not (directory / CONFIG_JSON).is_file():
        return None
    try:
        came = read_hf_config(directory)
    except UserError:
        return None
    computed = {name: getattr(config, name) for name in (*HOW_COMPUTED, "num_nextn_predict_layers")}
    if dataclasses.replace(came.model, **computed) != config:
        return None
    return came.content


def read_config_json(directory: Path) -> ModelConfig:
    """The model that `directory`/config.json describes; see `read_hf_config`."""
    return read_hf_config(directory).model


def read_hf_config(directory: Path) -> HuggingFaceConfig:
    """Read and check `directory`/config.json.

    Raises:
        UserError: one line naming the file and the key: another model type, a value out of range, or one
            that asks for mathematics that our model does not have.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: there is no such directory")
    if not (directory / CONFIG_JSON).exists():
        raise CheckpointError(f"{directory}: has no {CONFIG_JSON}, so it is no Hugging Face directory")
    path = file_inside(directory, CONFIG_JSON, str(directory))
    outer = read_object(path)
    content, prefix = outer, ""
    if isinstance(outer.get(TEXT_CONFIG), dict):
        content, prefix = {**outer[TEXT_CONFIG]}, TEXT_PREFIX
        for key in ("quantization_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"):
            if content.get(key) is None and outer.get(key) is not None:
                content[key] = outer[key]
    kind = _model_type(path, content)
    is_own = content.get("model_type") == OWN_MODEL_TYPE
    for key, value in _CONSTANTS.items():
        if not (is_own and key == "hidden_act"):
            require(path, key, content.get(key, value), value)
    names = {field.name for field in dataclasses.fields(ModelConfig)}.difference(HOW_COMPUTED)
    fields = kind.defaults | {name: content[name] for name in names if name in content}
    fields |= _without_null(fields)
    # transformers has a second name for it.
    if "num_mtp_layers" in content:
        agree(path, "num_mtp_layers", content["num_mtp_layers"], "num_nextn_predict_layers", fields)
    fields |= hf_rope.read(path, content)
    heads = fields.get("num_attention_heads", ModelConfig.num_attention_heads)
    if content.get("num_key_value_heads") is not None:
        require(path, "num_key_value_heads", content["num_key_value_heads"], heads)
    _check_quantization(path, content.get("quantization_config"))
    dtype = content.get("dtype") or content.get("torch_dtype")
    fields["precision"] = dtype if dtype in ("float32", "bfloat16") else "float32"
    notes = _check_type(path, kind, fields)
    unknown = sorted(key for key, value in content.items() if key not in names | _NO_MATHEMATICS and value is not None)
    if unknown:
        notes.append(f"{path}: keys that are not known here and change nothing: {', '.join(map(shown, unknown))}")
    if prefix:
        notes.append(f"{path}: only its {TEXT_CONFIG} is read, and of the tensors those of the language model")
    return HuggingFaceConfig(model_config(fields, str(path)), content, prefix, notes)


def _model_type(path: Path, content: dict[str, Any]) -> ModelType:
    name = content.get("model_type")
    for key in _INDEXER:
        if content.get(key) is not None:
            raise CheckpointError(
                f"{path}: {key} is {shown(content[key])}: an indexer chooses what attention sees; only attention to all that "
                "came before is supported"
            )
    if not isinstance(name, str) or name not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise CheckpointError(f"{path}: model_type is {shown(name)}; only {known} are supported")
    return MODEL_TYPES[name]


def _without_null(fields: dict[str, Any]) -> dict[str, Any]:
    """What null means for fields of ours that know none."""
    meanings = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0, "norm_topk_prob": False, "num_nextn_predict_layers": 0}
    return {name: meaning for name, meaning in meanings.items() if name in fields and fields[name] is None}


def _check_type(path: Path, kind: ModelType, fields: dict[str, Any]) -> list[str]:
    """Refuse what the model type does not compute; lines on what its readers do not agree on."""
    notes = []
    for key, values in kind.computes.items():
        value = fields.get(key, getattr(ModelConfig, key))
        if key == "num_nextn_predict_layers" or value in values:
            continue
        if key != "norm_topk_prob":
            expected = " or ".join(map(shown, values))
            raise CheckpointError(f"{path}: {key} is {shown(value)}; with this model_type only {expected} is supported")
        if fields.get("routed_scaling_factor") != 1:
            raise CheckpointError(
                f"{path}: norm_topk_prob is {shown(value)} and routed_scaling_factor is not 1: DeepSeek's own code "
                "then leaves the factor out and transformers the division; write false or a factor of 1.0"
            )
        notes.append(f"{path}: norm_topk_prob is true, which DeepSeek's own code computes and transformers does not")
    return notes


def _check_quantization(path: Path, quantization: Any) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quantization_config is {shown(quantization)}; an object is expected")
    for key in ("quant_method", "fmt", "weight_block_size"):
        expected = _QUANTIZATION[key]
        # transformers leaves the format out: it has only this one.
        value = quantization.get(key, expected if key == "fmt" else None)
        require(path, f"quantization_config.{key}", value, expected)
    if quantization.get("scale_fmt") not in _SCALE_FORMATS:
        known = ", ".join(filter(None, _SCALE_FORMATS))
        value = shown(quantization["scale_fmt"])
        raise CheckpointError(f"{path}: quantization_config.scale_fmt is {value}; only {known} are supported")

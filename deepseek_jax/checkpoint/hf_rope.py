"""Rotary parameters in config.json: two places, two spellings, and one meaning.

Older readers know `rope_theta` and `rope_scaling` (null, or with `type`), current ones `rope_parameters` with `rope_type`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import agree, require, shown
from deepseek_jax.config import ROPE_TYPES, ModelConfig, RopeScaling

_CONSTANTS = {"truncate": True, "partial_rotary_factor": 1.0}
_SPELLINGS = ("type", "rope_type")
_FIELDS = {
    "yarn": [field.name for field in dataclasses.fields(RopeScaling) if field.name != "rope_type"],
    "linear": ["factor"],
    "dynamic": ["factor"],
}
"""By type, the fields of `RopeScaling` that it has."""


def written(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json, in both spellings."""
    scaling, parameters = None, {}
    if config.rope_scaling is not None:
        kind = config.rope_scaling.rope_type
        parameters = {"rope_type": kind} | {name: getattr(config.rope_scaling, name) for name in _FIELDS[kind]}
        scaling = {"type": kind, **parameters}
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | parameters,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
    }


def read(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Fields `rope_theta` and `rope_scaling` from whichever spelling there is; from both if they agree.

    Raises:
        CheckpointError: one line naming the file and the key.
    """
    fields = {"rope_theta": content["rope_theta"]} if content.get("rope_theta") is not None else {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = content.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise CheckpointError(f"{path}: {key} is {shown(parameters)}; an object is expected")
        if "rope_theta" in parameters:
            agree(path, f"{key}.rope_theta", parameters["rope_theta"], "rope_theta", fields)
        scaling = _scaling(path, key, parameters, content.get("max_position_embeddings"))
        agree(path, key, scaling, "rope_scaling", fields)
    return fields


def _scaling(path: Path, key: str, parameters: dict[str, Any], context: Any) -> dict[str, Any] | None:
    """Fields of `RopeScaling` from Hugging Face's parameters, or None for plain rotary embedding."""
    for name, value in _CONSTANTS.items():
        require(path, f"{key}.{name}", parameters.get(name, value), value)
    kind = "default"
    for spelling in _SPELLINGS:
        kind = parameters.get(spelling) or kind
    if kind == "default":
        return None
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{path}: {key}.rope_type is {shown(kind)}; only default, {', '.join(ROPE_TYPES)} are supported")
    for name, value in parameters.items():
        known = {*_SPELLINGS, "rope_theta", *_FIELDS[kind], *_CONSTANTS}
        if name not in known and value is not None:
            raise CheckpointError(f"{path}: {key}.{name} is {shown(value)}; with rope_type {kind} it is not supported")
    given = {name: parameters[name] for name in _FIELDS[kind] if parameters.get(name) is not None}
    if "factor" not in given:
        raise CheckpointError(f"{path}: {key}.factor is missing")
    if kind != "yarn":
        return {"rope_type": kind, **given}
    # What transformers takes for those that are left out; without mscale the factor alone counts.
    defaults = {"original_max_position_embeddings": context, "beta_fast": 32.0, "beta_slow": 1.0}
    return {"rope_type": kind, **defaults, "mscale": 0.0, "mscale_all_dim": 0.0, **given}

"""The model types that Hugging Face has for this architecture: what each computes, and what it takes for what is left out.

The model itself knows fields only. This table says which values of them a reader of that `model_type` honours, so that
nothing is written that it would compute otherwise, and nothing read that means something else there.
"""

from dataclasses import dataclass, field
from typing import Any

from deepseek_jax.config import ModelConfig

OWN_MODEL_TYPE = "deepseek_jax"
"""Of what Hugging Face has not: transformers refuses it by name, and both siblings read it."""

OUR_FORMS = {"feed_forward": "swiglu", "shared_expert_gate": False, "mtp_form": "sequential"}
"""Fields of `ModelConfig` that Hugging Face does not know, and what its model types compute."""
_OURS = {name: (value,) for name, value in OUR_FORMS.items()}


@dataclass(frozen=True)
class ModelType:
    """A `model_type`."""

    architecture: str
    computes: dict[str, tuple[Any, ...]]
    """Fields for which it has only some of the values that our model has."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What it takes for a field that is left out, where that is not our default."""


_V3 = ModelType("DeepseekV3ForCausalLM", {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), **_OURS})
_V2 = ModelType(
    "DeepseekV2ForCausalLM",
    {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
        "rope_interleave": (True,),
        "num_nextn_predict_layers": (0,),
        **_OURS,
    },
    dict(
        vocab_size=102400, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, initializer_range=0.02, first_k_dense_replace=0, n_group=1, topk_group=1,
        n_routed_experts=64, n_shared_experts=2, routed_scaling_factor=1.0, topk_method="greedy", scoring_func="softmax",
        norm_topk_prob=False, moe_intermediate_size=1407, num_nextn_predict_layers=0,
    ),
)  # fmt: skip
MODEL_TYPES = {
    "deepseek_v3": _V3,
    "deepseek_v2": _V2,
    "kimi_k2": _V3,
    OWN_MODEL_TYPE: ModelType("DeepSeekModel", {}),
}
"""By name; the first that can stand for a model is what is written for one that came from nowhere."""


def other_forms(config: ModelConfig, name: str) -> list[str]:
    """What a model type of that name cannot be, as `model.field=value`."""
    faults = [field for field, values in MODEL_TYPES[name].computes.items() if getattr(config, field) not in values]
    if config.num_nextn_predict_layers == 0 and "mtp_form" in faults:
        faults.remove("mtp_form")
    return [f"model.{field}={str(getattr(config, field)).lower()}" for field in sorted(faults)]


def type_for(config: ModelConfig) -> str:
    """The first model type that computes what `config` says."""
    return next(name for name in MODEL_TYPES if not other_forms(config, name))

"""The weights of a model arranged for decoding, by which few rows are multiplied, one layer at a time.

Training scans over stacked weights to keep compile time flat. Decoding reads every weight for a
handful of tokens, so that slicing a stack, a copy of all weights for each token, would cost as
much as the arithmetic; here each layer has its own arrays.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Optional

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from deepseek_jax.config import ModelConfig, stretches
from deepseek_jax.model.attention import ABSORBED, absorbed_weights
from deepseek_jax.model.panels import COLUMNS, PANELS, Panels, cut, whole
from deepseek_jax.parallel.sharding import Division

LINEAR = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj", "eh_proj", "proj",
)  # fmt: skip
"""Linear maps by whose weights decoding multiplies."""
FEW = 16
"""Rows that take hardly longer to multiply than their weight to read."""
EXPERTS_DOWN = ("experts", "down_proj")
"""Side by side, the experts are one wide feed-forward: their hidden units are the rows of its last weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's variables with every layer on its own, arranged for decoding."""

    embedding: jax.Array
    layers: list[dict[str, Any]]
    """Besides the variables of a `Block`, what attention to a cache prepares of them; see `cut_layer`, too."""
    norm: dict[str, Any]
    head: Optional[jax.Array | Panels]
    """Null where on a mesh it is the embedding."""
    mtp: list[dict[str, Any]]
    """As `layers`, of the modules that draft; empty where none does."""
    division: Optional[Division] = dataclasses.field(metadata={"static": True}, default=None)
    """The mesh, inside `shard_map` over which all functions here are then called: for a device's own sequences."""


def prepare(
    config: ModelConfig, variables: dict[str, Any], sequences: int, drafts: bool = False, division: Optional[Division] = None
) -> Weights:
    """Unstack the variables of a `DeepseekV3` and arrange them for so many sequences at once, with MTP modules that draft.

    On a mesh they are those of `checkpoint.on_mesh` and stay where they are.
    """
    params = variables["params"]
    cuts = jax.default_backend() == "cpu" and config.precision != "fp8" and division is None
    absorbs = division is None or division.parallel.fsdp == 1

    def unstacked(stack: str, first: int, end: int) -> Iterator[dict[str, Any]]:
        trees = {kind: tree[stack] for kind, tree in variables.items() if stack in tree}
        for i in range(first, end):
            layer = jax.tree.map(lambda x, i=i: x[i], trees)
            absorbed = {
                (*path[:-2], "weights"): absorbed_weights(config, weight)
                for path, weight in flatten_dict(layer["params"]).items() if path[-2] == "kv_b_proj" and absorbs
            }  # fmt: skip
            layer[ABSORBED] = unflatten_dict(absorbed)
            yield cut_layer(config, layer, sequences) if cuts else layer

    layers = [layer for part in stretches(config) for layer in unstacked(*part)]
    mtp = list(unstacked("mtp_layers", 0, config.num_nextn_predict_layers)) if drafts else []
    embedding = params["embed_tokens"]["weight"]
    head = None if config.tie_word_embeddings else params["lm_head"]["weight"]
    if division is None:
        head = embedding.T if head is None else head
        head = cut(head) if cuts and head.shape[1] % COLUMNS == 0 else head
    return Weights(embedding, layers, {"params": params["norm"]}, head, mtp, division)


def cut_layer(config: ModelConfig, layer: dict[str, Any], sequences: int) -> dict[str, Any]:
    """Move the weights by which decoding multiplies from the parameters to the collection PANELS.

    Those of the experts too, if so many sequences choose as many experts as there are, so that most are read anyway,
    and are few enough for multiplying them by every expert to cost little.
    """
    c, params, panels = config, flatten_dict(layer["params"]), {}
    even = c.moe_intermediate_size % COLUMNS == 0 == c.hidden_size % COLUMNS
    experts = even and c.n_routed_experts / c.num_experts_per_tok <= sequences <= FEW
    for path, weight in flatten_dict(layer["params"]).items():
        is_linear = path[-2] in LINEAR and path[-1] == "weight" and weight.shape[1] % COLUMNS == 0
        if is_linear or (path[-2] == "experts" and experts):
            del params[path]
            panels[path] = cut(weight.reshape(-1, c.hidden_size) if path[-2:] == EXPERTS_DOWN else weight)
    return layer | {"params": unflatten_dict(params), PANELS: unflatten_dict(panels)}


def whole_layer(config: ModelConfig, layer: dict[str, Any]) -> dict[str, Any]:
    """Undo `cut_layer`, for products of many rows."""
    params = flatten_dict(layer["params"])
    for path, panels in flatten_dict(layer.get(PANELS, {})).items():
        if path[-2:] == EXPERTS_DOWN:
            params[path] = whole(panels).reshape(config.n_routed_experts, -1, config.hidden_size)
        else:
            params[path] = whole(panels, config.n_routed_experts if path[-2] == "experts" else None)
    return {kind: tree for kind, tree in layer.items() if kind != PANELS} | {"params": unflatten_dict(params)}

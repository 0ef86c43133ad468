"""Which part of the model an operation belongs to, and in which pass: read from the path that JAX leaves in `op_name`.

A fusion carries one name for all that is in it, so that a norm fused into a product counts with the product.
"""

import re
from typing import NamedTuple

from deepseek_jax.parallel.exchange import OVERFLOW

OTHER = "other"


class Part(NamedTuple):
    """Where an operation's time goes in the tables."""

    name: str
    """A key of `PARTS`, or OTHER."""
    of_pass: str
    """One of PASSES."""


PASSES = ("forward", "again", "backward")
"""`again` is what the backward pass makes a second time. The optimizer and what has no gradient count as forward."""

PARTS = {
    "optimizer": r"optimizer|apply_gradient\w*",
    "weights": r"weights|all_gather_invariant",
    "exchange": r"exchange|ragged_all_to_all",
    "router": r"gate|GateLogit|get_topk",
    "experts": r"experts|RoutedMoE",
    "shared_experts": r"shared_experts|shared_expert_gate|RoutedAndSharedMoE/MlpBlock",
    "norms": r"\w*(?:norm|layernorm)(?:_\d)?|RMSNorm",
    "attention": r"self_attn|MLA|splash_\w+",
    "dense": r"mlp|MlpBlock",
    "head": r"head|apply_output_head|cross_entropy_with_logits",
    "embedding": r"embed_tokens|Embed",
    "layers": r"[\w.]*_layers|NNXDecoder",
}
"""Part -> the words of a path that name it, whole; the first that is found. Classes and functions are MaxText's, whose
programs `scripts/against_maxtext` reads by the same table; XLA cuts some kernels' paths down to their own names. `layers`
is what a loop over layers does around them: slices and sums of stacks, residual sums."""


def _word(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|[/(]|jit\()(?:{words})(?=$|[/).])")


_WORDS = {name: _word(words) for name, words in PARTS.items()}
_OVERFLOW = _word(OVERFLOW)


def part_of(op_name: str) -> Part:
    """Part and pass of an operation by its `op_name`, such as `jit(train_step)/.../moe_layers/mlp/gate/top_k`."""
    name = next((name for name, words in _WORDS.items() if words.search(op_name)), OTHER)
    if "rematted_computation" in op_name:
        return Part(name, "again")
    return Part(name, "backward" if "transpose(" in op_name else "forward")


def is_overflow(op_name: str) -> bool:
    """Whether it runs only for tokens that found no room in the first round, so never under even routing."""
    return _OVERFLOW.search(op_name) is not None

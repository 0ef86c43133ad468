"""Which modules scripts/mutants changes, the tests that belong to each, and which of cosmic-ray's mutants say something."""

import ast
import re
from collections.abc import Iterator

MODULES = {
    "schedules": (
        "training/schedules.py",
        """test_resume.py::test_a_plan_goes_on_from_any_step
        test_resume.py::test_the_past_is_counted_and_not_derived test_training.py::test_the_reports_schedules
        test_training.py::test_schedules_are_alike""",
    ),
    "packing": ("data/packing.py", "test_packing.py test_eval_sets.py"),
    "sampling": (
        "generation/sampling.py",
        """test_generation.py::test_what_is_compiled_is_what_is_asked_for test_generation.py::test_what_cannot_be_asked_for
        test_generation.py::test_log_probabilities_of_several_positions
        test_generation.py::test_what_is_sampled_among_is_what_transformers_has
        test_generation.py::test_every_sequence_and_token_has_a_key_of_its_own
        test_generation.py::test_log_probabilities_and_a_penalty_for_repetition
        test_generation.py::test_samples_follow_temperature_and_top_p""",
    ),
    "rope": (
        "model/rope.py",
        """test_modules.py::test_yarn_is_derived_alike test_modules.py::test_yarn_of_deepseek_v3
        test_modules.py::test_module[rope-float64] test_modules.py::test_ends_turn_by_a_product_as_by_parts
        test_modules.py::test_module[attention-float64] test_variants.py::test_jax_is_its_sibling""",
    ),
    "router": (
        "model/router.py",
        """test_modules.py::test_experts_of_equal_score_are_chosen_alike
        test_modules.py::test_experts_outside_the_kept_groups_stay_out_however_negative_the_biases
        test_modules.py::test_bias_update_is_alike test_forms.py::test_room_is_given_in_the_order_of_tokens_and_by_sequence
        test_forms.py::test_a_token_without_any_room_is_served_by_nothing_and_has_no_gradient
        test_modules.py::test_module[router-float64] test_modules.py::test_variants test_forms.py::test_routers
        test_variants.py::test_jax_is_its_sibling""",
    ),
    "loss": (
        "training/loss.py",
        """test_training.py::test_cross_entropy_and_its_gradients
        test_training.py::test_training_loss_by_its_parts
        test_document_masks.py::test_losses_are_those_of_the_documents_one_by_one
        test_document_masks.py::test_targets_count_the_same_on_a_mesh test_training.py::test_twenty_steps_in_lockstep""",
    ),
    "optimizer": (
        "training/optimizer.py",
        """test_training.py::test_matrices_decay test_training.py::test_adamw_is_the_same
        test_muon.py::test_both_siblings_choose_the_same_parameters
        test_initial.py::test_only_what_is_named_learns""",
    ),
    "evaluation": (
        "training/evaluation.py",
        """test_document_masks.py::test_bytes_of_documents
        test_scoring.py::test_bits_per_byte_of_a_run_are_exactly_those_of_its_targets""",
    ),
    "attention": (
        "model/attention.py",
        """test_modules.py::test_module[attention-float64] test_modules.py::test_variants
        test_modules.py::test_decoding_over_the_cache_equals_attention_over_the_whole_sequence
        test_variants.py::test_jax_is_its_sibling""",
    ),
    "fp8": ("precision/fp8.py", "test_fp8.py test_fp8_matmul.py::test_types_and_leading_axes"),
    "exchange": ("parallel/exchange.py", "test_exchange.py"),
}
"""Each module and the tests that should notice, the cheapest that say most first."""

KEPT = re.compile(
    "core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Mul_Add|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul"
    "|BitOr_BitAnd|BitAnd_BitOr|BitXor_BitOr|LShift_RShift|RShift_LShift)"
    "|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt|Is_IsNot|IsNot_Is)"
    "|ReplaceUnaryOperator_Delete_.*|AddNot|Replace(True|False|And|Or|Break|Continue)[A-Z].*|NumberReplacer"
    "|RemoveDecorator|ZeroIterationForLoop)"
)
"""Operators of cosmic-ray that a person might have meant; the rest mostly make what cannot run."""


def is_meant(operator: str, place: tuple[int, int], source: str) -> bool:
    """Whether an operator at a line and column says something of the tests."""
    return KEPT.fullmatch(operator) is not None and not any(begin <= place < end for begin, end in passive(source))


def passive(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations, errors that are raised, and arguments of `dataclass` begin and end."""
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.Raise):
            parts.append(node)
        if isinstance(node, ast.ClassDef):
            parts += [keyword for call in node.decorator_list if isinstance(call, ast.Call) for keyword in call.keywords]
        for part in filter(None, parts):
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)

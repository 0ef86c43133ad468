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
    "packing": (
        "data/packing.py",
        """test_packing.py test_eval_sets.py test_prepare.py::test_a_run_takes_prepared_sets
        test_conversations.py::test_rows_hold_every_conversation_once""",
    ),
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
        test_modules.py::test_bias_update_is_alike
        test_modules.py::test_weights_as_small_as_the_reference_adds_are_normalised_as_it_does
        test_forms.py::test_room_is_given_in_the_order_of_tokens_and_by_sequence
        test_forms.py::test_a_token_without_any_room_is_served_by_nothing_and_has_no_gradient
        test_modules.py::test_module[router-float64] test_modules.py::test_variants test_forms.py::test_routers
        test_variants.py::test_jax_is_its_sibling""",
    ),
    "loss": (
        "training/loss.py",
        """test_training.py::test_cross_entropy_and_its_gradients
        test_training.py::test_training_loss_by_its_parts
        test_document_masks.py::test_losses_are_those_of_the_documents_one_by_one
        test_document_masks.py::test_targets_count_the_same_on_a_mesh
        test_training.py::test_twenty_steps_in_lockstep test_adapters.py::test_both_siblings_learn_the_same
        test_training.py::test_growing_batches_by_one_program_are_whole_batches""",
    ),
    "optimizer": (
        "training/optimizer.py",
        """test_training.py::test_matrices_decay test_training.py::test_adamw_is_the_same
        test_training.py::test_the_clip_is_exact_and_leaves_short_gradients_alone
        test_muon.py::test_both_siblings_choose_the_same_parameters
        test_muon.py::test_every_head_and_every_expert_is_moved_as_a_matrix_of_its_own_by_torchs_muon
        test_initial.py::test_only_what_is_named_learns""",
    ),
    "evaluation": (
        "training/evaluation.py",
        """test_document_masks.py::test_bytes_of_documents
        test_document_masks.py::test_losses_are_those_of_the_documents_one_by_one
        test_scoring.py::test_every_device_of_a_mesh_evaluates_its_own_sequences
        test_scoring.py::test_bits_per_byte_of_a_run_are_exactly_those_of_its_targets""",
    ),
    "attention": (
        "model/attention.py",
        """test_modules.py::test_module[attention-float64] test_modules.py::test_variants
        test_modules.py::test_largest_scores_are_made_where_they_are_asked_for test_by_head.py
        test_modules.py::test_decoding_over_the_cache_equals_attention_over_the_whole_sequence
        test_variants.py::test_jax_is_its_sibling test_context.py::test_five_steps_are_those_of_one_device""",
    ),
    "causal_attention": (
        "model/causal_attention.py",
        """test_attention.py::test_unusable_choices_are_named test_attention.py::test_auto_is_the_best_that_has_the_type
        test_attention.py::test_whole_sequences[reference-300]
        test_attention.py::test_documents[reference-float64] test_attention.py::test_documents[reference-bfloat16]
        test_attention.py::test_the_largest_scores_are_told_beside_the_same_output
        test_attention.py::test_cudnn_is_called_where_it_can_be""",
    ),
    "attention_scores": (
        "model/attention_scores.py",
        """test_attention.py::test_the_largest_scores_are_told_beside_the_same_output
        test_attention.py::test_a_large_score_is_told_where_a_token_sees_it_and_nowhere_else
        test_attention.py::test_a_large_score_is_told_of_queries_and_keys_at_any_places""",
    ),
    "blocked_attention": (
        "model/blocked_attention.py",
        """test_attention.py::test_documents[blocked-float64] test_attention.py::test_whole_sequences[blocked-1]
        test_attention.py::test_the_largest_scores_are_told_beside_the_same_output
        test_attention.py::test_a_large_score_is_told_where_a_token_sees_it_and_nowhere_else
        test_attention.py::test_documents[blocked-bfloat16]""",
    ),
    "chunked_attention": (
        "model/chunked_attention.py",
        """test_attention.py::test_documents[chunked-float64] test_attention.py::test_whole_sequences[chunked-300]
        test_attention.py::test_whole_sequences[chunked-1] test_attention.py::test_documents[chunked-bfloat16]
        test_attention.py::test_the_forward_pass_is_not_made_again
        test_attention.py::test_keys_in_two_parts_are_as_keys_together
        test_attention.py::test_chunks_need_memory_in_proportion_to_the_length""",
    ),
    "muon": (
        "training/muon.py",
        """test_muon.py::test_every_head_and_every_expert_is_moved_as_a_matrix_of_its_own_by_torchs_muon
        test_muon.py::test_both_siblings_choose_the_same_parameters
        test_muon.py::test_its_state_is_saved_and_another_optimizers_is_not_taken_for_it
        test_parallel.py::test_muon_makes_whole_matrices_orthogonal_on_any_mesh""",
    ),
    "qk_clip": (
        "training/qk_clip.py",
        "test_muon.py::test_a_head_whose_largest_score_is_above_the_limit_scores_less_by_that_factor",
    ),
    "dispatch": (
        "model/dispatch.py",
        """test_exchange.py::test_every_form_of_a_sum_over_slots
        test_exchange.py::test_a_tpu_scatters_where_there_are_fewer_rows_than_slots
        test_modules.py::test_module[experts-float64] test_modules.py::test_experts_without_any_token_and_with_all
        test_exchange.py::test_every_token_is_served[none-1-1]""",
    ),
    "parcels": ("model/parcels.py", "test_exchange.py::test_every_token_is_served"),
    "expert_rounds": (
        "model/expert_rounds.py",
        """test_exchange.py::test_experts_are_narrowed_once_and_not_in_every_round
        test_exchange.py::test_every_token_is_served[none-1-1] test_exchange.py::test_every_token_is_served
        test_exchange.py::test_in_float8_rows_travel_as_codes_and_scales""",
    ),
    "slabs": (
        "parallel/slabs.py",
        """test_slabs.py::test_made_in_slabs_if_they_are_many
        test_slabs.py::test_slabs_of_experts_that_are_themselves_cut test_slabs.py::test_no_gradient_is_ever_whole[float32]
        test_layer_loop.py::test_gradients_are_those_of_layers_one_by_one""",
    ),
    "exchange": (
        "parallel/exchange.py",
        """test_exchange.py::test_devices_of_a_token test_exchange.py::test_groups_of_one_are_one_hop
        test_exchange.py::test_rows_arrive_and_come_back
        test_exchange.py::test_rows_that_stay_have_the_gradients_of_rows_that_travel
        test_exchange.py::test_every_token_is_served
        test_exchange.py::test_in_float8_rows_travel_as_codes_and_scales""",
    ),
    "fp8": (
        "precision/fp8.py",
        """test_fp8.py::test_require_fp8 test_fp8.py::test_blocks_are_128_by_128_with_ragged_edges
        test_fp8.py::test_codes_are_those_of_the_formula test_fp8.py::test_quantisers_agree_bit_for_bit
        test_fp8_matmul.py::test_types_and_leading_axes""",
    ),
    "fp8_operands": (
        "precision/fp8_operands.py",
        """test_fp8_matmul.py::test_types_and_leading_axes test_fp8_matmul.py::test_one_input_of_two_weights
        test_fp8_matmul.py::test_in_the_model_gradients_of_weights_come_in_the_type_of_activations
        test_fp8_matmul.py::test_kept_for_the_backward_pass_is_fp8 test_fp8_matmul.py::test_kernels_quantise_for_kernels
        test_fp8_matmul.py::test_grouped_matmul_of_two_weights
        test_exchange.py::test_in_float8_rows_travel_as_codes_and_scales""",
    ),
    "fp8_matmul": (
        "precision/fp8_matmul.py",
        """test_fp8_matmul.py::test_types_and_leading_axes test_fp8_matmul.py::test_small_gradients_keep_their_digits
        test_fp8_matmul.py::test_kept_for_the_backward_pass_is_fp8 test_fp8_matmul.py::test_matmul_and_gradients
        test_fp8_matmul.py::test_one_input_of_two_weights test_fp8_matmul.py::test_nan_and_infinity_reach_the_output
        test_fp8_matmul.py::test_partial_products_never_exist_together""",
    ),
    "fp8_grouped_matmul": (
        "precision/fp8_grouped_matmul.py",
        """test_fp8_matmul.py::test_under_x64 test_fp8_matmul.py::test_without_rows_everything_is_zero
        test_fp8_matmul.py::test_grouped_matmul_of_two_weights test_fp8_matmul.py::test_grouped_matmul_is_one_matmul_an_expert
        test_fp8_matmul.py::test_partial_products_never_exist_together""",
    ),
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

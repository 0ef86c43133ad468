"""What kernels in a compiled program are called and what work they count as, ours and MaxText's."""

import pytest

from deepseek_jax.planning.costs import Costs
from deepseek_jax.planning.kernels import kernel_name, kernel_work
from deepseek_jax.planning.machines import KERNEL_SHARE, MACHINES
from deepseek_jax.planning.program import Array, Instruction, Program

LAYER = "jit(train_step)/transpose(jvp(Transformer))/NNXDecoder/while/body/checkpoint/DeepSeekMoELayer"
CALL = f"""ENTRY %m (a: bf16[64,16]) -> bf16[64,8] {{
  %a = bf16[64,16]{{1,0}} parameter(0)
  %b = bf16[4,16,8]{{2,1,0}} parameter(1)
  ROOT %shard_map.12 = bf16[64,8]{{1,0}} custom-call(%a, %b), custom_call_target="tpu_custom_call", \
frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"tiling\\": {{\\"tile_m\\": 512}}}}"
}}}}, metadata={{op_name="{LAYER}/RoutedAndSharedMoE/RoutedMoE/shard_map/gmm/pallas_call/pallas_call"}}, \
backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"16384","transcendentals":"0"}}}}}}
}}
"""


def test_a_kernel_that_tells_of_itself():
    """JAX 0.11 writes what a kernel says of itself over three lines; the name is that around the call."""
    program, machine = Program(CALL), MACHINES["v5p"]
    instruction = program.computations["m"][-1]
    assert kernel_name(instruction) == "gmm"
    cost = Costs(program, machine, even_rows=32).of(instruction, program.operands(instruction))
    moved = 2 * (64 * 16 + 4 * 16 * 8 + 64 * 8)
    assert cost.flops == 16384 // 2
    assert cost.seconds == pytest.approx(
        max(cost.flops / (KERNEL_SHARE * machine.bf16_flops), moved / machine.memory_bandwidth)
    )


@pytest.mark.parametrize(
    "path, name",
    [
        ("jit(train_step)/moe_layers/mlp/experts/jit(tgmm)/pallas_call", "tgmm"),
        ("vmap(sparsity)/splash_mha_fwd_residuals/splash_mha_fwd_residuals/pallas_call", "splash_mha_fwd_residuals"),
        ("jit(train_step)/experts/grouped_matmul_fp8/mpmd_map", "grouped_matmul_fp8"),
        ("", "closed_call"),
    ],
)  # fmt: skip
def test_names(path, name):
    rest = f', custom_call_target="tpu_custom_call", metadata={{op_name="{path}"}}'
    assert kernel_name(Instruction("closed_call.7", "custom-call", (), (), rest)) == name


@pytest.mark.parametrize(
    "name, in_parts, widths",
    [
        ("splash_mha_fwd_residuals", False, 192 + 128),
        ("splash_mha_dkv_no_residuals", True, 3 * 192 + 2 * 128),  # scores, dK, dQ; dP, dV
        ("splash_mha_dkv_no_residuals", False, 2 * 192 + 2 * 128),
        ("splash_mha_dq_no_residuals", False, 2 * 192 + 128),  # scores, dQ; dP
    ],
)
def test_attention(name, in_parts, widths):
    """Two operations for each number of half the pairs; backward as one kernel or as two that both make scores."""
    q, v = Array("bf16", (2, 64, 192)), Array("bf16", (2, 64, 128))
    results = (Array("bf16", (4, 2, 64, 192)),) * in_parts + (q, v)
    kernel = Instruction(name, "custom-call", results, (), "")
    assert kernel_work(name, kernel, (Array("s8", (1, 2, 2)), q, q, v), None).flops == 2 * 64 * 64 * widths


@pytest.mark.parametrize(
    "name, widths", [("__cudnn$fmhaSoftmax", 192 + 128), ("__cudnn$fmhaSoftmaxBackward", 3 * 192 + 2 * 128)]
)
def test_attention_of_cudnn(name, widths):
    """Whose arrays have tokens before heads."""
    q, v = Array("bf16", (2, 64, 3, 192)), Array("bf16", (2, 64, 3, 128))
    kernel = Instruction(name, "custom-call", (v,), (), "")
    assert kernel_work(name, kernel, (q, q, v), None).flops == 2 * 3 * 64 * 64 * widths

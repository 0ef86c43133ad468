"""The reader of compiled programs, on a program whose times are known, and plans of this machine's own devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.planning.buffers import fullest_moment
from deepseek_jax.planning.collectives import Collective, collectives, describe
from deepseek_jax.planning.costs import Costs
from deepseek_jax.planning.depth import fewer_layers, fullest_at_depth
from deepseek_jax.planning.in_flight import InFlight, Transfer
from deepseek_jax.planning.kernels import kernel_name, kernel_work
from deepseek_jax.planning.layout import temporary_bytes
from deepseek_jax.planning.links import Links
from deepseek_jax.planning.machines import KERNEL_SHARE, MACHINES
from deepseek_jax.planning.parts import is_overflow, part_of
from deepseek_jax.planning.products import product_flops
from deepseek_jax.planning.program import Array, Instruction, Program, visits
from deepseek_jax.planning.schedule import play
from deepseek_jax.planning.topologies import read_topology
from parity_tests.programs import ALL, CALLED, CYCLES, FUSED, PROGRAM, STACKS


def test_temporaries_as_a_compiler_for_tpus_lays_them_out(tmp_path):
    """Of the memory that all share; without a report there is nothing to tell."""
    assert temporary_bytes(str(tmp_path)) is None
    (tmp_path / "module_0006.jit_train_step.after_optimizations-buffer-assignment.txt").write_text(
        "BufferAssignment:\n"
        "allocation 9: size 3758096384, parameter 50, shape |f32[2,32,7168,2048]| at ShapeIndex {}, maybe-live-out:\n"
        " value: <1 fusion @0> (size=8,offset=0): f32[2]\n"
        "allocation 991: size 43494375744, preallocated-temp:\n"
        "allocation 992: size 50196992, color 1, preallocated-temp:\n"
    )
    assert temporary_bytes(str(tmp_path)) == 43494375744
    (tmp_path / "newer-buffer-assignment.txt").write_text("allocation 7: size 50000000000, page 0, preallocated-temp:\n")
    assert temporary_bytes(str(tmp_path)) == 50000000000


def test_collectives_within_fusions():
    """As TPUs have them: one that runs beside the fusions that keep it going, and one of which a part is kept."""
    timeline, clock = played({"all-gather": 450, "reduce-scatter": 90}, FUSED)
    gather, scatter = [entry for entry in timeline.entries if entry.collective]
    product, other = [entry for entry in timeline.entries if not entry.collective]
    moved = (8 + 64) * 128 * 4  # where the compiler's estimate went beyond all bounds, the bytes count
    assert other.seconds == pytest.approx(moved / MACHINES["v5p"].memory_bandwidth)
    beside = product.seconds + other.seconds
    assert (product.seconds * clock, gather.hidden) == pytest.approx((300, beside))
    assert gather.seconds * clock == pytest.approx(450 - beside * clock)
    assert (scatter.seconds * clock, scatter.collective.kind) == (pytest.approx(90), "reduce-scatter")
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    assert [one.kind for one in collectives(FUSED, mesh)] == ["all-gather", "reduce-scatter"]


def test_collectives_of_a_core_beside():
    """As v6e and tpu7x have them, in calls of their sparse cores."""
    timeline, clock = played({"all-gather": 450}, CALLED)
    (gather,) = [entry for entry in timeline.entries if entry.collective]
    assert (gather.seconds * clock, gather.hidden * clock) == pytest.approx((150, 300))
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    assert [one.kind for one in collectives(CALLED, mesh)] == ["all-gather"]


def test_transfers_share_the_links_of_their_devices():
    """A short one beside a long one takes twice its time, and holds it up by its own; another group's minds neither."""
    long, short, other = (Collective("all-gather", (), group, (), 1, 0, "") for group in ((0, 1), (0, 1), (0, 2)))
    under_way = InFlight()
    for name, one, seconds in (("long", long, 6.0), ("short", short, 1.0), ("other", other, 4.0)):
        under_way.start(name, one, seconds)
    under_way.work(1.0)
    assert under_way.wait("short") == (Transfer(short, 0.0, hidden=0.5), 1.0)
    under_way.work(2.0)
    assert under_way.wait("long") == (Transfer(long, 0.0, hidden=2.5), 3.0)
    assert under_way.wait("other") == (Transfer(other, 0.0, hidden=3.0), 0.0)


def played(link_cycles, text=PROGRAM):
    program, machine = Program(text), MACHINES["v5p"]
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    seconds = {kind: cycles / machine.clock for kind, cycles in link_cycles.items()}
    return play(
        program,
        Costs(program, machine).of,
        lambda instruction, operands, times: describe(instruction, operands, mesh, times),
        lambda collective: seconds[collective.kind],
    ), machine.clock


def test_time_of_a_known_program():
    """Nested loops, a call, a conditional, a loop of unknown length, a collective under other work and one in its way."""
    timeline, clock = played({"all-gather": 450, "all-reduce": 90})
    assert timeline.seconds * clock == pytest.approx(CYCLES + (450 - 400) + 90)
    assert len(timeline.open_loops) == 1
    gather, reduce = [entry for entry in timeline.entries if entry.collective]
    assert (gather.seconds * clock, gather.hidden * clock) == pytest.approx((50, 400))
    assert (reduce.seconds * clock, reduce.hidden) == pytest.approx((90, 0))


def test_parts_add_up_to_the_whole():
    timeline, clock = played({"all-gather": 10, "all-reduce": 0})
    assert sum(entry.seconds for entry in timeline.entries) == pytest.approx(timeline.seconds)
    cycles = {}
    for entry in timeline.entries:
        if not entry.collective:
            cycles[entry.part] = cycles.get(entry.part, 0) + round(entry.seconds * clock)
    assert cycles == {
        ("experts", "forward"): 15000, ("attention", "backward"): 600, ("router", "forward"): 30,
        ("shared_experts", "forward"): 400, ("head", "forward"): 7, ("optimizer", "forward"): 50,
    }  # fmt: skip


def test_fullest_moment_of_a_known_program():
    """While `beside` is made, what was gathered from is alive, and what it is gathered into."""
    found = fullest_moment(Program(PROGRAM))
    piece = 8 * 128 * 4
    assert found.bytes == 8 * piece + piece  # gathered, and its source; `beside` and `y` lie in the argument's place
    assert (found.buffers[0].array, found.buffers[0].bytes) == ("f32[64,128]", 8 * piece)


def test_fewer_layers_make_stacks_one_shorter():
    config = load_config("large_671b", ["parallel.pipe=4", "parallel.pipe_interleave=2", "parallel.data=1"])
    assert [each.model.num_hidden_layers for each in fewer_layers(config, 27)] == [19, 27]
    with pytest.raises(ConfigError, match=r"--layers 20: .* must be from 19 to 59 in steps of 8"):
        fewer_layers(config, 20)


def test_a_few_layers_peak_elsewhere_than_many():
    """Two layers need the most where nine rows are made; forty where a stack is added to another, in its place."""
    piece = 8 * 128 * 4
    fewer, more = (Program(STACKS.format().replace("L", str(layers))) for layers in (1, 2))
    assert fullest_moment(more).bytes == (9 + 1) * piece
    found = fullest_at_depth(fewer, more, 2, 38)
    assert found.bytes == (40 + 1 + 40 + 2 + 1) * piece  # what the loop carries, and `made`, `twice`, `y`
    assert [buffer.array for buffer in found.buffers[:2]] == ["f32[40,8,128]"] * 2
    assert found.buffers[2].array == "f32[2,8,128]"  # no stack: it is the same with one layer


@pytest.mark.parametrize(
    "path, part",
    [
        ("jit(train_step)/shard_map/jvp(DeepseekV3)/DeepseekV3._layers/while/body/closed_call/moe_layers/mlp/gate/top_k",
         ("router", "forward")),
        ("jit(train_step)/shard_map/transpose(jvp(DeepseekV3))/while/body/closed_call/checkpoint/rematted_computation/"
         "mtp_layers/block/mlp/experts/jit(gmm)/pallas_call", ("experts", "again")),
        ("jit(train_step)/shard_map/transpose(jvp(DeepseekV3))/while/body/closed_call/checkpoint/moe_layers/self_attn/"
         "self_attn._project/q_a_layernorm/mul", ("norms", "backward")),
        ("jit(train_step)/shard_map/jvp(DeepseekV3)/DeepseekV3._layers/while/body/jit(dynamic_index_in_dim)/squeeze",
         ("layers", "forward")),
        ("jit(train_step)/shard_map/jvp(head)/while/body/closed_call/dot_general", ("head", "forward")),
        ("jit(train_step)/optimizer/mul", ("optimizer", "forward")),
        ("jit(train_step)/shard_map/dense_layers/mlp/dot_general", ("dense", "forward")),
        ("", ("other", "forward")),
        ("jit(train_step)/jvp(Transformer)/NNXDecoder/while/body/eval_jaxpr/DeepSeekMoELayer/RoutedAndSharedMoE/MlpBlock/"
         "DenseGeneral/dot_general", ("shared_experts", "forward")),
        ("vmap(static_sparsity_splash)/jit(_splash_attention)/splash_mha_fwd_residuals/pallas_call", ("attention", "forward")),
    ],
)  # fmt: skip
def test_part_of(path, part):
    assert part_of(path) == part


def test_is_overflow():
    """Also of a hop within a hop, whose scope JAX wraps."""
    assert is_overflow("jit(f)/mlp/experts/overflow/while/body") and is_overflow("experts/jvp(overflow)/while")
    assert not is_overflow("jit(f)/mlp/experts/no_overflow/while")


def flops(text):
    return sum(visit.times * product_flops(visit.instruction, visit.operands) for visit in visits(text))


def test_flops_of_products():
    x, w = jnp.ones((4, 6, 8)), jnp.ones((4, 8, 10))
    text = jax.jit(lambda x, w: jnp.einsum("bij,bjk->bik", x, w)).lower(x, w).compile().as_text()
    assert flops(text) == 2 * 4 * 6 * 8 * 10


@pytest.mark.parametrize(
    "line, left, right, expected",
    [
        # Two further contracted positions beside the features; padding on both sides meets nothing.
        ("bf16[2,32,3,20]{1,3,2,0} convolution(%a, %b), window={size=1x3 pad=0_0x2_2 rhs_reversal=0x1}, "
         "dim_labels=0bf1_1oi0->0b1f", (2, 32, 66, 1), (3, 20, 66, 2), None),
        # A batch of 2 x 3 products [8, 10] x [10, 32], as the TPU's compiler writes it.
        ("f32[2,3,8,32]{3,2,1,0} convolution(%a, %b), window={size=2x3 stride=1x2 lhs_dilate=2x3}, "
         "dim_labels=01bf_01oi->01bf", (2, 3, 8, 10), (2, 3, 32, 10), 2 * 2 * 3 * 8 * 10 * 32),
        ("bf16[64,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", (64, 48), (48, 32), 2 * 64 * 48 * 32),
    ],
)  # fmt: skip
def test_flops_of_a_tpus_convolutions(line, left, right, expected):
    (instruction,) = Program(f"ENTRY %m (a: f32[]) -> f32[] {{\n  %c = {line}\n}}\n").computations["m"]
    found = product_flops(instruction, (Array("f32", left), Array("f32", right)))
    if expected is None:  # by hand: each of 3 outputs meets the one place of 1 that lies within the window of 3
        expected = 2 * (32 * 20 * 66) * 2 * 3
    assert found == expected


def test_even_rows_of_a_kernel():
    """A grouped product with room for more rows than come under even routing works on those that come."""
    rest = ', custom_call_target="tpu_custom_call", "cost_estimate":{"flops":"1000","transcendentals":"0"}'
    gmm = Instruction("gmm.1", "custom-call", (Array("bf16", (100, 8)),), (), rest)
    operands = (Array("bf16", (100, 16)), Array("bf16", (4, 16, 8)))
    assert kernel_work("gmm", gmm, operands, None).flops == 1000
    assert kernel_work("gmm", gmm, operands, 80).flops == 800
    assert kernel_work("gmm", gmm, operands, 200).flops == 1000
    assert kernel_work("shard_map", gmm, operands, 80).flops == 1000
    with_offsets = (Array("s32", (5,)), *operands)  # of four groups: what is called by no name of its own is known by them
    assert kernel_work("shard_map", gmm, with_offsets, 80).flops == 800


def test_work_of_our_grouped_kernels():
    """From shapes alone: two pairs of rows and weights, and a gradient of weights."""
    rows, weights = Array("bf16", (100, 16)), Array("bf16", (4, 16, 8))
    rest = ', custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/experts/grouped_matmul/pallas_call"}'
    product = Instruction("pallas_call.1", "custom-call", (Array("bf16", (100, 8)),), (), rest)
    assert kernel_name(product) == "grouped_matmul"
    table = Array("s32", (9,))
    assert kernel_work("grouped_matmul", product, (table, rows, rows, weights, weights), None).flops == 2 * 2 * 100 * 16 * 8
    assert kernel_work("grouped_matmul", product, (table, rows, weights), 50).flops == 2 * 50 * 16 * 8
    gradient = Instruction("pallas_call.2", "custom-call", (weights,), (), rest)
    dy = Array("bf16", (100, 8))
    assert kernel_work("grouped_matmul_of_rows", gradient, (table, rows, dy), 100).flops == 2 * 100 * 16 * 8


def test_work_of_our_float8_kernels():
    """Scales are no operands of a product; tiles of 128 rows count as their rows."""
    rest = ', custom_call_target="__gpu$xla.gpu.triton"'
    rows, weights = (Array("f8e4m3fn", shape) for shape in ((1000, 256), (4, 512, 256)))
    scales = Array("f32", (1000, 2)), Array("f32", (4, 4, 2))
    product = Instruction("pallas_call.1", "custom-call", (Array("bf16", (1000, 512)),), (), rest)
    for even, counted in ((None, 1000), (800, 800)):
        assert kernel_work("grouped_matmul_fp8", product, (rows, scales[0], weights, scales[1]), even).flops == (
            2 * counted * 512 * 256
        )
    tiles = Array("f8e4m3fn", (9, 256, 128)), Array("f32", (9, 256)), Array("f8e4m3fn", (9, 512, 128)), Array("f32", (9, 512))
    gradient = Instruction("pallas_call.2", "custom-call", (Array("f32", (4, 256, 512)),), (), rest)
    for even, counted in ((None, 9 * 128), (800, 800)):
        assert kernel_work("grouped_matmul_of_rows_fp8", gradient, tiles, even).flops == 2 * counted * 256 * 512


def test_links():
    """The whole of an array of n bytes gathered over 8 GPUs of one host, and over two hosts of 4."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    machine = MACHINES["h100"]
    gather = describe(*instruction_and_operands("all-gather"), mesh)
    assert gather.sent == 8 * 1000 * 7 // 8
    assert Links(mesh, machine, 8).seconds(gather) == pytest.approx(7000 / machine.link_bandwidth / 0.8)
    assert Links(mesh, machine, 4).seconds(gather) == pytest.approx(7000 / machine.network_bandwidth / 0.8)
    within = describe(*instruction_and_operands("all-gather", "{{0,1,2,3},{4,5,6,7}}"), mesh)
    assert Links(mesh, machine, 4).seconds(within) == pytest.approx(6000 / machine.link_bandwidth / 0.8)


def instruction_and_operands(kind, groups=ALL):
    text = (
        "ENTRY %m (a: s8[1000]) -> s8[8000] {\n  %a = s8[1000]{0} parameter(0)\n"
        f"  ROOT %g = s8[8000]{{0}} {kind}(%a), replica_groups={groups}, dimensions={{0}}\n}}\n"
    )
    program = Program(text)
    instruction = program.computations["m"][-1]
    return instruction, program.operands(instruction)


def test_time_of_a_gpus_product():
    """Counted anew for the tensor cores; the least of the models, `sol` aside."""
    machine = MACHINES["h100"]
    models = (
        '{"exec_time_us":100.0,"compute_time_us":90.0,"memory_access_time_us":4.0,"name":""},'
        '{"exec_time_us":1,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}'
    )
    text = (
        "ENTRY %m (a: f32[4096,4096]) -> f32[4096,4096] {\n  %a = f32[4096,4096]{1,0} parameter(0)\n"
        "  ROOT %d = f32[4096,4096]{1,0} dot(%a, %a), "
        f'lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, backend_config={{"reification_cost":[{models}]}}\n}}\n'
    )
    program = Program(text)
    instruction = program.computations["m"][-1]
    cost = Costs(program, machine).of(instruction, program.operands(instruction))
    assert cost.flops == 2 * 4096**3
    on_tensor_cores = 1e6 * cost.flops / (KERNEL_SHARE * machine.bf16_flops)
    assert on_tensor_cores > 4 and cost.seconds * 1e6 == pytest.approx(100 - 90 + on_tensor_cores)


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:2x2", "h100:1x2x3", "cpu:0", "h100:x8"])
def test_unknown_topologies(name):
    with pytest.raises(ConfigError, match=r"known are v5e:4x4") as told:
        read_topology(name)
    assert "\n" not in str(told.value)


def test_topologies_count_devices():
    sizes = {"v5p:8x8x8": 512, "tpu7x:2x2x2": 16, "h100:8": 8, "h100:32x8": 256, "cpu:8": 8}
    assert {name: read_topology(name).devices for name in sizes} == sizes


def test_pairs_by_brute_force():
    """Counting what a window meets, against numpy."""
    from deepseek_jax.planning.products import _pairs

    rng = np.random.default_rng(0)
    for _ in range(20):
        size, stride, low, holes, steps, places = (int(n) for n in rng.integers(1, 4, 6))
        spread = np.zeros((places - 1) * holes + 1, bool)
        spread[::holes] = True
        padded = np.concatenate([np.zeros(low, bool), spread, np.zeros(40, bool)])
        outputs = int(rng.integers(1, 6))
        met = sum(padded[o * stride + k * steps] for o in range(outputs) for k in range(size))
        assert _pairs(size, stride, low, holes, steps, places, outputs) == met


def test_accumulation_parts_leave_one_sequence():
    from deepseek_jax.planning.run import accumulated

    config = load_config("tiny", ["train.batch_size=24", "train.batch_size_start=null", "parallel.data=4"])
    assert accumulated(config).train.gradient_accumulation_steps == 6
    named = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_accumulation_steps=2))
    assert accumulated(named) == named

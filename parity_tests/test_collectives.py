"""What the devices of a mesh hold and send each other, read from the compiled step: bytes, exactly."""

import math
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import load_config
from deepseek_jax.parallel.sharding import bytes_per_device
from deepseek_jax.planning.collectives import collectives, table, total
from deepseek_jax.planning.program import visits
from deepseek_jax.training.ahead import compile_step

# Every array can be cut in eight, and no two axes that matter are equally long.
SIZES = dict(vocab_size=1048, hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
             q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, v_head_dim=16, moe_intermediate_size=56,
             n_shared_experts=2)  # fmt: skip
LAYERS, HIDDEN, VOCAB, EXPERTS, CHOICES, WIDTH = 2, 64, 1048, 8, 3, 56  # layers: those with experts
SEQUENCES, LENGTH, DEVICES = 16, 40, 8
LATENTS = 16 + 8  # kv_lora_rank + qk_rope_head_dim
TOKENS = SEQUENCES * LENGTH // DEVICES
"""On each device."""
MESHES = {"data": dict(data=8), "fsdp": dict(fsdp=8), "expert": dict(expert=8), "mixed": dict(pipe=2, data=2, expert=2),
          "context": dict(data=2, context=4)}  # fmt: skip
EACH = [pytest.param(name, marks=[pytest.mark.slow] if name == "data" else []) for name in MESHES]
"""`data` alone is slow: `mixed` has that axis, too."""
FLOAT = 4


class Step:
    """The compiled step on one of MESHES."""

    def __init__(self, name):
        axes = MESHES[name]
        self.mtp = int(name == "expert")  # for one mesh: it takes a third of the time to compile
        layers = {"num_hidden_layers": LAYERS, "first_k_dense_replace": 0} if name == "context" else {}
        fields = {"model": SIZES | {"grouped_matmul": "reference", "num_nextn_predict_layers": self.mtp} | layers,
                  "train": {"batch_size": SEQUENCES, "sequence_length": LENGTH, "loss_chunk_tokens": 16},
                  "parallel": {"data": 1} | axes}  # fmt: skip
        overrides = [f"{section}.{key}={value}" for section, values in fields.items() for key, value in values.items()]
        compiled, self.division, self.state = compile_step(load_config("tiny", overrides), jax.devices()[:DEVICES])
        self.mesh = self.division.mesh
        self.axes = self.mesh.shape
        self.text = compiled.as_text()
        self.argument_bytes = compiled.memory_analysis().argument_size_in_bytes
        self.shardings = compiled.input_shardings[0]
        self.collectives = collectives(self.text, self.mesh)

    def over(self, kind, axis):
        return [one for one in self.collectives if one.kind == kind and axis in one.axes]

    def parameter_bytes(self):
        """Of the routed experts, and of all else."""
        sizes = [(any(key.key == "experts" for key in path), leaf.size * leaf.dtype.itemsize)
                 for path, leaf in jax.tree_util.tree_leaves_with_path(self.state.params)]  # fmt: skip
        return sum(size for routed, size in sizes if routed), sum(size for routed, size in sizes if not routed)


step = cache(Step)


def whole_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", EACH)
def test_a_device_holds_its_part_of_parameters_and_moments(name):
    """1/N to the byte, by the program's own arguments; only the routers' biases and the step counter are on all."""
    this = step(name)
    state, _, _ = this.shardings
    held = jax.tree.map(lambda leaf, place: bytes_per_device([leaf], [place]), this.state, state)
    counter, words = FLOAT, SEQUENCES * (LENGTH + 1 + this.mtp) * 4
    assert sum(jax.tree.leaves(held.params)) == whole_bytes(this.state.params) // DEVICES
    assert sum(jax.tree.leaves(held.optimizer)) == 2 * whole_bytes(this.state.params) // DEVICES + counter
    assert whole_bytes(this.state.optimizer) == 2 * whole_bytes(this.state.params) + counter
    arguments = [array for visit in visits(this.text) if visit.instruction.opcode == "parameter" and visit.depth == 0
                 for array in visit.instruction.results]  # fmt: skip
    held_bytes = sum(jax.tree.leaves(held)) + words // (DEVICES // this.axes["context"]) + 3 * FLOAT
    assert sum(array.bytes for array in arguments) == this.argument_bytes == held_bytes


@pytest.mark.parametrize("name", EACH)
def test_gradients_are_summed_into_parts(name):
    """What is summed over an axis is all that the axes before it have left, and a device keeps only its part: with the
    last of them 1/N. The experts' gradients need no sum over `expert`: the tokens were there. Nothing but statistics
    is summed whole."""
    this = step(name)
    experts, others = this.parameter_bytes()
    pipe, data, fsdp, context, expert = this.axes.values()
    scattered = {axis: total(this.over("reduce-scatter", axis), lambda one: one.bytes) for axis in this.axes}
    by_layer = fsdp * context  # one of them is 1
    assert scattered["data"] == (experts // expert + others) // (pipe * by_layer) * (data > 1)
    vectors_for_embedding = (TOKENS * by_layer - VOCAB) * HIDDEN * FLOAT  # tokens' vectors travel, not the table's rows
    in_layers = (experts // expert + others) // pipe + vectors_for_embedding
    assert scattered["fsdp"] == in_layers * (fsdp > 1)
    of_latents = LAYERS * SEQUENCES // data * LENGTH * LATENTS * FLOAT
    assert scattered["context"] == (in_layers + of_latents) * (context > 1)
    assert scattered["expert"] == others // (pipe * fsdp * data) * (expert > 1)
    if pipe == 1:
        left = (experts // expert + others) // (data * fsdp * context)
        assert left - scattered["expert"] * (expert - 1) // expert == (experts + others) // DEVICES
    summed = [one for one in this.collectives if one.kind == "all-reduce"]
    rows = max(LAYERS + this.mtp, (SEQUENCES // data) * (context > 1))  # along `context` every sequence has counts of its own
    assert summed and max(array.bytes for one in summed for array in one.arrays) <= rows * EXPERTS * FLOAT


@pytest.mark.parametrize("name", ["expert", "mixed"])
def test_expert_weights_stay(name):
    """Over `expert` the other parameters are gathered, once, and how many rows each device sends: not a byte more."""
    this = step(name)
    _, others = this.parameter_bytes()
    gathered = this.over("all-gather", "expert")
    counts = [one for one in gathered if one.arrays[0].dtype == "s32"]
    assert {one.arrays[0].shape for one in counts} == {(this.axes["expert"], this.axes["expert"], 2)}
    weights = [one for one in gathered if one not in counts]
    others_left = others // (this.axes["pipe"] * this.axes["data"])
    assert total(weights, lambda one: one.bytes) == others_left
    assert not expert_weights(gathered)


def expert_weights(found):
    """Collectives that make an expert's weight matrix, of so many experts as one device does not have."""
    matrices = [(one, array.shape) for one in found for array in one.arrays if sorted(array.shape[-2:]) == [WIDTH, HIDDEN]]
    return [one for one, shape in matrices if len(shape) >= 3 and shape[-3] > EXPERTS // one.devices]


def test_gathered_expert_weights_would_be_found():
    mesh = jax.make_mesh((2, 4), ("pipe", "expert"), axis_types=(AxisType.Auto,) * 2)
    cut = PartitionSpec(None, "expert")
    weight = jax.ShapeDtypeStruct((LAYERS, EXPERTS, HIDDEN, WIDTH), "float32", sharding=NamedSharding(mesh, cut))
    breach = jax.shard_map(lambda w: jax.lax.all_gather(w, "expert", axis=1, tiled=True).sum(axis=1),
                           mesh=mesh, in_specs=cut, out_specs=PartitionSpec(), check_vma=False)  # fmt: skip
    found = collectives(jax.jit(breach).lower(weight).compile().as_text(), mesh)
    assert [one.axes for one in expert_weights(found)] == [("expert",)]
    assert total(found) == LAYERS * EXPERTS * HIDDEN * WIDTH * FLOAT * 3 // 4


def journeys(this, scope):
    """(numbers a row, rows, in which pass) of the rows that travel between experts in a first round -> executions."""

    def in_pass(op_name):
        again = "made again" if "rematted_computation" in op_name else "backward"
        return again if "transpose(" in op_name else "forward"

    executions = Counter()
    for one in this.over("all-to-all", "expert"):
        assert one.axes == ("expert",) and one.open_loops == 1 + one.overflow
        if scope in one.op_name and not one.overflow:
            widths = {array.shape[-1] for array in one.arrays}
            rows = sum(math.prod(array.shape[:-1]) for array in one.arrays)
            executions[widths.pop(), rows, in_pass(one.op_name)] += one.times
            assert not widths and {array.dtype for array in one.arrays} == {"f32"}
    return executions


def test_bytes_of_travelling_tokens():
    """For a layer and token 2 x devices of a token x hidden x bytes forward, less the 1/8 that stays, and as many backward;
    besides, numbers and factors of the experts for each row.

    All under even routing, one round. What has travelled is kept, and so is its sum, which MTP's norm needs again.
    """
    this = step("expert")
    most, labels = 3, 2  # as many devices as choices, for each has one expert: its number and its factor
    rows = TOKENS * most
    sent = {layer: [one for one in this.over("all-to-all", "expert") if ("mtp_layers" in one.op_name) == (layer == "mtp")]
            for layer in ("main", "mtp")}  # fmt: skip
    for layer, count in (("main", LAYERS), ("mtp", 1)):
        forward = [one for one in sent[layer] if "transpose(" not in one.op_name]
        hidden = [one for one in forward if one.arrays[0].shape[-1] == HIDDEN]
        besides = [one for one in forward if one not in hidden]
        assert total(hidden) * 8 == count * TOKENS * (2 * most * HIDDEN * FLOAT) * 7
        assert total(besides) * 8 == count * TOKENS * (most * labels * FLOAT) * 7
    of_layer = {(HIDDEN, rows, "forward"): 2, (HIDDEN, rows, "backward"): 2,
                (labels, rows, "forward"): 1, (labels, rows, "backward"): 1}  # fmt: skip
    assert journeys(this, "mtp_layers") == of_layer
    assert journeys(this, "") == {journey: (LAYERS + 1) * times for journey, times in of_layer.items()}


def test_latents_alone_travel_over_context():
    """Forward and backward, kv_lora_rank + qk_rope_head_dim numbers a token and layer, less the 1/C that stay; their gradients
    once. Besides, weights as over `fsdp`, and nothing is exchanged."""
    this = step("context")
    gathered = this.over("all-gather", "context")
    latents = [one for one in gathered if "self_attn" in one.op_name and "weights" not in one.op_name]
    of_sequences = SEQUENCES // this.axes["data"] * LENGTH * LATENTS * FLOAT
    assert total(latents, lambda one: one.bytes) == 2 * LAYERS * of_sequences
    assert total(latents) * 4 == 2 * LAYERS * of_sequences * 3
    assert not [one for one in this.collectives if one.kind in ("all-to-all", "collective-permute")]


def test_pipeline_passes_on_activations_alone():
    """In each of the ticks a state goes on, one arrives and one goes home, and their gradients the other way. Rows travel to
    the experts of the same stage, as often as there are ticks."""
    this = step("mixed")
    microbatches = SEQUENCES // DEVICES
    ticks = microbatches * 2 + 1
    passed = [one for one in this.collectives if one.kind == "collective-permute"]
    assert {one.axes for one in passed} == {("pipe",)}
    assert {array[:2] for one in passed for array in one.arrays} == {("f32", (1, LENGTH, HIDDEN))}
    assert sum(one.times for one in passed) == 2 * 3 * ticks
    rows, labels = LENGTH * 2, 2 * CHOICES  # to both devices at most, where all of a token's experts may be
    assert journeys(this, "_pipelined") == {
        (HIDDEN, rows, "forward"): 2 * ticks, (HIDDEN, rows, "backward"): 2 * ticks,
        (labels, rows, "forward"): ticks, (labels, rows, "backward"): ticks,
    }  # fmt: skip
    assert journeys(this, "") == journeys(this, "_pipelined")


@pytest.mark.parametrize("name", EACH)
def test_full_logits_are_nowhere(name):
    """Neither sent nor on a device: the logits of a chunk are, 16 tokens at a time."""
    this = step(name)
    assert largest_of_vocabulary(this.text) == HIDDEN * VOCAB  # the head, smaller than logits would be
    sent = max(array.bytes for one in this.collectives for array in one.arrays)
    assert sent == HIDDEN * VOCAB * FLOAT < TOKENS * VOCAB * FLOAT


def largest_of_vocabulary(text):
    """Elements of the largest array in a program of which an axis is the vocabulary."""
    arrays = [array for visit in visits(text) for array in visit.instruction.results]
    return max(math.prod(array.shape) for array in arrays if VOCAB in array.shape)


def test_full_logits_would_be_found():
    hidden, head = jnp.ones((TOKENS, HIDDEN)), jnp.ones((HIDDEN, VOCAB))
    program = jax.jit(lambda x, w: jax.nn.logsumexp(x @ w, axis=-1)).lower(hidden, head).compile()
    assert largest_of_vocabulary(program.as_text()) == TOKENS * VOCAB


def test_table():
    lines = table(step("mixed").collectives).splitlines()
    assert max(map(len, lines)) <= 100
    passed = next(line for line in lines if line.startswith("collective-permute"))
    assert passed.split() == ["collective-permute", "pipe", "30", "307,200", "10,240"]
    assert any(line.startswith("all-to-all") and line.endswith("a pass") for line in lines)


PROGRAM = """HloModule every_form, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %r = f32[] add(%a, %b)
}

%few (s: (s32[], f32[8,4])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %s = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

%many (t: (s32[], s32[])) -> pred[] {
  %t = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  ROOT %less.1 = pred[] compare(%i.1, %n), direction=LT
}

%inner (t.1: (s32[], s32[])) -> (s32[], s32[]) {
  %t.1 = (s32[], s32[]) parameter(0)
  %x = bf16[16,4]{1,0} constant({...})
  %exchanged = bf16[16,4]{1,0} all-to-all(%x), replica_groups=[2,4]<=[2,4], dimensions={0}, metadata={op_name="rounds"}
  ROOT %u = (s32[], s32[]) tuple(%t.1)
}

%body (s.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s.1 = (s32[], f32[8,4]) parameter(0)
  %y = f32[8,4]{1,0} get-tuple-element(%s.1), index=1
  %loop = (s32[], s32[]) while(%t.2), condition=%many, body=%inner
  ROOT %w = f32[8,4]{1,0} all-reduce(%y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
}

%wrapped (p: f32[2,4]) -> f32[8,4] {
  %p = f32[2,4]{1,0} parameter(0)
  ROOT %g = f32[8,4]{1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (q: f32[2,4], big: f32[64,4]) -> f32[8,4] {
  %q = f32[2,4]{1,0} parameter(0)
  %big = f32[64,4]{1,0} parameter(1)
  %outer = (s32[], f32[8,4]) while(%t.3), condition=%few, body=%body
  %noted = (s32[], f32[8,4]) while(%t.4), condition=%many, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %start = ((f32[2,4]), f32[8,4]) async-start(%q), calls=%wrapped
  %done = f32[8,4] async-done(%start), calls=%wrapped
  %gs = (f32[2,4], f32[8,4]) all-gather-start(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %gd = f32[8,4] all-gather-done(%gs)
  %ps = (f32[2,4], f32[2,4], u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,4},{4,0}}
  %pd = f32[2,4] collective-permute-done(%ps)
  %rs = f32[1,4] reduce-scatter(%q), replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}, to_apply=%sum
  %size = s32[4]{0} constant({...})
  %ragged = f32[64,4] ragged-all-to-all(%q, %big, %size, %size, %size, /*index=5*/%size), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %all = (f32[2,4], pred[3]) all-reduce(%q, %flags), replica_groups={}, to_apply=%sum
}
"""


def test_every_form_is_read():
    """Groups written out, as ranges and as a mesh; starts and dones; loops whose passes are noted, counted and unknown."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("pipe", "expert"))
    found = Counter((one.kind, one.axes, one.devices, one.bytes, one.sent, one.times, one.open_loops)
                    for one in collectives(PROGRAM, mesh))  # fmt: skip
    assert found == Counter({
        ("all-reduce", ("pipe",), 2, 128, 128, 3, 0): 1, ("all-to-all", ("expert",), 4, 128, 96, 3, 1): 1,
        ("all-reduce", ("pipe",), 2, 128, 128, 5, 0): 1, ("all-to-all", ("expert",), 4, 128, 96, 5, 1): 1,
        ("all-gather", ("expert",), 4, 128, 96, 1, 0): 2, ("collective-permute", ("pipe",), 2, 32, 32, 1, 0): 1,
        ("reduce-scatter", ("pipe",), 2, 32, 16, 1, 0): 1, ("ragged-all-to-all", ("expert",), 4, 32, 24, 1, 0): 1,
        ("all-reduce", ("pipe", "expert"), 8, 32, 56, 1, 0): 1,
    })  # fmt: skip


def test_what_cannot_be_read_is_said():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("pipe", "expert"))
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("module @jit_f {}", mesh)
    with pytest.raises(ValueError, match="unknown way"):
        collectives(PROGRAM.replace("[4,2]<=[2,4]T(1,0)", "?"), mesh)

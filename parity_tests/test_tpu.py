"""The step and the exchange of tokens, compiled for TPUs that are not there: by libtpu, on any host."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepseek_jax.config import load_config
from deepseek_jax.parallel.exchange import AXIS, Hop, Journey, Room, send
from deepseek_jax.planning.buffers import fullest_moment
from deepseek_jax.planning.collectives import collectives
from deepseek_jax.planning.layout import reporting, temporary_bytes
from deepseek_jax.planning.program import Program
from deepseek_jax.training.ahead import compile_step

pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")

SIZES = dict(precision="bfloat16", grouped_matmul="megablox", vocab_size=512, hidden_size=256, num_hidden_layers=3,
             intermediate_size=256, num_attention_heads=2, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=128,
             qk_rope_head_dim=64, v_head_dim=128, moe_intermediate_size=128, max_position_embeddings=128)  # fmt: skip
TRAINED = dict(batch_size=16, sequence_length=128, loss_chunk_tokens=128)


def chips(topology):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_ragged_exchange_compiles(topology):
    """There and back, and both gradients: four collectives."""
    devices, rows, width = chips(topology), 1024, 512
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    cut, hop = PartitionSpec(AXIS), Hop(len(devices), 1, 1, 1, 1, rows, Room(2 * rows, rows))

    def gradient(rows, sizes, starts):
        def loss(rows):
            journey = Journey(sizes, starts, jnp.cumsum(sizes, axis=0) - sizes)
            here = jnp.sin(send(rows, journey, hop, 2 * rows.shape[0], "ragged"))
            return jnp.sum(jnp.sin(send(here, journey.back(), hop, rows.shape[0], "ragged")))

        return jax.grad(loss)(rows)

    def argument(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    whole = PartitionSpec()
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(cut, whole, whole), out_specs=cut, check_vma=False))
    pairs = argument((len(devices),) * 2, "int32", whole)
    program = sharded.lower(argument((len(devices) * rows, width), "bfloat16", cut), pairs, pairs)
    found = collectives(program.compile().as_text(), mesh)
    exchanges = [one for one in found if one.kind == "ragged-all-to-all"]
    assert [(one.axes, one.bytes, one.times) for one in exchanges] == [((AXIS,), rows * width * 2, 1)] * 4


@pytest.mark.parametrize(
    "topology, axes, mtp, exchanges",
    [
        # 5 ticks, then MTP's module: see test_collectives.py for what a layer exchanges.
        ("v5p:2x2x2", dict(pipe=2, data=2, expert=2), 1, 5 * 6 + 6),
        ("v5e:2x4", dict(fsdp=2, expert=4), 0, 2 * 6),
    ],
)
def test_step_compiles(topology, axes, mtp, exchanges, tmp_path):
    fields = {"model": SIZES | {"num_nextn_predict_layers": mtp}, "train": TRAINED,
              "parallel": {"data": 1, "exchange": "ragged"} | axes}  # fmt: skip
    overrides = [f"{section}.{key}={value}" for section, values in fields.items() for key, value in values.items()]
    step = compile_step(load_config("tiny", overrides), chips(topology), reporting("tpu", str(tmp_path)))
    text, laid_out = step.compiled.as_text(), temporary_bytes(str(tmp_path))
    assert fullest_moment(Program(text)).bytes <= laid_out <= step.compiled.memory_analysis().temp_size_in_bytes
    assert "tpu_custom_call" in text  # megablox
    found = collectives(text, step.division.mesh)
    assert sum(one.times for one in found if one.kind == "ragged-all-to-all" and not one.overflow) == exchanges
    assert all(one.open_loops == one.overflow for one in found)
    assert not [one for one in found if one.kind == "all-to-all" and "expert" in one.axes]

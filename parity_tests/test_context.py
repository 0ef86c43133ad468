"""Sequences divided over devices: the same numbers as on one, in float64, alone and with every other axis."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import Config, ConfigError, load_config
from deepseek_jax.kernels import splash_context
from deepseek_jax.model import attention_scores, chunked_attention
from deepseek_jax.model.attention import attention_over_context, keys_and_values, latent_attention
from deepseek_jax.model.context_attention import context_attention
from deepseek_jax.parallel.mesh import make_mesh, resolve
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.training.evaluation import evaluation_nats
from deepseek_jax.training.step import init_state, init_variables
from parity_tests.emulation import emulate_splash
from parity_tests.test_parallel import Stepper, assert_same, batch, config_with

END, LENGTH = 0, 16


def config_on(masked: bool, **mesh: int) -> Config:
    """MTP of depth 2, groups, biases, accumulation, QK-clip, and if `masked` documents that end within and between pieces."""
    config = config_with(**mesh)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_hidden_layers=4),
        train=dataclasses.replace(config.train, sequence_length=LENGTH, batch_size=16),
        data=dataclasses.replace(config.data, mask_documents=masked, end_of_document=END),
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several in a piece, and a rest."""
    for module in (chunked_attention, attention_scores):
        monkeypatch.setattr(module, "CHUNK", 3)


@pytest.fixture(scope="module")
def one_device(start):
    """What one device computes, with documents apart."""
    return Stepper(config_on(True), start).run(start)


@pytest.fixture(scope="module")
def start():
    with jax.enable_x64(True):
        state = jax.device_get(jax.jit(partial(init_state, config_on(False)))())
    rng = np.random.default_rng(0)
    return state._replace(router_state=jax.tree.map(lambda b: rng.normal(-0.5, 0.1, b.shape), state.router_state))


MESHES = [
    dict(context=2), dict(context=4), dict(context=8),
    dict(context=2, fsdp=2, expert=2), dict(context=2, data=4), dict(context=4, data=2), dict(context=4, fsdp=2),
    dict(context=4, expert=2), dict(context=2, expert=4, exchange_groups=2), dict(context=2, data=2, fsdp=2),
    dict(context=2, data=2, expert=2), dict(pipe=2, context=4), dict(pipe=2, context=2, expert=2),
    dict(pipe=2, context=2, data=2), dict(pipe=2, context=2, fsdp=2, microbatch_size=2),
]  # fmt: skip
IN_CI = [dict(context=2, fsdp=2, expert=2)]


@pytest.mark.parametrize("mesh", [
    pytest.param(mesh, id="-".join(f"{axis}{size}" for axis, size in mesh.items()),
                 marks=[] if mesh in IN_CI else [pytest.mark.slow])
    for mesh in MESHES
])  # fmt: skip
def test_five_steps_are_those_of_one_device(mesh, start, one_device):
    assert_same(Stepper(config_on(True, **mesh), start).run(start), one_device)


@pytest.mark.parametrize("devices, heads_bytes", [(2, 1), (4, 2**29)])
def test_splash_over_context_is_attention_on_one_device(devices, heads_bytes, monkeypatch):
    """Output and all gradients, of heads one by one or at once, of documents that end within and between pieces."""
    emulate_splash(monkeypatch)
    monkeypatch.setattr(splash_context, "KEYS_BYTES", heads_bytes)
    config, length = dataclasses.replace(load_config("tiny").model, attention="splash"), 600
    rng = np.random.default_rng(0)
    shapes = (2, length, 3 * 20), (2, length, 16), (2, length, 8), (16, 3 * (12 + 10)), (2, length, 3, 10)
    q, c_kv, k_rope, weight, gradient = (rng.standard_normal(shape).astype("float32") for shape in shapes)
    angles = rng.uniform(0, 6, (2, length, 4)).astype("float32")
    ids = np.repeat(np.arange(4, dtype="int32"), [1, 149, 190, 260]) + np.zeros((2, 1), "int32")

    def results(attend, q, latents, weight, gradient, angles, ids):
        rope = jnp.cos(angles), jnp.sin(angles)
        out, pull = jax.vjp(lambda q, latents, weight: attend(config, q, latents, rope, weight, ids), q, latents, weight)
        return out, *pull(gradient)

    def on_devices(*arrays):
        out, of_q, of_latents, of_weight = results(attention_over_context, *arrays)
        return out, of_q, of_latents, jax.lax.psum(of_weight, "context")

    def on_one(config, q, latents, rope, weight, ids):
        config = dataclasses.replace(config, attention="reference")
        return latent_attention(config, q, latents[0] @ weight, latents[1], rope, ids)

    pieces = length // (2 * devices)
    order = np.concatenate([np.arange(n * pieces, (n + 1) * pieces) for i in range(devices) for n in (i, 2 * devices - 1 - i)])
    own, same = PartitionSpec(None, "context"), PartitionSpec()
    spread = jax.shard_map(on_devices, mesh=Mesh(np.array(jax.devices()[:devices]), ("context",)), check_vma=False,
                           in_specs=(own, own, same, own, own, own), out_specs=(own, own, own, same))  # fmt: skip
    latents, by_token = (c_kv[:, order], k_rope[:, order]), [x[:, order] for x in (gradient, angles, ids)]
    found = jax.jit(spread)(q[:, order], latents, weight, *by_token)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype("float64"), (q, (c_kv, k_rope), weight, gradient, angles))
        right = jax.jit(partial(results, on_one))(*wide, ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        b = b[:, order] if b.ndim > 2 else b
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())


@pytest.mark.slow
def test_splash_over_context_compiles_for_tpu_in_memory_linear_in_the_length(monkeypatch):
    """With DeepSeek-V3's head sizes on four chips: the kernel and both of its gradients."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    from jax.experimental import topologies

    monkeypatch.setattr(splash_context, "KEYS_BYTES", 2**26)  # some heads at a time
    mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices), ("context",))
    heads = dict(num_attention_heads=8, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512)
    config = dataclasses.replace(load_config("tiny").model, attention="splash", **heads)
    own, same = PartitionSpec(None, "context"), PartitionSpec()

    def compiled(length):
        def operand(*shape, spec=own, dtype="bfloat16"):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        def gradients(q, latents, weight, angles, ids):
            rope = jnp.cos(angles), jnp.sin(angles)
            out, pull = jax.vjp(lambda *x: attention_over_context(config, x[0], x[1], rope, x[2], ids), q, latents, weight)
            return pull(out)

        spread = jax.shard_map(gradients, mesh=mesh, in_specs=(own, own, same, own, own), out_specs=(own, own, same),
                               check_vma=False)  # fmt: skip
        latents = operand(1, length, 512), operand(1, length, 64)
        beside = operand(1, length, 32, dtype="float32"), operand(1, length, dtype="int32")
        return jax.jit(spread).lower(operand(1, length, 8 * 192), latents, operand(512, 8 * 256, spec=same), *beside).compile()

    short, long = compiled(2**15), compiled(2**16)
    assert all(f"splash_mha_{kernel}" in short.as_text() for kernel in ("fwd", "dkv", "dq"))
    assert long.memory_analysis().temp_size_in_bytes < 2.1 * short.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_evaluation_counts_every_token_once(start):
    """Nats of held-out sequences whose documents are apart, of which one is there for its length alone."""
    config = config_on(True, context=2)
    model = dataclasses.replace(config.model, num_hidden_layers=2, num_nextn_predict_layers=0)
    config = dataclasses.replace(config, model=model)
    tokens, weights = batch(config, 0)[0, :3, : LENGTH + 1], np.array([1.0, 0.0, 1.0])
    with jax.enable_x64(True):
        variables = jax.jit(partial(init_variables, model, 0))()
        params, state = variables["params"], variables["router_state"]
        division = Division(config.parallel, params, make_mesh(config.parallel, jax.devices()[:2]))
        nats = [float(jax.jit(partial(evaluation_nats, config=config, division=each))(params, state, tokens, weights))
                for each in (division, None)]  # fmt: skip
    assert nats[0] == pytest.approx(nats[1], rel=1e-12) and nats[1] > 0


@pytest.mark.slow
def test_room_is_counted_over_the_whole_sequence(start):
    """Experts that serve the first tokens of a sequence that come, wherever they are computed."""
    told = []
    for mesh in ({}, dict(context=2)):
        config = config_on(False, **mesh)
        model = dataclasses.replace(config.model, capacity_factor=1.0, mtp_form="parallel", num_hidden_layers=3)
        config = dataclasses.replace(config, model=model)
        with jax.enable_x64(True):
            state = jax.device_get(jax.jit(partial(init_state, config))())
        told.append(Stepper(config, state).run(state))
    assert 0 < told[0]["[1][0].parts.dropped"] < 1
    assert_same(told[1], told[0])


@pytest.mark.parametrize("fields, complaint", [
    (["train.sequence_length=36"], "train.sequence_length=36: must be a multiple of 8, two pieces .* nearest 32"),
    (["train.batch_size=3"], "train.batch_size=3: must be a multiple of 2, .* over parallel.context; nearest 4"),
])  # fmt: skip
def test_what_cannot_be_divided_is_one_line(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        resolve(load_config("tiny", ["parallel.data=2", "parallel.context=4", *fields]), 8)


def test_memory_is_linear_in_the_length(monkeypatch):
    """Of attention over two devices, forward and backward: twice the tokens take twice as much, not four times."""
    monkeypatch.setattr(chunked_attention, "CHUNK", 64)
    config = dataclasses.replace(load_config("tiny").model, q_lora_rank=None)
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",))
    expand, weight = partial(keys_and_values, config), jax.ShapeDtypeStruct((16, 3 * (12 + 10)), "float32")

    def temporaries(length: int) -> int:
        shapes = (1, length, 3, 20), (1, length, 16), (1, length, 8)
        q, *latents = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)

        def gradients(q, latents, weight):
            out, pull = jax.vjp(lambda *x: context_attention(expand, 0.1, *x, None), q, latents, weight)
            of_q, of_latents, of_weight = pull(out)
            return of_q, of_latents, jax.lax.psum(of_weight, "context")

        own = PartitionSpec(None, "context")
        spread = jax.shard_map(gradients, mesh=mesh, in_specs=(own, own, PartitionSpec()),
                               out_specs=(own, own, PartitionSpec()), check_vma=False)  # fmt: skip
        return jax.jit(spread).lower(q, tuple(latents), weight).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.1 * temporaries(4096)

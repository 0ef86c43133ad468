"""Training in fp8: both siblings in lockstep, what a layer keeps, a machine without float8, and moments in bfloat16."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.config import Config, ConfigError, ModelConfig, TrainConfig, load_config, to_yaml
from deepseek_jax.convert import convert
from deepseek_jax.model.block import Block
from deepseek_jax.model.rope import rope_angles
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.precision import fp8, fp8_operands
from deepseek_jax.train import train
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.loading import load_run
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.schedules import Position, plan_steps
from deepseek_jax.training.step import Scalars, TrainState, train_step
from deepseek_torch.precision import fp8 as torch_fp8
from deepseek_torch.precision import fp8_matmul as torch_fp8_matmul
from deepseek_torch.training.optimizer import make_optimizer as make_torch_optimizer
from deepseek_torch.training.step import TrainState as TorchTrainState
from deepseek_torch.training.step import train_step as torch_train_step
from parity_tests.checkpoints import random_variables
from parity_tests.modules import COMPILE_QUICKLY
from parity_tests.siblings import Siblings

# XLA would keep float32 where the siblings' code says bfloat16.
AS_WRITTEN = {**COMPILE_QUICKLY, "xla_allow_excess_precision": False}


def fp8_config() -> Config:
    """A layer of each kind and an MTP module, widths off 128 and beyond it."""
    tiny = load_config("tiny")
    model = dataclasses.replace(
        tiny.model, precision="fp8", num_hidden_layers=2, hidden_size=136, intermediate_size=160,
        moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=32, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, initializer_range=0.02, remat="none",
    )  # fmt: skip
    training = TrainConfig(steps=10, sequence_length=64, batch_size=32, learning_rate=1.2e-4, warmup_steps=4)
    return dataclasses.replace(tiny, model=model, train=training)


def batch(config: Config, seed: int) -> np.ndarray:
    """[1, B, T + 2] of so few words that their frequencies can be learnt at once."""
    words = np.random.default_rng(0).integers(0, config.model.vocab_size, 50, dtype=np.int32)
    shape = (1, config.train.batch_size, config.train.sequence_length + 2)
    return words[np.random.default_rng(seed).integers(0, 50, shape)]


@pytest.mark.slow
def test_ten_fp8_steps_in_lockstep():
    """The losses part by less than 1e-4, while the loss falls by a hundred times that.

    Sums in another order move a few codes, these move largest entries and so the codes of whole tiles: after some
    layers gradients differ by about 1% whoever computes them, and only a mean over many tokens tells how far the
    two have come.
    """
    config = fp8_config()
    pair = Siblings(config.model)
    for buffer in pair.torch.buffers():
        buffer.zero_()  # the biases start where training starts them
    params, router_state = pair.variables["params"], jax.tree.map(np.zeros_like, pair.variables["router_state"])
    in_torch = TorchTrainState(pair.torch, make_torch_optimizer(config.train, pair.torch))
    in_jax = TrainState(params, router_state, make_optimizer(config.train).init(params))
    step = jax.jit(partial(train_step, config=config), compiler_options=AS_WRITTEN)
    losses = []
    for plan in plan_steps(config.train):
        tokens = batch(config, seed=plan.step)
        scalars = Scalars(*map(jnp.float32, (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)))
        in_jax, ours = step(in_jax, tokens, scalars)
        theirs = torch_train_step(in_torch, torch.from_numpy(tokens).long(), plan, config)
        losses.append((float(ours.loss), float(theirs.loss)))
    ours, theirs = np.array(losses).T
    assert np.abs(ours / theirs - 1).max() < 1e-4
    assert ours[-1] < ours[0] - 0.08


Codes = set[tuple[tuple[int, ...], bytes, bytes]]
"""Matrices [in, out] in float8: the shape, the codes and the scales of each."""


def codes_used(config: ModelConfig, variables: dict, monkeypatch) -> Codes:
    """Every matrix that the model multiplies by in float8."""
    used: Codes = set()

    def record(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        matrices = zip(codes.reshape(-1, *codes.shape[-2:]), scales.reshape(-1, *scales.shape[-2:]))
        used.update((matrix.shape, matrix.tobytes(), its_scales.tobytes()) for matrix, its_scales in matrices)
        return codes

    def recording(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, scales = fp8.quantize_blocks(w)
        as_bytes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        # What it returns goes into the product, so that no one leaves it out.
        as_bytes = jax.pure_callback(record, as_bytes, as_bytes, scales)
        return jax.lax.bitcast_convert_type(as_bytes, codes.dtype), scales

    monkeypatch.setattr(fp8_operands, "quantize_blocks", recording)
    tokens = batch(fp8_config(), seed=0)[0, :1, :20]
    jax.block_until_ready(jax.jit(DeepseekV3(config).apply, compiler_options=COMPILE_QUICKLY)(variables, tokens))
    return used


def codes_used_by_torch(model: torch.nn.Module, monkeypatch) -> Codes:
    """The same of the sibling."""
    used: Codes = set()

    def recording(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = torch_fp8.quantize_blocks(w)
        used.add((tuple(w.shape), codes.view(torch.uint8).numpy().tobytes(), scales.numpy().tobytes()))
        return codes, scales

    monkeypatch.setattr(torch_fp8_matmul, "quantize_blocks", recording)
    with torch.no_grad():
        model(torch.from_numpy(batch(fp8_config(), seed=0)[0, :1, :20]).long())
    return used


def test_the_same_products_are_in_float8(monkeypatch):
    """By the matrices that they multiply by: those of DeepSeek's form and MTP's projection, and no others."""
    config = fp8_config().model
    pair = Siblings(config)
    ours, theirs = codes_used(config, pair.variables, monkeypatch), codes_used_by_torch(pair.torch, monkeypatch)
    assert ours == theirs
    assert len(ours) == sum(place.quantized for place in layout(config)) + config.num_nextn_predict_layers


def codes_written(directory: Path) -> Codes:
    """The same of a Hugging Face directory, whose matrices are [out, in]."""
    tensors = SafetensorsDirectory(directory)
    suffix = "_scale_inv"
    pairs = [(tensors.read(n.removesuffix(suffix)), tensors.read(n)) for n in tensors.names if n.endswith(suffix)]
    return {(codes.T.shape, codes.T.tobytes(), scales.T.tobytes()) for codes, scales in pairs}


def test_convert_writes_the_codes_and_scales_that_training_uses(tmp_path, monkeypatch):
    """To the byte, and of the same matrices: only MTP's projection, which DeepSeek's form leaves alone, is not there."""
    config = dataclasses.replace(fp8_config(), run_dir=str(tmp_path / "run"))
    variables = random_variables(config.model)
    # Off what bfloat16 holds; and some matrices under the floor of the scales.
    params = jax.tree.map(lambda w: w * np.float32(1.001), variables["params"])
    params["moe_layers"]["mlp"]["experts"]["up_proj"] *= np.float32(1e-6)
    state = TrainState(params, variables["router_state"], make_optimizer(config.train).init(params))
    checkpoints = Checkpoints(tmp_path / "run", config)
    checkpoints.save(Position(1), state)
    checkpoints.wait()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    convert(tmp_path / "run", tmp_path / "out", dtype="fp8", verify=True)

    used = codes_used(config.model, {"params": params, "router_state": variables["router_state"]}, monkeypatch)
    written = codes_written(tmp_path / "out")
    (eh_proj,) = params["mtp_layers"]["eh_proj"]["weight"]
    alone = tuple(np.asarray(part) for part in jax.jit(fp8.quantize_blocks)(eh_proj))
    assert used - written == {(eh_proj.shape, *(part.tobytes() for part in alone))}
    assert written < used and len(written) == 5 * 3 + 3 + 2 * (3 * config.model.n_routed_experts + 3)


def kept_bytes(config: ModelConfig, sequences: int) -> tuple[float, float]:
    """What a dense layer keeps for its backward pass: bytes a token, and bytes whatever the tokens."""
    block = Block(config, moe=False)

    def kept(count: int) -> int:
        x = jax.ShapeDtypeStruct((count, 64, config.hidden_size), jnp.bfloat16)
        positions = jnp.broadcast_to(jnp.arange(64), (count, 64))
        angles = rope_angles(config, positions)
        variables = jax.eval_shape(block.init, jax.random.key(0), x, angles, positions)

        def residuals(params, x):
            return jax.vjp(lambda p, x: block.apply({"params": p}, x, angles, positions)[0], params, x)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, variables["params"], x))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    one, several = kept(1), kept(sequences)
    per_token = (several - one) / (64 * (sequences - 1))
    return per_token, one - 64 * per_token


def test_a_layer_keeps_the_inputs_and_weights_of_its_products_in_fp8():
    """A byte and its share of a scale for every number, where bfloat16 keeps two bytes; all else stays as it is."""
    config = fp8_config().model
    in_bf16, in_fp8 = (kept_bytes(dataclasses.replace(config, precision=p), 3) for p in ("bfloat16", "fp8"))
    c = config
    values = c.num_attention_heads * c.v_head_dim
    inputs = (c.hidden_size, c.q_lora_rank, c.kv_lora_rank, values, c.hidden_size, c.intermediate_size)
    assert in_bf16[0] - in_fp8[0] == sum(width - 4 * -(-width // 128) for width in inputs)
    assert in_fp8[1] < 0.51 * in_bf16[1]


def test_moments_in_bfloat16_are_kept_in_two_bytes():
    """Both of them, in both siblings; the second also where its update is a small part of it."""
    train = TrainConfig(adam_moment_dtype="bfloat16", gradient_clip=1e9)
    params = {"lm_head": {"weight": jnp.ones((64, 32))}}
    optimizer = make_optimizer(train)
    update = jax.jit(optimizer.update)
    memory = update.lower(params, optimizer.init(params), params).compile().memory_analysis()
    wide = make_optimizer(dataclasses.replace(train, adam_moment_dtype="float32"))
    wide_memory = jax.jit(wide.update).lower(params, wide.init(params), params).compile().memory_analysis()
    assert wide_memory.argument_size_in_bytes - memory.argument_size_in_bytes == 2 * 2 * 64 * 32

    gradient = {"lm_head": {"weight": jnp.full((64, 32), 0.1)}}
    state = optimizer.init(params)
    for _ in range(100):
        _, state = update(gradient, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert [leaf.dtype for leaf in moments] == [jnp.bfloat16] * 2
    # A moment that gains 5% of its distance at a time stands still where that is under half a digit, at most 2^-8 of it.
    assert np.allclose([np.asarray(leaf, np.float32).mean() for leaf in moments], [0.1, 0.01], rtol=2**-8 / 0.05)

    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(32, 64, bias=False)})
    in_torch = make_torch_optimizer(train, model)
    model["lm_head"].weight.grad = torch.full((64, 32), 0.1)
    in_torch.step()
    (state,) = in_torch.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    in_torch.step()
    assert state["exp_avg"].dtype == torch.bfloat16 and model["lm_head"].weight.dtype == torch.float32


def test_a_machine_without_float8_is_told_what_to_use(monkeypatch, tmp_path):
    """One line, before anything is written or read; also where the product runs and comes out wrong."""
    text = tmp_path / "text.txt"
    text.write_text("some text " * 1000)
    config = load_config("tiny", ["model.precision=fp8", f"data.input={text}", f"run_dir={tmp_path / 'run'}"])

    def refused(device):
        raise NotImplementedError("F8E4M3FN is not supported\n  at some place")

    for check, fault in ((refused, "F8E4M3FN is not supported"), (lambda device: False, "they come out wrong")):
        monkeypatch.setattr(fp8, "_float8_product_is_right", check)
        pattern = rf"^model\.precision=fp8: no float8 products on cpu [^\n]*{fault}[^\n]*use model\.precision=bfloat16$"
        with pytest.raises(ConfigError, match=pattern):
            train(config)
        assert not (tmp_path / "run").exists()
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        with pytest.raises(ConfigError, match=pattern):
            load_run(tmp_path)

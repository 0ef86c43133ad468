"""Losses, schedules and training steps in both siblings, in float64."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deepseek_jax.training.loss as jax_loss
import deepseek_jax.training.schedules as jax_schedules
import deepseek_torch.training.loss as torch_loss
import deepseek_torch.training.schedules as torch_schedules
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.config import Config, Phase, RopeScaling, TrainConfig, load_config
from deepseek_jax.convert import convert
from deepseek_jax.data.loader import part_size
from deepseek_jax.training.optimizer import decays, make_optimizer
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.step import Scalars, TrainState, train_step
from deepseek_torch.training.optimizer import clip_by_global_norm
from deepseek_torch.training.optimizer import decays as torch_decays
from deepseek_torch.training.optimizer import make_optimizer as make_torch_optimizer
from deepseek_torch.training.step import TrainState as TorchTrainState
from deepseek_torch.training.step import train_step as torch_train_step
from parity_tests.comparison import assert_close
from parity_tests.compiling import QUICKLY
from parity_tests.modules import COMPILE_QUICKLY
from parity_tests.siblings import Siblings
from parity_tests.weights import to_torch

STEPS = 20


def lockstep_config() -> Config:
    """Everything at once: MTP depth 2, groups, YaRN, accumulation, a schedule on each number, a clip that bites."""
    tiny = load_config("tiny")
    model = dataclasses.replace(
        tiny.model, precision="float64", num_hidden_layers=3, num_nextn_predict_layers=2, grouped_matmul="reference",
        remat="none", rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0),
    )  # fmt: skip
    train = TrainConfig(
        steps=STEPS, sequence_length=12, batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        warmup_steps=4, gradient_clip=0.5, bias_update_speed=[Phase(1e-2, until=700), Phase(0.0)],
        sequence_balance_weight=1e-2, mtp_loss_weight=[Phase(0.3, until=500), Phase(0.1)], loss_chunk_tokens=20,
    )  # fmt: skip
    return dataclasses.replace(tiny, model=model, train=train)


def test_twenty_steps_in_lockstep():
    """Loss, its parts, gradient norm, every parameter, every router bias and all expert counts, after every step."""
    config = lockstep_config()
    pair = Siblings(config.model)
    for buffer in pair.torch.buffers():
        buffer.zero_()  # the biases start where training starts them, and move by themselves
    params, router_state = pair.variables["params"], jax.tree.map(np.zeros_like, pair.variables["router_state"])
    in_torch = TorchTrainState(pair.torch, make_torch_optimizer(config.train, pair.torch))
    clipped = 0
    with jax.enable_x64(True):
        in_jax = TrainState(params, router_state, make_optimizer(config.train).init(params))
        step = jax.jit(partial(train_step, config=config), compiler_options=COMPILE_QUICKLY)
        for plan in torch_schedules.plan_steps(config.train):
            tokens = few_words(config, seed=plan.step)
            scalars = Scalars(*map(jnp.float64, (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)))
            in_jax, ours = step(in_jax, tokens, scalars)
            theirs = torch_train_step(in_torch, torch.from_numpy(tokens).long(), plan, config)
            assert_close(_told(ours), _told(theirs), 1e-10)
            for stack, counts in ours.parts.counts.items():
                assert np.array_equal(counts, theirs.parts.counts[stack]), (plan.step, stack)
                # Each of 4 x 12 tokens is counted once per choice and layer.
                assert (counts.sum(axis=-1) == 4 * 12 * config.model.num_experts_per_tok).all()
            variables = {"params": in_jax.params, "router_state": in_jax.router_state}
            assert_close(to_torch(variables, config.model), in_torch.model.state_dict(), 1e-10)
            clipped += float(ours.grad_norm) > config.train.gradient_clip
        # A loss that is no number changes nothing, on either side.
        no_number = Scalars(*map(jnp.float64, (plan.learning_rate, plan.bias_update_speed, math.nan)))
        in_jax, ours = step(in_jax, tokens, no_number)
        variables = {"params": in_jax.params, "router_state": in_jax.router_state}
        before = {name: value.clone() for name, value in in_torch.model.state_dict().items()}
        broken = dataclasses.replace(plan, mtp_loss_weight=math.nan)
        skipped = torch_train_step(in_torch, torch.from_numpy(tokens).long(), broken, config).skipped
        assert ours.skipped and skipped and in_jax.optimizer[1].count == STEPS
        assert_close(to_torch(variables, config.model), before, 1e-10)
        assert_close(before, in_torch.model.state_dict(), 0)
    assert clipped >= 10, "the clip is to be part of the proof"
    assert all(0 < bias.abs().max() < 0.15 for bias in pair.torch.buffers()), "gamma was 0.01, then 0"
    assert theirs.loss < 5.9, "log 320 is 5.8 and lambda adds to it: something was learnt"


def test_growing_batches_by_one_program_are_whole_batches():
    """Parts of a sequence each, of which one to four count, against the sibling that takes each batch at once: what is
    summed, averaged or the largest over parts, counts and so the biases among it, is what one batch gives. Moved by Muon,
    with scores that reach QK-clip's limit."""
    config, limit = lockstep_config(), 0.05
    train = dataclasses.replace(
        config.train, steps=5, batch_size_start=1, batch_size_ramp_tokens=60, gradient_accumulation_steps=1, warmup_steps=0,
        optimizer="muon", qk_clip=limit, bias_update_speed=[Phase(1e-2)],
    )  # fmt: skip
    model = dataclasses.replace(config.model, first_k_dense_replace=0, num_hidden_layers=1, num_nextn_predict_layers=1)
    config = dataclasses.replace(config, model=model, train=train)
    pair, rng = Siblings(model), np.random.default_rng(0)
    in_torch = TorchTrainState(pair.torch, make_torch_optimizer(train, pair.torch))
    sizes, clipped, length = [], 0, train.sequence_length + 2
    with jax.enable_x64(True):
        params, router_state = (jax.tree.map(jnp.asarray, pair.variables[kind]) for kind in ("params", "router_state"))
        in_jax = TrainState(params, router_state, make_optimizer(train).init(params))
        step = jax.jit(partial(train_step, config=config), compiler_options=COMPILE_QUICKLY)
        for plan in jax_schedules.plan_steps(train):
            tokens = rng.integers(0, model.vocab_size, (4, part_size(train), length), dtype=np.int32)
            whole = torch.from_numpy(tokens[: plan.batch_size]).long().view(1, -1, length)
            scheduled = map(jnp.float64, (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight))
            in_jax, ours = step(in_jax, tokens, Scalars(*scheduled, parts=np.int32(plan.batch_size)))
            theirs = torch_train_step(in_torch, whole, plan, config)
            scores = np.concatenate([ours.parts.largest_scores[stack] for stack in ("moe_layers", "mtp_layers")])
            told = (metrics | {"scores": of} for metrics, of in
                    ((_told(ours), scores), (_told(theirs), theirs.parts.largest_scores)))  # fmt: skip
            assert_close(*told, 1e-12)
            variables = {"params": in_jax.params, "router_state": in_jax.router_state}
            assert_close(to_torch(variables, model), in_torch.model.state_dict(), 1e-12)
            sizes.append(plan.batch_size)
            clipped += (scores > limit).sum()
    assert sizes == [1, 1, 2, 3, 4] and step._cache_size() == 1
    assert 0 < clipped < 5 * scores.size


def few_words(config: Config, seed: int) -> np.ndarray:
    """A batch in its two parts, of so few words that their frequencies can be learnt at once."""
    words = np.random.default_rng(0).integers(0, config.model.vocab_size, 50, dtype=np.int32)
    window = config.train.sequence_length + 1 + config.model.num_nextn_predict_layers
    return words[np.random.default_rng(seed).integers(0, 50, (2, config.train.batch_size // 2, window))]


def _told(metrics) -> dict:
    parts = {name: getattr(metrics.parts, name) for name in ("cross_entropy", "balance_loss")}
    counts = {f"counts of {stack}": counts for stack, counts in metrics.parts.counts.items()}
    return {"loss": metrics.loss, "grad_norm": metrics.grad_norm} | parts | counts


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_cross_entropy_and_its_gradients(precision, chunk):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((12, 7)).astype(precision), 3 * rng.standard_normal((7, 31)).astype(precision)
    targets, weights = rng.integers(0, 31, 12), rng.uniform(0, 2, 12).astype(precision)
    with jax.enable_x64(precision == "float64"):

        def seven_times(*args):  # what comes in from outside is a factor of the loss' own gradient
            total, nats = jax_loss.cross_entropy(*args)
            return 7 * total, nats

        both = jax.value_and_grad(seven_times, argnums=(0, 1), has_aux=True)
        (total, nats), gradients = jax.jit(both, static_argnums=4)(hidden, head, targets, weights, chunk)
    h, w = (torch.from_numpy(x).requires_grad_() for x in (hidden, head))
    torch_nats = torch_loss.cross_entropy(h, w, torch.from_numpy(targets), chunk)
    torch_total = 7 * (torch_nats * torch.from_numpy(weights)).sum()
    torch_total.backward()
    ours = {"total": total, "nats": nats, "hidden": gradients[0], "head": gradients[1]}
    theirs = {"total": torch_total, "nats": torch_nats, "hidden": h.grad, "head": w.grad}
    assert_close(ours, theirs, {"float64": 1e-13, "float32": 1e-5}[precision])


@pytest.mark.parametrize("depth", [0, 1])
def test_training_loss_by_its_parts(depth):
    """CE + lambda/D times that of the depths + alpha times the balance loss, by hand from the model's outputs."""
    config = lockstep_config()
    model = dataclasses.replace(config.model, num_nextn_predict_layers=depth, num_hidden_layers=2)
    config = dataclasses.replace(config, model=model)
    pair = Siblings(model)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (2, 8 + depth), dtype=np.int32)
    loss, parts = torch_loss.training_loss(pair.torch, torch.from_numpy(tokens).long(), config, mtp_weight=0.7)
    with torch.no_grad():
        output = pair.torch(torch.from_numpy(tokens[:, :-1]))
        by_hand = []
        for k in range(depth + 1):
            probabilities = torch.softmax(output.hidden[k] @ output.head, dim=-1)
            chosen = [[probabilities[b, i, tokens[b, i + k + 1]] for i in range(7)] for b in range(2)]
            by_hand.append(-sum(math.log(p) for row in chosen for p in row) / 14)
    assert np.allclose(parts.cross_entropy, by_hand, rtol=1e-13)
    expected = by_hand[0] + 0.7 * sum(by_hand[1:]) / max(depth, 1) + 1e-2 * output.balance_loss.item()
    assert math.isclose(loss.item(), expected, rel_tol=1e-13)
    with jax.enable_x64(True):
        loss_of = jax.jit(partial(jax_loss.training_loss, config=config), compiler_options=COMPILE_QUICKLY)
        variables = pair.variables
        ours, _ = loss_of(variables["params"], variables["router_state"], tokens, mtp_weight=jnp.float64(0.7))
    assert math.isclose(ours, expected, rel_tol=1e-13)


SCHEDULES = [
    TrainConfig(steps=30, sequence_length=16, batch_size=4),
    TrainConfig(steps=30, sequence_length=16, batch_size=4, warmup_steps=7),
    TrainConfig(
        steps=80, sequence_length=10, batch_size=12, batch_size_start=3, batch_size_ramp_tokens=2000, warmup_steps=5,
        learning_rate_decay=[Phase(1.0, until=1500), Phase(0.1, until=3000, shape="cosine"), Phase(0.1, until=3500),
                             Phase(0.03)],
        bias_update_speed=[Phase(1e-3, until=3000), Phase(0.0)], mtp_loss_weight=[Phase(0.3, until=2000), Phase(0.1)],
    ),
    TrainConfig(
        steps=20, sequence_length=8, batch_size=2, batch_size_start=2, warmup_steps=30,
        learning_rate_decay=[Phase(0.5, until=100, shape="linear"), Phase(0.2, until=200, shape="cosine")],
    ),
    TrainConfig(  # phases that end where a step begins, one of them where it would begin itself
        steps=20, sequence_length=10, batch_size=2, warmup_steps=2,
        learning_rate_decay=[Phase(0.5, until=40, shape="linear")], bias_update_speed=[Phase(1e-3, until=100), Phase(0.0)],
        mtp_loss_weight=[Phase(0.3, until=100, shape="linear"), Phase(0.1, shape="linear")],
    ),
    load_config("large_671b", ["train.steps=400"]).train,
]  # fmt: skip


@pytest.mark.parametrize("train", SCHEDULES)
def test_schedules_are_alike(train):
    ours, theirs = ([dataclasses.astuple(plan) for plan in module.plan_steps(train)]
                    for module in (jax_schedules, torch_schedules))  # fmt: skip
    assert len(ours) == train.steps and np.allclose(ours, theirs, rtol=1e-14, atol=0)
    assert [plan[:3] for plan in ours] == [plan[:3] for plan in theirs]


def test_the_reports_schedules():
    """Section 4.2 in its own figures, at the tokens where they change, just before, and half way between."""
    train = load_config("large_671b").train
    for tokens, batch_size, rate, gamma, weight in (
        (0, 3072, 2.2e-4, 1e-3, 0.3), (234.5e9, 9216, 2.2e-4, 1e-3, 0.3), (469e9 - 1, 12288, 2.2e-4, 1e-3, 0.3),
        (469e9, 15360, 2.2e-4, 1e-3, 0.3), (10e12 - 1, 15360, 2.2e-4, 1e-3, 0.3), (10e12, 15360, 2.2e-4, 1e-3, 0.1),
        (12.15e12, 15360, 1.21e-4, 1e-3, 0.1), (14.3e12 - 1, 15360, 2.2e-5, 1e-3, 0.1), (14.3e12, 15360, 2.2e-5, 0, 0.1),
        (14.633e12 - 1, 15360, 2.2e-5, 0, 0.1), (14.633e12, 15360, 7.3e-6, 0, 0.1), (14.8e12, 15360, 7.3e-6, 0, 0.1),
    ):  # fmt: skip
        plan = next(jax_schedules.plan_steps(train, Position(step=train.steps - 1, tokens=int(tokens))))
        assert plan.batch_size == batch_size, tokens
        told = plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight
        assert np.allclose(told, (rate, gamma, weight), rtol=1e-9, atol=0), tokens


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_adamw_is_the_same(moments):
    """Clip, moments as kept, decay of all but norms and biases: ten updates of the same gradients."""
    train = TrainConfig(gradient_clip=2.0, weight_decay=0.3, adam_moment_dtype=moments)
    rng = np.random.default_rng(0)
    params = {"lm_head": {"weight": rng.standard_normal((4, 3))}, "norm": {"weight": rng.standard_normal(3)},
              "o_proj": {"bias": rng.standard_normal(3)}}  # fmt: skip
    model = torch.nn.ModuleDict({name: torch.nn.Module() for name in params})
    for name, of_module in params.items():
        for kind, value in of_module.items():
            setattr(model[name], kind, torch.nn.Parameter(torch.from_numpy(value).clone()))
    optimizer = make_torch_optimizer(train, model)
    with jax.enable_x64(True):
        params, transform = jax.tree.map(jnp.asarray, params), make_optimizer(train)
        state = transform.init(params)
        for step in range(10):
            learning_rate = 0.1 / (step + 1)
            gradients = jax.tree.map(lambda p: rng.standard_normal(p.shape) * 10.0 ** rng.integers(-4, 2), params)
            updates, state = transform.update(jax.tree.map(jnp.asarray, gradients), state, params)
            params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
            for name, of_module in gradients.items():
                for kind, value in of_module.items():
                    getattr(model[name], kind).grad = torch.from_numpy(value)
            clip_by_global_norm(model.parameters(), train.gradient_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            ours = {f"{name}.{kind}": value for name, of_module in params.items() for kind, value in of_module.items()}
            assert_close(ours, dict(model.named_parameters()), 1e-13)


def test_matrices_decay():
    of_layer = {"self_attn": {"o_proj": {"weight": 0.0, "bias": 0.0}, "q_a_layernorm": {"weight": 0.0}}}
    expected = {"self_attn": {"o_proj": {"weight": True, "bias": False}, "q_a_layernorm": {"weight": False}}}
    assert decays({"moe_layers": of_layer}) == {"moe_layers": expected}
    names = [f"model.layers.1.self_attn.{name}" for name in ("o_proj.weight", "o_proj.bias", "q_a_layernorm.weight")]
    assert [torch_decays(name) for name in names] == [True, False, False]


def test_the_clip_is_exact_and_leaves_short_gradients_alone():
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
    for limit, scale in ((1.0, 1 / 6.0), (6.5, 1.0)):
        weights[0].grad, weights[1].grad = torch.full((3,), 2.0), torch.tensor([4.0, 2.0, 2.0, 0.0])
        assert clip_by_global_norm(weights, limit) == 6.0
        assert torch.allclose(weights[1].grad, scale * torch.tensor([4.0, 2.0, 2.0, 0.0]), rtol=1e-6)


def test_both_programs_write_the_same_metrics(tmp_path):
    """Lines of one form from the same text and config; only the fresh weights differ, so that the losses are near.

    The model has the guide's forms, which all that a run does must take.
    """
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The answer to question {n} is {n * n}." for n in range(400)))
    (tmp_path / "squares.jsonl").write_text("".join(f'{{"text": "{n} is {n * n}"}}\n' for n in range(99)))
    fields = ["train.steps=3", "train.eval_every=2", f"data.eval.squares={tmp_path}/squares.jsonl",
              "train.eval_sequences=4", "data.held_out_fraction=0.2",
              "model.num_hidden_layers=2", "model.grouped_matmul=reference", "model.remat=none",
              "model.scoring_func=softmax", "model.capacity_factor=0.5", "model.n_shared_experts=2",
              "model.shared_expert_gate=true", "model.feed_forward=gelu", "model.mtp_form=parallel"]  # fmt: skip

    def train(package):
        run_dir = tmp_path / package
        return _run("-m", f"{package}.train", "--config", "tiny", f"data.input={text}", f"run_dir={run_dir}", *fields)

    lines = []
    for package in ("deepseek_jax", "deepseek_torch"):
        told = train(package)
        assert told.returncode == 0 and "  dropped 0." in told.stdout
        lines.append([json.loads(line) for line in (tmp_path / package / "metrics.jsonl").read_text().splitlines()])
    assert len(lines[0]) == 5
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name] == theirs[name] for name in ("step", "tokens"))
        assert math.isclose(ours.get("learning_rate", 0), theirs.get("learning_rate", 0))
        assert abs(ours.get("loss", 0) - theirs.get("loss", 0)) < 0.3
        assert abs(ours.get("bits_per_byte", 0) - theirs.get("bits_per_byte", 0)) < 0.5
        assert ("eval" in ours) == ("bits_per_byte" in ours)
        assert abs(ours.get("eval", {"squares": 0})["squares"] - theirs.get("eval", {"squares": 0})["squares"]) < 0.5
    assert all(0.5 <= line["dropped"] < 1 for line in lines[0] if "loss" in line)
    refused = train("deepseek_torch")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "already holds a run" in refused.stderr

    run_dir, prompts = tmp_path / "deepseek_torch", ("--prompt", "The answer", "--prompt", "question")
    written = _run("-m", "deepseek_torch.generate", run_dir, *prompts, "--max-new-tokens", "5")
    assert written.returncode == 0
    assert written.stdout.startswith("The answer") and "---\nquestion" in written.stdout
    with pytest.raises(CheckpointError, match=r"deepseek_v3 has no model.feed_forward=gelu, model.mtp_form=parallel, "):
        convert(tmp_path / "deepseek_jax", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def _run(*words) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": QUICKLY}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

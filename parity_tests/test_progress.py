"""What a run says of itself: lines that fit, spikes, where its time went, who is slow, and to whom it is told."""

import os
import signal
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.planning.figures import figures
from deepseek_jax.planning.machines import MACHINES, machine_of
from deepseek_jax.train import train
from deepseek_jax.training import loop
from deepseek_jax.training.goodput import Times, goodput, goodput_text
from deepseek_jax.training.metrics import WIDTH, MetricsFile, Progress, expert_line, one_line
from deepseek_jax.training.plot import plot_experts
from deepseek_jax.training.speed import share_of_peak
from deepseek_jax.training.spikes import SpikeWatch
from deepseek_jax.training.stragglers import slow_ones
from deepseek_jax.training.trackers import make_trackers, numbers_of
from parity_tests.test_processes import launch


def test_a_progress_line_fits(capsys):
    numbers = dict(loss=2.3456789, mtp=3.456789, grad=0.12345678, lr=2.2e-4, load=2.3456)
    for steps in (40, 1_000_000):
        progress = Progress(steps, lambda rate: 0.4567)
        progress._shown -= 10
        for step in (1, 2):
            progress._start -= 10
            progress._shown -= 10
            progress.step(step, step * 50_000_000, **numbers, **({"dropped": 0.0123} if steps > 40 else {}))
    first, second = (line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line)
    assert max(len(first), len(second)) <= WIDTH, (first, second)
    for word in ("step ", "loss 2.346", "mtp 3.457", "load 2.35", " 5.0M tokens/s", "MFU 46%", " left"):
        assert word in first and word in second
    assert "grad 0.123" in first and "lr 0.00022" in first
    assert len(one_line({str(n): "x" * 30 for n in range(5)})) <= WIDTH
    progress.note("step 2: no update: not finite: " + ", ".join(["dense_layers.mlp.down_proj.weight"] * 4))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= WIDTH and lines[1].startswith("  dense_layers.mlp.down_proj.weight")


def test_the_share_of_the_peak_is_that_of_the_counted_products():
    class Chip:
        device_kind = "NVIDIA H100 80GB HBM3"

    config = load_config("small")
    found = figures(config)
    needed = sum(flops.forward + flops.backward for flops in found.flops.values())
    share = share_of_peak(config, [Chip()] * 8)
    assert share(1000) == pytest.approx(1000 * needed / (8 * MACHINES["h100"].bf16_flops), rel=1e-12)
    assert share_of_peak(config, jax.devices()) is None, "no peak of a CPU is known"
    kinds = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "tpu7x",
        "NVIDIA B200": "b200",
    }
    assert {kind: machine_of(kind).name for kind in kinds} == kinds


def test_a_jump_of_the_loss_is_told_once_and_noise_is_not():
    noise, watch = np.random.default_rng(0).normal(0, 0.05, 400), SpikeWatch()
    losses = 2 + 5 * np.exp(-np.arange(400) / 50) + noise
    losses[300:303] += 1.5
    told = [step for step, loss in enumerate(losses) if watch.look(float(loss)) is not None]
    assert told == [300]


def test_load_by_layer():
    counts = {
        "moe_layers": np.array([[4, 4, 4, 4], [10, 2, 2, 2]], np.int32),
        "mtp_layers": np.array([[6, 6, 4, 0]], np.int32),
    }
    assert expert_line(counts) == {"max_expert_load": 2.5, "max_violation": [0.0, 1.5, 0.5]}
    assert expert_line({}) == {"max_expert_load": 1.0}


def test_a_step_that_hangs_is_told_with_its_stack_and_compiling_is_not(tmp_path, text_file, monkeypatch, capfd):
    make_step = loop.make_step

    def make_slow_step(*words):
        step = make_step(*words)

        def compiles(*inputs):
            time.sleep(1.5)
            return step(*inputs)

        def hangs(*inputs):
            time.sleep(1.5)
            return step(*inputs)

        steps = iter((compiles, step, hangs))
        return lambda *inputs: next(steps)(*inputs)

    words = ["model.num_hidden_layers=1", "model.num_nextn_predict_layers=0", "train.sequence_length=8", "train.steps=3",
             "train.hang_after=1", f"data.input={text_file}", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    monkeypatch.setattr(loop, "make_step", make_slow_step)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    train(load_config("tiny", words))
    told = capfd.readouterr().err
    assert " in hangs\n" in told and " in compiles\n" not in told


@pytest.mark.parametrize("steps", ["13-10", "10:13", "0-3", "5"])
def test_steps_to_trace_are_two_in_order(steps):
    with pytest.raises(ConfigError, match=r"^train.profile=.*: write it as first-last, two numbers of steps$"):
        load_config("tiny", [f"train.profile={steps}"])
    assert load_config("tiny", ["train.profile=10-10"]).train.profile == "10-10"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_goodput_counts_what_was_trained_and_kept(tmp_path):
    """Two starts: of the first, what came after the checkpoint is lost."""
    clock = Clock()

    def start(steps, saved_at):
        times = Times(clock)
        clock.now += 10
        times.start(tmp_path)
        for step in steps:
            clock.now += 2
            times.stepped(step, skipped=step == 3)
            if step == saved_at:
                with times.aside("saving"):
                    clock.now += 5
                times.write(step)
        times.write(steps[-1])

    start(range(1, 7), saved_at=4)
    clock.now += 1
    start(range(5, 11), saved_at=10)
    seconds = goodput(tmp_path, 10)
    assert seconds == {
        "all": 54.0,
        "trained": 22.0,
        "compiling": 0,
        "evaluating": 0,
        "saving": 10.0,
        "skipped": 2.0,
        "lost": 0.0,
    }
    before = goodput(tmp_path, 4)
    assert before["trained"] == 6.0 and before["lost"] == 16.0
    assert goodput_text(before) == "goodput: 11% of 54 s trained; starting 37%, lost 30%, saving 19%, skipped 4%"
    (tmp_path / "times.jsonl").write_text("cut sho")
    assert goodput(tmp_path, 4) is None


def test_compiling_is_no_training(tmp_path):
    times = Times()
    times.start(tmp_path)
    jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y @ y + 1, x))(np.ones((17, 17)))
    times.stepped(1, skipped=False)
    times.write(1)
    seconds = goodput(tmp_path, 1)
    assert seconds["compiling"] > 0 and seconds["trained"] + seconds["compiling"] <= seconds["all"] + 0.02


def test_a_slow_process_is_named():
    hosts = ["a", "b", "c", "d"]
    assert slow_ones([0.01, 0.011, 0.05, 0.01], hosts, "work") == [
        "process 2 on c is slow: work takes 50 ms, 5.0 times as long as elsewhere"
    ]
    assert slow_ones([0.01, 0.011, 0.012, 0.01], hosts, "work") == slow_ones([1e-5, 1e-5, 1e-4, 1e-5], hosts, "work") == []
    assert len(slow_ones([0.05, 0.01], hosts, "work")) == 1


def test_metrics_go_to_tensorboard_and_to_a_heat_map(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    config = load_config("tiny", ["train.tensorboard=true"])
    metrics = MetricsFile(tmp_path, 0, trackers=make_trackers(config, tmp_path, 0))
    metrics.write(step=1, tokens=128, loss=2.5, mtp_losses=[3.0, 4.0], max_violation=[0.5, 1.5])
    metrics.write(step=2, tokens=256, bits_per_byte=2.0, eval={"wiki": 1.5})
    metrics.close()
    (file,) = (tmp_path / "events").iterdir()
    content, found, at = file.read_bytes(), {}, 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += length + 16
    assert found == {
        (1, "loss"): 2.5, (1, "mtp_losses/1"): 3.0, (1, "mtp_losses/2"): 4.0, (1, "max_violation/1"): 0.5,
        (1, "max_violation/2"): 1.5, (2, "bits_per_byte"): 2.0, (2, "eval/wiki"): 1.5,
    }  # fmt: skip
    assert plot_experts(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert numbers_of({"step": 1, "tokens": 2, "skipped": 3}) == {"skipped": 3.0}


class Refusal(Exception):
    """What wandb raises, as `wandb.Error`."""


def refuse(**_):
    raise Refusal("No API key configured.\nUse `wandb login` to log in.")


@pytest.mark.parametrize("module, complaint", [
    (None, r"^train.wandb=mine: needs wandb; pip install -e '.\[wandb\]'$"),
    (SimpleNamespace(Error=Refusal, init=refuse), r"^train.wandb=mine: No API key configured. Use `wandb login` to log in; "),
])  # fmt: skip
def test_what_wandb_refuses_is_one_line(module, complaint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match=complaint):
        make_trackers(load_config("tiny", ["train.wandb=mine"]), tmp_path, 0)


def test_a_tracker_that_dies_costs_a_line_and_not_the_run(tmp_path, capsys):
    dying, living = Mock(), Mock()
    dying.write.side_effect = [None, ConnectionResetError("its helper\nis gone"), None]
    metrics = MetricsFile(tmp_path, 0, trackers=[dying, living])
    for step in (1, 2, 3):
        metrics.write(step=step, tokens=128 * step, loss=2.5)
    metrics.close()
    assert [call.args for call in living.write.call_args_list] == [(step, {"loss": 2.5}) for step in (1, 2, 3)]
    assert dying.write.call_count == 2 and not dying.close.called and living.close.called
    assert capsys.readouterr().err == "Mock gets no more metrics: ConnectionResetError: its helper is gone\n"
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


SILENT = """
import os, sys, time
from deepseek_jax.parallel import processes
processes.QUIET, processes.SILENCE = 2, 8
processes.join(False)
with processes.together():
    open(os.path.join(sys.argv[1], os.environ["JAX_PROCESS_ID"]), "w").write(str(os.getpid()))
    while not os.path.exists(os.path.join(sys.argv[1], "end")):
        time.sleep(0.1)
"""


@pytest.mark.slow
def test_a_stopped_process_of_four_is_named_and_may_come_back(tmp_path):
    running = launch(4, 1, "-c", SILENT, tmp_path)
    while len(list(tmp_path.glob("[0-9]"))) < 4 or not all(path.read_text() for path in tmp_path.glob("[0-9]")):
        time.sleep(0.1)
        assert running.poll() is None
    victim = int((tmp_path / "2").read_text())
    os.kill(victim, signal.SIGSTOP)
    time.sleep(5)
    os.kill(victim, signal.SIGCONT)
    time.sleep(2)
    (tmp_path / "end").touch()
    _, told = running.communicate(timeout=60)
    lines = [line for line in told.splitlines() if line.startswith("process 2 on ")]
    assert running.returncode == 0 and len(lines) == 2, told
    assert lines[0].endswith("gives no sign of life; the others wait for it") and lines[1].endswith("is back")

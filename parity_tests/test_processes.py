"""Several processes as one program: the same numbers as one, one checkpoint for any mesh, and an end when one dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.checkpoint.layout import layout
from deepseek_jax.checkpoint.orbax_source import OrbaxSource
from deepseek_jax.checkpoint.orbax_step import AVERAGE
from deepseek_jax.errors import report
from parity_tests.comparison import assert_close
from parity_tests.compiling import QUICKLY
from parity_tests.conversions import turn_a_bit

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch_local"
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "XLA_FLAGS": QUICKLY}
FIELDS = ["model.precision=float64", "model.num_hidden_layers=3", "model.hidden_size=32", "model.num_nextn_predict_layers=0",
          "train.sequence_length=8",
          "train.batch_size=8", "train.learning_rate_decay=1.0", "train.eval_every=2", "train.eval_sequences=3",
          "train.checkpoint_every=100", "data.held_out_fraction=0.2",
          "train.optimizer=muon", "train.qk_clip=0.01", "train.ema_decay=0.5", "train.ema_on_host=true"]  # fmt: skip


def launch(processes: int, devices: int, *words, **options) -> subprocess.Popen:
    command = [sys.executable, LAUNCH, str(processes), "--devices", str(devices), "--", sys.executable, *map(str, words)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def train(tmp_path: Path, name: str, processes: int, devices: int, *words) -> tuple[str, str, int]:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(f"The answer to question {n} is {n * n}." for n in range(400)))
    running = launch(processes, devices, "-m", "deepseek_jax.train", "--config", "tiny", f"data.input={text}",
                     f"run_dir={tmp_path / name}", *FIELDS, *words)  # fmt: skip
    return *running.communicate(timeout=400), running.returncode


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(actual: list[dict], expected: list[dict]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-10), (one["step"], name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of a run of four steps on one device."""
    folder = tmp_path_factory.mktemp("runs")
    _, complaints, code = train(folder, "alone", 1, 1, "train.steps=4")
    assert code == 0, complaints
    return folder


def average(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Of the weights, as `convert --ema` reads it."""
    source = OrbaxSource(run_dir / "checkpoints" / str(step), item=AVERAGE)
    return {place.name: source.read(place) for place in layout(source.config) if not place.is_copy}


@pytest.mark.slow
def test_a_job_goes_on_with_fewer_processes_and_with_more(alone):
    """Two processes take two steps in stages and with experts apart; one takes the third, with half of the devices and so
    in two parts, and four the last, each on other axes: the batch stays."""
    mesh = ("parallel.data=1", "parallel.pipe=2", "parallel.expert=2")
    told, complaints, code = train(alone, "two", 2, 2, "train.steps=2", *mesh)
    assert code == 0, complaints
    assert "mesh: pipe 2 x data 1 x fsdp 1 x context 1 x expert 2 = 4 devices in 2 processes" in told
    assert "the bubble is 20.0% of the time" in told and "each device holds: parameters" in told
    assert told.count("2 bits per byte") + told.count("step 2:") == 1, "one process talks"
    on = ("--resume", "--allow", "train.steps", "parallel.data=-1")
    told, complaints, code = train(alone, "two", 1, 2, *on, "train.steps=3", "train.gradient_accumulation_steps=2")
    assert code == 0 and "resuming after step 2" in told, complaints
    told, complaints, code = train(alone, "two", 4, 1, *on, "train.steps=4", "parallel.fsdp=2")
    assert code == 0 and "resuming after step 3" in told, complaints
    ours, theirs = ([line for line in metrics(alone / name) if "loss" in line] for name in ("two", "alone"))
    assert_same_metrics(ours, theirs)
    assert_close(average(alone / "two", 4), average(alone / "alone", 4), 1e-10)


def test_ctrl_c_saves_on_all_and_two_processes_go_on(tmp_path):
    """Both stop after the same step, one says so; a second start, of two processes again, goes on from there."""
    (tmp_path / "text.txt").write_text("The answer. " * 2000)
    words = ["-m", "deepseek_jax.train", "--config", "tiny", f"data.input={tmp_path}/text.txt", f"run_dir={tmp_path}/run",
             "model.num_hidden_layers=1", "model.num_nextn_predict_layers=0", "train.eval_every=100000",
             "train.checkpoint_every=100000", "parallel.data=2"]  # fmt: skip
    running = launch(2, 1, *words, "train.steps=100000", start_new_session=True)
    written = tmp_path / "run" / "metrics.jsonl"
    while not (written.exists() and written.read_text().count("\n") > 2):
        time.sleep(0.1)
        assert running.poll() is None, running.communicate()
    os.killpg(running.pid, signal.SIGINT)
    _, complaints = running.communicate(timeout=100)
    said = [line for line in complaints.splitlines() if line.startswith("error: ")]
    (step,) = os.listdir(tmp_path / "run" / "checkpoints")
    assert said == [f"error: interrupted; step {step} is saved: --resume run_dir={tmp_path}/run goes on from it"], complaints
    assert running.returncode == 130 and len(metrics(tmp_path / "run")) == int(step)
    words += ["--resume", "--allow", "train.steps"]
    running = launch(2, 1, *words, f"train.steps={int(step) + 1}")
    told, complaints = running.communicate(timeout=200)
    assert running.returncode == 0 and f"resuming after step {step}" in told, complaints
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == list(range(1, int(step) + 2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_keeps_its_own_part(processes, tmp_path):
    """Killed, all go on from their own disks; killed again, and one's part lost, from the run directory's."""
    words = ["parallel.data=1", f"parallel.expert={processes}", "train.steps=60", "train.ema_decay=0", "train.eval_every=60",
             "train.checkpoint_every=12"]  # fmt: skip
    local = [f"train.local_checkpoint_dir={tmp_path / 'local'}", "train.local_checkpoint_every=5"]
    _, complaints, code = train(tmp_path, "alone", processes, 1, *words)
    assert code == 0, complaints

    def killed_after(steps, *more):
        running = launch(processes, 1, "-m", "deepseek_jax.train", "--config", "tiny", f"data.input={tmp_path / 'text.txt'}",
                         f"run_dir={tmp_path / 'run'}", *FIELDS, *words, *local, *more, start_new_session=True)  # fmt: skip
        written = tmp_path / "run" / "metrics.jsonl"
        while not (written.exists() and written.read_text().count("\n") > steps):
            time.sleep(0.05)
            assert running.poll() is None, running.communicate()
        os.killpg(running.pid, signal.SIGKILL)
        return running.communicate()[0]

    killed_after(16)
    told = killed_after(33, "--resume")
    assert "step 15 is the local checkpoint's" in told or "step 20 is the local checkpoint's" in told, told
    (part,) = (tmp_path / "local").glob(f"*/process-{processes - 1}")
    shutil.rmtree(part)
    told, complaints, code = train(tmp_path, "run", processes, 1, *words, *local, "--resume")
    assert code == 0, complaints
    lost = re.search(r"train.local_checkpoint_dir: step (\d+) is not in the part of process (\d+), and counts in none\n", told)
    assert int(lost[1]) in (30, 35) and int(lost[2]) == processes - 1 and "resuming after step 24" in told, told
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")


@pytest.mark.slow
def test_a_bit_that_turns_costs_a_checkpoint_and_no_run(alone):
    """The one before serves, and the same step gives the same again."""
    run_dir = shutil.copytree(alone / "alone", alone / "bit")
    words = ("--resume", "--allow", "train.steps", "train.steps=5")
    _, complaints, code = train(alone, "bit", 1, 1, *words)
    assert code == 0, complaints
    ended, victim = metrics(run_dir), turn_a_bit(run_dir / "checkpoints" / "5")
    _, complaints, code = train(alone, "bit", 1, 1, *words)
    assert code == 0 and f"{victim} is not as it was written; going on from the one before" in complaints, complaints
    assert metrics(run_dir) == ended and (run_dir / "damaged-5").is_dir()


@pytest.mark.slow
def test_four_processes(alone):
    _, complaints, code = train(alone, "four", 4, 1, "train.steps=4", "parallel.data=2", "parallel.expert=2")
    assert code == 0, complaints
    assert_same_metrics(metrics(alone / "four"), metrics(alone / "alone"))


def test_a_mistake_is_told_once(tmp_path):
    _, complaints, code = train(tmp_path, "run", 2, 1, "parallel.data=3")
    assert code == 1
    assert [line for line in complaints.splitlines() if line.startswith("error")] == [
        "error: parallel: pipe 1 x data 3 x fsdp 1 x context 1 x expert 1 does not make the 2 devices that are here; nearest "
        "parallel.pipe=1 parallel.data=2 parallel.fsdp=1 parallel.context=1 parallel.expert=1"
    ]
    assert not (tmp_path / "run").exists()


def test_an_error_is_written_at_once(monkeypatch):
    """Else those of several unbuffered processes run together."""
    writes = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=writes.append, flush=lambda: None))
    report("the disk\nis full")
    assert writes == ["error: the disk is full\n"]


WAITING = """
import os, sys, time
from deepseek_jax.parallel import processes
processes.join(False)
with processes.together():
    own = os.path.join(sys.argv[2], os.environ["JAX_PROCESS_ID"])
    with open(own + ".partial", "w") as file:
        file.write(str(os.getpid()))
    os.rename(own + ".partial", own)
    if sys.argv[1] == os.environ["JAX_PROCESS_ID"]:
        raise OSError("the disk of this process is full")
    time.sleep(60)
"""


@pytest.mark.parametrize("victim", [0, 2])
def test_when_one_dies_the_others_stop_and_say_which(victim, tmp_path):
    running = launch(3, 1, "-c", WAITING, "none", tmp_path)
    while len(list(tmp_path.glob("[0-9]"))) < 3:
        time.sleep(0.1)
        assert running.poll() is None
    start = time.monotonic()
    os.kill(int((tmp_path / str(victim)).read_text()), signal.SIGKILL)
    _, complaints = running.communicate(timeout=60)
    assert time.monotonic() - start < 30 and running.returncode != 0
    said = [line for line in complaints.splitlines() if line.startswith("error: ")]
    assert len(said) == 2 and all(f"process {victim}" in line and "has died" in line for line in said), complaints


@pytest.mark.parametrize("failing, complaint", [(0, "error: "), (1, "error: process 1: ")])
def test_a_failure_in_one_process_is_told_once(failing, complaint, tmp_path):
    running = launch(2, 1, "-c", WAITING, failing, tmp_path)
    _, complaints = running.communicate(timeout=200)
    said = [line for line in complaints.splitlines() if line.startswith("error: ")]
    assert running.returncode == 1 and said == [complaint + "the disk of this process is full"], complaints

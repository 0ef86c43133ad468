"""`python -m deepseek_jax.plan`: what it promises is what a run's own step reports; bad input is one line."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest

from deepseek_jax.config import load_config
from deepseek_jax.parallel.sharding import Division, place_batch
from deepseek_jax.planning import estimate, report, store
from deepseek_jax.planning.depth import carried_on
from deepseek_jax.planning.picture import draw
from deepseek_jax.planning.run import run_figures
from deepseek_jax.planning.search import candidates
from deepseek_jax.planning.step import CompiledText
from deepseek_jax.planning.topologies import read_topology
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.step import Scalars, init_state, make_step

CPU = read_topology("cpu:8")
SMALL = [
    "model.num_hidden_layers=2", "model.num_nextn_predict_layers=0", "model.grouped_matmul=reference", "train.batch_size=16",
    "parallel.data=2", "parallel.expert=4", "train.batch_size_start=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan of eight virtual devices; what it told on the way; where it is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        told = []
        yield estimate.estimate(load_config("tiny", SMALL), CPU, told.append), told, store.store_directory()


def run_plan(*words):
    command = [sys.executable, "-m", "deepseek_jax.plan", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_planned_bytes_are_those_of_a_run(planned):
    """The step that a run compiles from its own arrays holds what the plan says, to the byte."""
    found, _, _ = planned
    config = found.config
    shapes = jax.eval_shape(partial(init_state, config))
    division = Division(config.parallel, shapes.params)
    shardings = division.shardings(shapes, make_optimizer(config.train))
    state = jax.jit(partial(init_state, config), out_shardings=shardings)()
    train = config.train
    parts, length = train.gradient_accumulation_steps, train.sequence_length
    shape = (parts, train.batch_size // parts, length + 1)
    tokens = place_batch(division, shape, 1, lambda start, end: np.zeros((parts, end - start, length + 1), np.int32))
    scalars = Scalars(*(jax.numpy.float32(0.1) for _ in range(3)))
    memory = make_step(config, division).lower(state, tokens, scalars).compile().memory_analysis()
    assert (found.step.argument_bytes, found.step.temporary_bytes) == (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )
    assert config.train.gradient_accumulation_steps == 2  # one sequence a device at a time


def test_a_plan_is_kept(planned):
    """The second time it is read, not compiled; a damaged file counts as none."""
    found, told, directory = planned
    again: list[str] = []
    assert estimate.estimate(load_config("tiny", SMALL), CPU, again.append) == found
    assert told[0].startswith("compiling") and again[0].startswith("compiled before")
    (path,) = directory.iterdir()
    where = found.config, CPU.name, estimate.compiler_versions()
    assert store.kept(*where).argument_bytes == found.step.argument_bytes
    path.write_bytes(path.read_bytes()[:100])
    assert store.kept(*where) is None
    made = CompiledText("", 1, 2, 3, 4.0)
    store.keep(*where, made)
    assert store.kept(*where) == made


def test_what_matters_is_in_the_key():
    def key(*overrides):
        return store._key(load_config("tiny", overrides), "cpu:8", {"jax": "1"})

    assert key() == key("run_dir=elsewhere", "train.steps=7", "data.seed=3")
    assert len({key(), key("model.remat=full"), key("parallel.expert=2"), key("train.batch_size=8")}) == 4


def test_reports_fit_a_terminal(planned, tmp_path):
    found, _, _ = planned
    step, run = found.step, run_figures(found.config, CPU, 0.5)
    texts = [report.step_report(found.config, CPU, step), report.run_report(found.config, CPU, run, 0.1)]
    texts += [report._time(step), report._largest(step)]  # which a CPU's report leaves out
    assert max(len(line) for text in texts for line in text.splitlines()) <= 100
    draw(step, "tiny", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_carried_on_in_a_straight_line(planned):
    step = planned[0].step
    more = dataclasses.replace(step, seconds=step.seconds + 2, temporary_bytes=step.temporary_bytes + 10)
    further = carried_on(step, more, 5)
    assert further.seconds == pytest.approx(step.seconds + 2 * 6)
    assert further.temporary_bytes == step.temporary_bytes + 10 * 6
    assert (further.argument_bytes, further.memory_bytes) == (step.argument_bytes, step.memory_bytes)


def test_parts_are_part_of_a_search():
    """A preset's own number of parts may divide the batch on its own mesh alone."""
    found = candidates(load_config("tiny", ["train.batch_size=16", "train.gradient_accumulation_steps=16"]), CPU)
    one, two = [next(each for each in found if each.name == f"fsdp=2 expert=4, remat=full, {n} parts") for n in (1, 2)]
    assert one.bytes > two.bytes and one.seconds < two.seconds


@pytest.mark.parametrize(
    "said",
    ["Ran out of memory in memory space hbm. Used 106.39G of 95.74G hbm. Exceeded hbm capacity by 10.65G.",
     "Ran out of memory on HBM, the total memory required for HLO temporaries (106.39G) exceeds available HBM (95.74G)."],
)  # fmt: skip
def test_a_step_too_large_is_one_line(said):
    """In both forms in which XLA for TPUs says so; an error that says something else is left as it is."""
    told = str(estimate.too_large(RuntimeError(said), CPU))
    assert told.startswith("does not fit cpu:8: a device needs 106.39GB of 95.74GB; take more devices")
    other = RuntimeError("no such device")
    assert estimate.too_large(other, CPU) is other


@pytest.mark.parametrize(
    "words, told",
    [
        (["--config", "tiny", "--topology", "v9:8"], "known are v5e"),
        (["--config", "tiny", "--search"], "--search: needs --topology"),
        (["--config", "tiny", "--topology", "cpu:8", "parallel.expert=3", "parallel.data=-1"], "parallel"),
        (
            ["--config", "tiny", "--topology", "cpu:8", "--layers", "9", "train.batch_size=8"],
            "--layers 9: for this model and mesh it must be from 3 to 3",
        ),
    ],
)
def test_mistakes_are_one_line(words, told):
    done = run_plan(*words)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and told in done.stderr


def test_figures_alone(tmp_path):
    done = run_plan("--config", "large_671b", "--json", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    assert "671,026,404,352 parameters, 37,552,282,624 active" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert json.loads((tmp_path / "plan.json").read_text())["model"]

"""What a run remembers of itself, what may change when it goes on, and that no two runs share a directory."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.compilation import OPTIONS, SPARSE_CORES, cache_directory, compiler_options, keep_programs
from deepseek_jax.config import Config, ConfigError, Phase, TrainConfig, load_config
from deepseek_jax.training.lock import LOCK_FILE, sole_use
from deepseek_jax.training.resume import changed_fields, check_changes, saved_sections
from deepseek_jax.training.schedules import Position, plan_steps
from parity_tests.conversions import turn_a_bit
from parity_tests.test_training import SCHEDULES


@pytest.mark.parametrize("train", SCHEDULES[:4])
@pytest.mark.parametrize("stop", [1, 7, 19])
def test_a_plan_goes_on_from_any_step(train, stop):
    plans, position = list(plan_steps(train)), Position()
    for plan in plans[:stop]:
        position = position.after(plan, windows=10)
    assert list(plan_steps(train, position)) == plans[stop:]
    assert position.tokens == plans[stop].tokens - plans[stop].batch_size * train.sequence_length
    assert position.epochs == pytest.approx(sum(plan.batch_size for plan in plans[:stop]) / 10)


def test_the_past_is_counted_and_not_derived():
    """16 steps of 4, then of 8: no sequence is left out, and no token counted twice."""
    train = TrainConfig(steps=20, sequence_length=32, batch_size=4, learning_rate_decay=[Phase(1.0)])
    position = Position()
    for plan in list(plan_steps(train))[:16]:
        position = position.after(plan)
    following = next(plan_steps(dataclasses.replace(train, batch_size=8), position))
    assert (following.step, following.first_sequence, following.tokens) == (17, 64, 64 * 32 + 8 * 32)
    assert position.epochs == 0, "of a text whose length was not told"


def config(*overrides: str) -> Config:
    return load_config("tiny", [*overrides, "run_dir=here"])


def saved(of: Config) -> dict:
    return {"model": dataclasses.asdict(of.model), **saved_sections(of)}


def test_changes_are_named_and_refused_until_allowed():
    then = config("train.steps=8", "train.learning_rate=0.003")
    now = config("train.steps=16", "train.learning_rate=0.003", "train.batch_size=8", "train.eval_every=7", "parallel.data=1")
    position = Position(8, 32, 1024)
    assert changed_fields(saved(then), now) == {"train.steps": (8, 16), "train.batch_size": (4, 8)}
    refused = (
        r"^here: train.steps was 8 and is 16, train.batch_size was 4 and is 8 \(learning_rate of step 9: 0.00\d+, where the "
        r"schedule as it was had come to 0.0003; batch_size of step 9: 8, where the schedule as it was had come to 4\); "
        r"give what was, or go on with what is by --allow train.steps --allow train.batch_size$"
    )
    with pytest.raises(ConfigError, match=refused):
        check_changes(saved(then), now, (), position)
    with pytest.raises(ConfigError, match=r"^here: train.batch_size was 4"):
        check_changes(saved(then), now, ["train.steps"], position)
    told = check_changes(saved(then), now, ["train.steps", "train.batch_size"], position)
    assert told[0] == "train.steps: 8 until now, 16 from now on"
    assert any(line.startswith("learning_rate of step 9: 0.00") and line.endswith("had come to 0.0003") for line in told)
    assert check_changes(saved(then), config("train.steps=8", "train.learning_rate=0.003"), (), position) == []


def test_what_learns_is_kept():
    """Moments are of what learns: no word allows another choice."""
    now = config("train.trainable=['lm_head/*']")
    with pytest.raises(
        ConfigError, match=r"train.trainable was None and is \['lm_head/\*'\], which a run keeps; .*init_from="
    ):
        check_changes(saved(config()), now, ["train.trainable"], Position(step=8, tokens=8))


def test_a_field_that_a_checkpoint_lacks_had_its_default():
    then = saved(config())
    del then["train"]["weight_decay"]
    assert changed_fields(then, config()) == {}
    assert changed_fields(then, config("train.weight_decay=0.2")) == {"train.weight_decay": (0.1, 0.2)}
    assert changed_fields({"model": then["model"]}, config("train.steps=3")) == {}, "a converted model was not trained here"


def test_what_a_disk_changes_is_noticed(run, tmp_path):
    """Of the item that is read, and of that alone."""
    from deepseek_jax.training.checkpoint import Checkpoints, DamagedCheckpoint

    shutil.copytree(run, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", load_config(run / "config.yaml"))
    step, *_ = checkpoints.steps()
    checkpoints.restore_variables(step)
    (tmp_path / "run" / "checkpoints" / str(step) / "optimizer" / "_METADATA").write_text("{}")
    checkpoints.restore_variables(step)
    with pytest.raises(DamagedCheckpoint, match=r"optimizer/_METADATA is not as it was written$"):
        checkpoints.restore(step)
    victim = turn_a_bit(tmp_path / "run" / "checkpoints" / str(step))
    with pytest.raises(DamagedCheckpoint, match=f"{victim} is not as it was written$"):
        checkpoints.restore_variables(step)


HOLD = """
import sys, time
from pathlib import Path
from deepseek_jax.training.lock import sole_use
with sole_use(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_one_directory_one_run(tmp_path):
    """Until its holder is gone, even by SIGKILL."""
    run_dir = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, run_dir], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"run: process {holder.pid} on .* is at work there"), sole_use(run_dir):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (run_dir / LOCK_FILE).exists()
    with sole_use(run_dir):
        (run_dir / "kept").touch()
    assert [path.name for path in run_dir.iterdir()] == ["kept"]


def test_an_empty_directory_is_not_left_behind(tmp_path):
    with pytest.raises(CheckpointError), sole_use(tmp_path / "run"):
        raise CheckpointError("no text")
    assert not (tmp_path / "run").exists()


def test_options_that_a_compiler_does_not_know_are_left_out(monkeypatch):
    """Another version's names must not stop a run."""
    known, more = dict(OPTIONS["cpu"]), {"xla_cpu_enable_fast_math": "True"}
    monkeypatch.setitem(OPTIONS, "cpu", {**known, "xla_cpu_an_option_of_tomorrow": "true"})
    monkeypatch.setitem(SPARSE_CORES, "cpu", more)
    assert compiler_options.__wrapped__(jax.local_devices()[0]) == known | more
    assert compiler_options.__wrapped__(jax.local_devices()[0], sparse_cores=False) == known


def test_programs_that_cannot_be_kept_cost_a_line(tmp_path, capsys, monkeypatch):
    import jax

    names = ("dir", "max_size")
    fields = *(f"jax_compilation_cache_{name}" for name in names), "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in fields}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").touch()
        keep_programs(str(tmp_path / "file"))
        assert jax.config.values["jax_compilation_cache_dir"] is None
        assert capsys.readouterr().err.count("\n") == 1
        keep_programs(None)
        assert not (tmp_path / "cache").exists()
        half_written = cache_directory("auto") / "jit_step-0-cache"
        half_written.parent.mkdir(parents=True)
        half_written.touch()
        keep_programs("auto")
        assert not half_written.exists()
        kept = Path(jax.config.values["jax_compilation_cache_dir"])
        assert kept == cache_directory("auto") and kept.is_dir() and tmp_path / "cache" in kept.parents
    finally:
        for name, value in before.items():
            jax.config.update(name, value)

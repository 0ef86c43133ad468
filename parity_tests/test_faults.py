"""What may go wrong around a run: each costs one line, and never what was saved before."""

import atexit
import errno
import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from deepseek_jax import compilation
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.compilation import keep_programs
from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.errors import UserError, run_command
from deepseek_jax.training import checkpoint as jax_checkpoint
from deepseek_jax.training.loading import load_run
from deepseek_jax.training.lock import sole_use
from deepseek_jax.training.metrics import check_metrics
from deepseek_jax.training.schedules import Position
from deepseek_torch.training.checkpoint import restore_state, save_state, saved_steps
from deepseek_torch.training.step import init_state

SMALL = ["model.num_hidden_layers=2", "model.num_nextn_predict_layers=0"]


@pytest.fixture
def small_files():
    """No file may be longer than 10 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_state_before(tmp_path, request):
    of = load_config("tiny", [f"run_dir={tmp_path}", *SMALL])
    state = init_state(of)
    save_state(of, Position(1, 4, 128), state)
    request.getfixturevalue("small_files")
    with pytest.raises(CheckpointError, match=r"training.safetensors: cannot be written: .*[Ff]ile too large") as error:
        save_state(of, Position(2, 8, 256), state)
    assert "\n" not in str(error.value)
    assert saved_steps(tmp_path / "states") == [1] and len(list((tmp_path / "states").iterdir())) == 1
    assert restore_state(of, state, ()) == Position(1, 4, 128)


def test_a_full_disk_is_told_before_anything_is_written(run, tmp_path, monkeypatch):
    of = load_config(run / "config.yaml")
    checkpoints = jax_checkpoint.Checkpoints(tmp_path, of)
    monkeypatch.setattr(jax_checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    told = r"could not save: no space left on the disk: 1[67]\.\d MB needed, 1.0 MB free; no checkpoint is complete$"
    with pytest.raises(CheckpointError, match=told):
        checkpoints.save(Position(1), SimpleNamespace(params={"w": np.zeros(10)}, router_state={}, optimizer={}).params)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)

    def command():
        with sole_use(tmp_path / "run"):
            raise AssertionError("it is not to be")

    with pytest.raises(SystemExit, match="1"):
        run_command(command)
    assert capsys.readouterr().err == f"error: {tmp_path}/run: Read-only file system\n"


def test_metrics_of_another_run_are_refused(tmp_path, capsys):
    check_metrics(tmp_path, 20, 2560)
    file = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"step": step, "tokens": 128 * step}) + "\n" for step in (10, 20, 30))
    file.write_text(lines + '{"step": 31, "tok')
    check_metrics(tmp_path, 20, 2560)
    check_metrics(tmp_path, 5, 640)
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"of another run: its step 20 saw 2,560 tokens and the checkpoint's step 20 5,120"):
        check_metrics(tmp_path, 20, 5120)
    with pytest.raises(ConfigError, match=r"of another run: its step 30 saw 3,840 tokens and the checkpoint's step 40 2,560"):
        check_metrics(tmp_path, 40, 2560)
    check_metrics(tmp_path, 40, 5120)
    assert capsys.readouterr().out.startswith(f"{file}: lacks steps 31 to 40; ")
    for line in ('{"epoch": 1}', "[]", "no JSON", "\udcff"):
        file.write_text('{"step": 1, "tokens": 128}\n' + line + "\n" + lines, errors="surrogateescape")
        with pytest.raises(ConfigError, match=r"metrics.jsonl:2: is no line of a run's metrics; move the file away$"):
            check_metrics(tmp_path, 1, 128)


def test_an_unknown_step_is_refused(run):
    with pytest.raises(UserError, match=r"^--step 999: .*wide has checkpoints of step 7$"):
        load_run(run, 999)


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    """Time is measured by a clock that no one sets."""
    from deepseek_jax.training.goodput import Times, goodput

    times = Times()
    times.start(tmp_path)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: 0)
    times.stepped(1, skipped=False)
    times.write(1)
    seconds = goodput(tmp_path, 1)
    assert 0 <= seconds["trained"] <= seconds["all"] < 60


def test_a_damaged_program_is_compiled_again(tmp_path, capsys, monkeypatch):
    """One that JAX cannot read, and one of which a bit has turned, which it might take."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_max_size")
    before = {name: jax.config.values[name] for name in names}
    exits = []
    monkeypatch.setattr(atexit, "register", lambda *call: exits.append(call))
    monkeypatch.setattr(compilation, "CACHE_SECONDS", 0)

    def result():
        """In a process that begins now."""
        jax.config.update(names[0], None)
        keep_programs(str(tmp_path))
        jax.clear_caches()
        found = jax.jit(lambda x: x * 3 + 1)(np.arange(5.0)).tolist()
        ends, *words = exits.pop()
        ends(*words)
        return found

    def programs():
        return list(tmp_path.rglob("*-cache"))

    try:
        expected = result()
        (sums,) = tmp_path.rglob("sums.json")
        assert programs() and json.loads(sums.read_text()).keys() == {program.name for program in programs()}
        for program in programs():
            content = bytearray(program.read_bytes())
            content[len(content) // 2] ^= 4
            program.write_bytes(content)
        damaged = {str(program) for program in programs()}
        assert result() == expected
        told = capsys.readouterr().err.splitlines()
        assert {line.partition(": not as it was written; ")[0] for line in told} == damaged
        assert result() == expected and capsys.readouterr().err == "", "it was written anew"
        sums.unlink()
        for program in programs():
            program.write_bytes(program.read_bytes()[: len(program.read_bytes()) // 2])
        with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
            assert result() == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

"""Checkpoints on a host's own disk: bit for bit on the same mesh, refused elsewhere, passed over where damaged."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.config import ParallelConfig, load_config
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.train import train
from deepseek_jax.training.local_checkpoint import LocalCheckpoints
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.step import init_state
from parity_tests.conversions import turn_a_bit


def config(tmp_path, **parallel):
    of = load_config("tiny", [f"train.local_checkpoint_dir={tmp_path / 'local'}", "train.adam_moment_dtype=bfloat16"])
    return dataclasses.replace(of, parallel=ParallelConfig(**{"data": 1} | parallel))


def filled(of):
    """Any state of the config, and its shardings."""
    fresh = jax.eval_shape(partial(init_state, of))
    division = Division(of.parallel, fresh.params) if of.parallel != ParallelConfig(data=1) else None
    shardings = division and division.shardings(fresh, make_optimizer(of.train, of.model, division))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: rng.integers(0, 100, leaf.shape).astype(leaf.dtype), fresh)
    return jax.device_put(state, shardings), shardings


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "expert": 2}])
def test_there_and_back_bit_for_bit(tmp_path, mesh):
    of = config(tmp_path, **mesh)
    state, shardings = filled(of)
    local = LocalCheckpoints(of, tmp_path / "run")
    for step in (20, 40, 60):
        local.save(Position(step, 4 * step, 128 * step, 0.5), state)
    again = LocalCheckpoints(of, tmp_path / "run", shardings)
    assert again.steps() == [60, 40]
    assert again.meta(60)["position"] == {"step": 60, "sequences": 240, "tokens": 7680, "epochs": 0.5}
    restored = again.restore(60)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert one.sharding == other.sharding and one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    (file,) = (tmp_path / "local").glob("*/process-0/60/state/part.safetensors")
    assert held <= file.stat().st_size < 1.5 * held, "what devices have in common is kept once"


def test_what_does_not_fit_or_is_damaged_is_told(tmp_path, capsys):
    of = config(tmp_path)
    state, _ = filled(of)
    local = LocalCheckpoints(of, tmp_path / "run")
    local.save(Position(20), state)
    with pytest.raises(CheckpointError, match=r"20: is of another mesh, .*'data': 1"):
        LocalCheckpoints(config(tmp_path, data=2), tmp_path / "run").meta(20)
    (folder,) = (tmp_path / "local").glob("*/process-0")
    victim = turn_a_bit(folder / "20", "state")
    with pytest.raises(CheckpointError, match=f"20: {victim} is not as it was written"):
        local.meta(20)
    assert LocalCheckpoints(of, tmp_path / "other").steps() == []
    local.clear()
    assert local.steps() == []
    (tmp_path / "file").touch()
    elsewhere = dataclasses.replace(of, train=dataclasses.replace(of.train, local_checkpoint_dir=str(tmp_path / "file")))
    LocalCheckpoints(elsewhere, tmp_path / "run").save(Position(20), state)
    assert capsys.readouterr().err.count("train.local_checkpoint_dir: step 20 is not kept: ") == 1


def test_all_that_is_told_of_a_step_is_told_before_it_is_saved(tmp_path, text_file, monkeypatch):
    """Who goes on from there neither takes nor evaluates that step again."""
    told, save = {}, LocalCheckpoints.save

    def look_and_save(self, position, state):
        told[position.step] = [key for line in read_metrics(tmp_path / "run") if line["step"] == position.step for key in line]
        save(self, position, state)

    monkeypatch.setattr(LocalCheckpoints, "save", look_and_save)
    words = ["model.num_hidden_layers=1", "model.num_nextn_predict_layers=0", "train.sequence_length=8", "train.steps=5",
             "train.eval_every=2", "train.local_checkpoint_every=2", f"train.local_checkpoint_dir={tmp_path / 'local'}",
             f"data.input={text_file}", f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    train(load_config("tiny", words))
    assert sorted(told) == [2, 4] and all({"loss", "bits_per_byte"} < set(keys) for keys in told.values()), told

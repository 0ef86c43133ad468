"""The average of the weights: its definition, on devices and hosts, saved, and exported."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from deepseek_jax.checkpoint.orbax_step import AVERAGE
from deepseek_jax.checkpoint.pretrained import load_pretrained
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.config import ConfigError, TrainConfig, load_config
from deepseek_jax.convert import convert
from deepseek_jax.parallel.mesh import make_mesh, resolve
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.planning.figures import checkpoint_bytes, count_parameters
from deepseek_jax.training.average import HOST_MEMORY, Average, places
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.step import init_state
from deepseek_torch.train import train as train_in_torch


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("on_mesh", [False, True])
def test_it_is_what_its_name_says(on_mesh, on_host):
    """Of weights that each step takes over, and a skipped step counts for nothing."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data")) if on_mesh else SingleDeviceSharding(jax.devices()[0])
    rng, expected = np.random.default_rng(0), None
    step = jax.jit(lambda params, change: jax.tree.map(jnp.add, params, change), donate_argnums=0)
    with jax.enable_x64(True):
        params = {"lm_head": jax.device_put(rng.standard_normal((16, 3)), sharding)}
        expected = np.array(params["lm_head"])
        average = Average(TrainConfig(ema_decay=0.75, ema_on_host=on_host), params)
        for number in range(5):
            params = step(params, {"lm_head": rng.standard_normal((16, 3))})
            average.update(params, jnp.asarray(number == 3))
            if number != 3:
                expected = 0.75 * expected + 0.25 * np.array(params["lm_head"])
        kept = average.params["lm_head"]
        assert kept.sharding.memory_kind == (HOST_MEMORY if on_host else "device")
        assert kept.sharding.is_equivalent_to(sharding, 2) or on_host
        assert np.allclose(kept, expected, rtol=1e-14)


def test_it_is_saved_restored_and_exported(tmp_path):
    """From hosts' memory, on a mesh, and there again; without one the export says so."""
    config = load_config("tiny", ["train.ema_decay=0.9", "train.ema_on_host=true", "parallel.fsdp=2"])
    shapes, rng = jax.eval_shape(partial(init_state, config)), np.random.default_rng(0)
    parallel = resolve(config, 2)
    division = Division(parallel, shapes.params, make_mesh(parallel, jax.devices()[:2]))
    shardings = division.shardings(shapes, make_optimizer(config.train))
    state = jax.tree.map(lambda leaf, sharding: jax.device_put(np.ones(leaf.shape, leaf.dtype), sharding), shapes, shardings)
    where = places(config.train, state.params)
    numbers = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes.params)
    checkpoints = Checkpoints(tmp_path, config, shardings)
    checkpoints.save(Position(3, 12, 384), state, jax.tree.map(jax.device_put, numbers, where))
    checkpoints.wait()
    found = checkpoints.restore_average(3, where)
    assert all(leaf.sharding.memory_kind == HOST_MEMORY for leaf in jax.tree.leaves(found))
    saved = tmp_path / "checkpoints" / "3"
    convert(saved, tmp_path / "hf", ema=True, verify=True)
    _, variables = load_pretrained(tmp_path / "hf")
    for tree in (found, variables["params"]):
        assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(tree), jax.tree.leaves(numbers), strict=True))
    shutil.rmtree(saved / AVERAGE)
    assert checkpoints.restore_average(3, where) is None
    with pytest.raises(CheckpointError, match=r"3: holds no average of the weights; a run keeps one by train.ema_decay=0.999"):
        convert(saved, tmp_path / "other", ema=True)
    with pytest.raises(CheckpointError, match=r"hf: --ema is of a run that has train.ema_decay"):
        convert(tmp_path / "hf", tmp_path / "other", ema=True)


def test_a_checkpoints_size_counts_it():
    sizes = (checkpoint_bytes(load_config("tiny", [f"train.ema_decay={decay}"])) for decay in (0, 0.9))
    count = count_parameters(load_config("tiny").model)
    without, with_one = (each["training state"] for each in sizes)
    assert with_one - without == 4 * (count.total + count.mtp)


def test_where_there_is_none_is_one_line():
    with pytest.raises(ConfigError, match=r"train.ema_decay=1.0: must be in \[0, 1\)"):
        load_config("tiny", ["train.ema_decay=1"])
    with pytest.raises(ConfigError, match=r"train.ema_decay=0.9: local checkpoints hold no average of the weights; give"):
        load_config("tiny", ["train.ema_decay=0.9", "train.local_checkpoint_dir=/dev/shm"])
    with pytest.raises(ConfigError, match=r"train.ema_decay=0.9: this sibling keeps no average of weights; give 0"):
        train_in_torch(load_config("tiny", ["train.ema_decay=0.9"]))

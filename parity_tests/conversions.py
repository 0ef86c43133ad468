"""What tests of conversion share: a run, changed copies of a checkpoint, and the command."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from deepseek_jax.checkpoint.forms import dtype_name
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory
from deepseek_jax.checkpoint.safetensors_writer import write_tensors
from deepseek_jax.checkpoint.tensors import TensorSpec
from deepseek_jax.config import Config, TrainConfig, to_yaml
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.training.checkpoint import Checkpoints
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.schedules import Position
from deepseek_jax.training.step import TrainState
from parity_tests.checkpoints import random_variables

TEXT = "Once upon a time there was a checkpoint; it went from one framework to another and lost nothing. " * 40


def make_run(path, model, step=7, variables=None):
    """A run as training leaves it: config, tokenizer, and a checkpoint with moments."""
    config = Config(model=model, train=TrainConfig(sequence_length=16), run_dir=str(path))
    variables = variables or random_variables(model)
    optimizer = make_optimizer(config.train).init(variables["params"])
    checkpoints = Checkpoints(path, config)
    checkpoints.save(Position(step), TrainState(variables["params"], variables["router_state"], optimizer))
    checkpoints.wait()
    (path / "config.yaml").write_text(to_yaml(config))
    train_tokenizer([TEXT], model.vocab_size).save(str(path / "tokenizer.json"))
    return path


def turn_a_bit(step, item="variables"):
    """In the largest file of an item of a checkpoint; its path within the checkpoint."""
    files = (path for path in (step / item).rglob("*") if path.is_file())
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return victim.relative_to(step)


def assert_same_tree(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def fails(*words):
    """The next call fails with one line that has all these words in it."""

    class Caught:
        def __enter__(self):
            self.raises = pytest.raises(UserError)
            self.info = self.raises.__enter__()
            return self.info

        def __exit__(self, *error):
            swallowed = self.raises.__exit__(*error)
            message = str(self.info.value)
            assert "\n" not in message
            for word in words:
                assert word in message, message
            return swallowed

    return Caught()


def rewritten(source, destination, change):
    """A copy of a Hugging Face directory, its tensors changed by `change`, which is given them by name."""
    tensors = SafetensorsDirectory(source)
    arrays = {name: tensors.read(name) for name in tensors.names}
    change(arrays)
    destination.mkdir()
    shutil.copyfile(source / "config.json", destination / "config.json")
    specs = [TensorSpec(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items()]
    write_tensors(destination, specs, arrays.values())
    return destination


def with_config(source, destination, **changes):
    """A copy of a Hugging Face directory with other values in config.json; None takes a key away."""
    shutil.copytree(source, destination)
    content = json.loads((source / "config.json").read_text()) | changes
    (destination / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return destination


def command(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "deepseek_jax.convert", *map(str, arguments)], capture_output=True, text=True
    )
    return result.returncode, result.stdout, result.stderr

"""A CUDA plugin without a GPU is not heard of; whatever else is written is shown."""

import os
import subprocess
import sys
from pathlib import Path

PLUGIN = """
import os
os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
os.write(2, b"I0000 00:00:1 2 cudart_stub.cc:31] Could not find cuda drivers on your machine\\n")

def initialize():
    os.write(2, b"I0000 00:00:1 2 cudart_stub.cc:31] Could not find cuda drivers on your machine\\n")
    os.write(2, b"E0000 00:00:1 2 other.cc:3] something else is wrong\\n")
    raise RuntimeError("Unable to load CUDA. Is it installed?")
"""
COMMAND = """
import os
exists = os.path.exists
os.path.exists = lambda path: {gpu} if str(path).startswith("/dev/") else exists(path)
import deepseek_jax
import jax
jax.devices()
"""


def heard(folder: Path, gpu: bool) -> str:
    """What stands on stderr of a command that looks for devices."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", COMMAND.format(gpu=gpu)], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert result.returncode == 0
    return result.stderr


def test_only_what_matters_is_heard_of_a_plugin_without_a_gpu(tmp_path):
    (tmp_path / "jax_plugins" / "cuda_of_this_test").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "cuda_of_this_test" / "__init__.py").write_text(PLUGIN)
    (tmp_path / "this_test-1.dist-info").mkdir()
    entry = "[jax_plugins]\ncuda_of_this_test = jax_plugins.cuda_of_this_test\n"
    (tmp_path / "this_test-1.dist-info" / "entry_points.txt").write_text(entry)
    assert heard(tmp_path, gpu=False) == "E0000 00:00:1 2 other.cc:3] something else is wrong\n"
    with_gpu = heard(tmp_path, gpu=True)
    assert with_gpu.count("Could not find cuda drivers") >= 2 and "Unable to load CUDA. Is it installed?" in with_gpu

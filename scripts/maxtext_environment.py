"""MaxText beside this package: an environment of its own, and steps compiled in it, kept from one call to the next."""

import gzip
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.errors import UserError
from deepseek_jax.planning.step import CompiledText
from deepseek_jax.planning.store import store_directory
from deepseek_jax.planning.topologies import Topology, make_devices

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-maxtext"
PYTHON = FOLDER / "bin" / "python"

JAX = "0.11.1"
BASE = """flax>=0.12.9 optax orbax-checkpoint grain ml_collections aqtp qwix omegaconf pydantic chex etils absl-py psutil
tensorboardX"""
BESIDE = """datasets transformers jaxtyping pillow jsonlines sentencepiece tiktoken pathwaysutils parameterized tokamax drjax
jinja2 sympy requests"""
PACKAGES = {
    "all": [
        ["--upgrade", "pip"],
        [f"jax[tpu]=={JAX}", *BASE.split()],
        ["--no-deps", "maxtext==0.2.5"],  # the versions that it asks for do not go together
        BESIDE.split(),
    ],
    "gpu": [[f"jax-cuda12-plugin=={JAX}", f"jax-cuda12-pjrt=={JAX}", "nvidia-cuda-nvcc-cu12"]],
}
"""Platform -> the arguments of each call of pip."""

Tell = Callable[[str], None]


def compiled_by_maxtext(topology: Topology, fields: Sequence[str], tell: Tell) -> tuple[CompiledText, Mesh]:
    """A step compiled by MaxText or kept from before, and its mesh.

    Args:
        topology: to compile for.
        fields: of MaxText's config, key=value.

    Raises:
        UserError: there is no Python 3.12, pip fails, or MaxText does.
    """
    ensure_environment(topology.machine.platform, tell)
    file = store_directory() / f"maxtext-{_key(topology, fields)}.json.gz"
    if not file.exists():
        tell(f"MaxText compiles for {topology.name}; this takes minutes for large models")
        _compile(file, topology, fields)
    content = json.loads(gzip.decompress(file.read_bytes()))
    compiled = CompiledText(**content["compiled"])
    tell(f"MaxText's step, compiled in {compiled.compile_seconds:.0f} s, is kept in {file}; reading it")
    return compiled, _mesh(content["mesh"], topology)


def ensure_environment(platform: str, tell: Tell) -> None:
    """Make MaxText's environment, or what a platform needs of it, unless it is there."""
    for name in ("all", platform):
        packages = PACKAGES.get(name, [])
        stamp, wanted = FOLDER / f".installed-{name}", json.dumps(packages)
        if not packages or (stamp.exists() and stamp.read_text(encoding="utf-8") == wanted):
            continue
        if not PYTHON.exists():
            base = find_python()
            tell(f"making {FOLDER} with {base}")
            _run([base, "-m", "venv", str(FOLDER)], "no environment could be made")
        tell(f"installing MaxText's packages into {FOLDER}; this takes minutes")
        for words in packages:
            _run([str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words], "pip failed")
        stamp.write_text(wanted, encoding="utf-8")


def find_python() -> str:
    """Python 3.12, which MaxText 0.2.5 wants: on PATH, or of pyenv.

    Raises:
        UserError: there is none.
    """
    of_pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for candidate in [shutil.which("python3.12"), *sorted(map(str, of_pyenv.glob("3.12*/bin/python3.12")))]:
        if candidate and not subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True).returncode:
            return candidate
    raise UserError(
        "MaxText 0.2.5 needs Python 3.12 with venv: install it so that python3.12 is on PATH, or `pyenv install 3.12`"
    )


def _compile(file: Path, topology: Topology, fields: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [str(PYTHON), str(ROOT / "scripts" / "maxtext_step.py"), str(file), topology.name, *fields]
    ours = ("JAX_", "XLA_", "TPU_", "PYTHON")  # among them the way to our own libtpu
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    with tempfile.TemporaryDirectory() as folder:  # it leaves files where it runs
        _run(command, "MaxText failed", env=environment | {"PYTHONPATH": str(ROOT)}, cwd=folder)


def _run(command: list[str], failure: str, **options: Any) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
        error = next((line for line in reversed(said) if "Error" in line or "ERROR" in line), said[-1])
        raise UserError(f"{failure}: {error.strip()[:400]}")


def _key(topology: Topology, fields: Sequence[str]) -> str:
    """Of all that decides what MaxText compiles."""
    (packages,) = FOLDER.glob("lib/python3.*/site-packages")
    names = {"maxtext", "jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "flax", "optax", "tokamax"}
    versions = {one.name: one.version for one in importlib.metadata.distributions(path=[str(packages)]) if one.name in names}
    content = json.dumps([topology.name, sorted(fields), versions, "temporaries as laid out"], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _mesh(written: dict[str, Any], topology: Topology) -> Mesh:
    """MaxText's mesh over our description of the same devices; axes of size one are left in."""
    by_number = {device.id: device for device in make_devices(topology)}
    devices = np.array([by_number[number] for number in written["devices"]], dtype=object)
    return jax.sharding.Mesh(devices.reshape(written["sizes"]), tuple(written["axes"]))

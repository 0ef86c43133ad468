"""Devices to compile for that need not be there: TPU slices, GPU clusters, and this machine's CPU cut in several.

What is set in the environment must be set before JAX is imported, so this module imports it late.
"""

import importlib
import importlib.metadata
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax.config import ConfigError
from deepseek_jax.planning.machines import MACHINES, Machine

KNOWN = "v5e:4x4, v5p:8x8x8, v6e:4x4, tpu7x:4x4x4 (chips along each side), h100:8, h200:8, b200:64x8 (hosts x GPUs), cpu:8"


class Topology(NamedTuple):
    """A named set of devices."""

    name: str
    machine: Machine
    sides: tuple[int, ...]
    """Chips along each side of a TPU slice; hosts and GPUs of each; CPU devices."""

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return math.prod(self.sides) * self.machine.devices_per_chip

    @property
    def per_host(self) -> int:
        """GPUs whose fast links join them."""
        return self.sides[-1]


def read_topology(name: str) -> Topology:
    """A topology by its name, such as `v5p:8x8x8`.

    Raises:
        ConfigError: nothing of that name is known.
    """
    kind, _, layout = name.partition(":")
    machine = MACHINES.get(kind)
    if machine is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout):
        raise ConfigError(f"--topology {name}: not known; known are {KNOWN}")
    sides = tuple(int(side) for side in layout.split("x"))
    most = {"tpu": 3, "gpu": 2, "cpu": 1}[machine.platform]
    least = {"v5p": 3, "tpu7x": 3, "v5e": 2, "v6e": 2}.get(kind, 1)
    if not least <= len(sides) <= most:
        raise ConfigError(f"--topology {name}: {kind} has {'x'.join('N' * max(least, 1))} devices; known are {KNOWN}")
    if machine.platform == "gpu":
        sides = (1, *sides)[-2:]
    return Topology(name, machine, sides)


def prepare_environment(topology: Topology) -> None:
    """Set what JAX and the compilers read when they are first imported.

    Raises:
        ConfigError: the compiler for that topology is not installed.
    """
    platform = topology.machine.platform
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = [os.environ.get("XLA_FLAGS", "")]
    if platform == "tpu":
        _require("libtpu", "plan-tpu", topology)
        os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    elif platform == "gpu":
        _require("jax_cuda12_plugin", "plan-gpu", topology)
        _require("nvidia.cuda_nvcc", "plan-gpu", topology)
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        tools = Path(str(importlib.import_module("nvidia.cuda_nvcc").__path__[0]))
        flags += [f"--xla_gpu_cuda_data_dir={tools}", "--xla_gpu_collect_cost_model_stats=true"]
    else:
        flags.append(f"--xla_force_host_platform_device_count={topology.devices}")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()


def make_devices(topology: Topology) -> list[Any]:
    """The topology's devices, for a mesh; after `prepare_environment`.

    Raises:
        ConfigError: the compiler does not know such a slice; its own words.
    """
    import jax
    from jax.experimental import topologies

    platform = topology.machine.platform
    if platform == "cpu":
        return jax.devices("cpu")[: topology.devices]
    try:
        with quiet():
            if platform == "tpu":
                return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
            hosts, gpus = topology.sides
            target = (Path(__file__).parent / "targets" / f"{topology.machine.name}.txtpb").read_text(encoding="utf-8")
            described = topologies.get_topology_desc(
                topology.machine.name, "cuda", topology=f"1x{hosts}x{gpus}", target_config=target
            )
            return list(described.devices)
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError
        raise ConfigError(f"--topology {topology.name}: {str(error).splitlines()[0][:200]}; known are {KNOWN}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what compilers log to the process's stderr, which says nothing to a person here, from being shown."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def compiler_versions() -> dict[str, str]:
    """Of all packages that decide what a program is compiled to."""
    names = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "flax", "optax")
    return {name: importlib.metadata.version(name) for name in names if _is_installed(name)}


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _require(module: str, extra: str, topology: Topology) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        version = importlib.metadata.version("jax")
        raise ConfigError(
            f"--topology {topology.name}: its compiler is not installed; pip install 'deepseek-jax[{extra}]' jax=={version}"
        )

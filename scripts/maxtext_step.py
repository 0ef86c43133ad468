"""One training step compiled by MaxText, for `scripts/against_maxtext`, which runs this in MaxText's own environment.

    PYTHONPATH=. .venv-maxtext/bin/python scripts/maxtext_step.py FILE TOPOLOGY key=value ...

MaxText's `train_compile` does all of it, with two names of its own replaced: the devices are those that
`deepseek_jax.plan` compiles for, GPUs too, and what it compiled is written to FILE with the mesh that it chose. Its modules
leave no trace of themselves in a program, so each runs under the name of its class, as Flax's Linen modules do; that
changes names alone.
"""

import functools
import gzip
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

from deepseek_jax.planning.layout import reporting, temporary_bytes
from deepseek_jax.planning.topologies import make_devices, prepare_environment, read_topology

os.environ["DECOUPLE_GCLOUD"] = "TRUE"


NAMED = (
    "common.train_state_nnx.TrainStateNNX.apply_gradients", "utils.maxtext_utils.apply_gradient_clipping",
    "layers.moe.RoutedMoE.get_topk", "layers.nnx_decoders.NNXDecoder.apply_output_head",
    "utils.max_utils.cross_entropy_with_logits", "kernels.megablox.backend.gmm", "kernels.megablox.backend.tgmm",
)  # fmt: skip
"""What else of MaxText is to be told apart."""


def main() -> None:
    file, topology, fields = Path(sys.argv[1]), read_topology(sys.argv[2]), sys.argv[3:]
    prepare_environment(topology)
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    name_modules()
    compile_step = train_compile.jit_and_compile

    folder = tempfile.TemporaryDirectory()

    def compile_and_write(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        compiled = compile_step(*args, **kwargs)
        mesh = kwargs.get("mesh") or args[3]
        write(file, compiled, temporary_bytes(folder.name), mesh, time.monotonic() - start)
        return compiled

    train_compile.jit_and_compile = compile_and_write
    train_compile.get_topology_desc = lambda **_: SimpleNamespace(devices=make_devices(topology))
    train_compile.main([
        "train_compile", str(Path(maxtext.__file__).parent / "configs" / "base.yml"), *fields,
        "internal_compile=true", f"internal_compile_num_devices={topology.devices}",
        f"compile_topology={topology.name}", "compile_topology_num_slices=1",
        *(f"compile_xla_flags=--{name}={value}" for name, value in reporting(topology.machine.platform, folder.name).items()),
    ])  # fmt: skip


def name_modules() -> None:
    """Have every module of MaxText, and all of NAMED, leave its name in the paths of the operations that it makes."""
    from flax import nnx

    for module in subclasses(nnx.Module):
        if module.__module__.startswith("maxtext.") and "__call__" in vars(module):
            module.__call__ = named(module.__name__, module.__call__)
    for path in NAMED:
        *modules, name = path.split(".")
        owner = functools.reduce(getattr, modules[2:], importlib.import_module(".".join(["maxtext", *modules[:2]])))
        setattr(owner, name, named(name, getattr(owner, name)))


def subclasses(of: type) -> set[type]:
    """All of them, also those of subclasses."""
    direct = set(of.__subclasses__())
    return direct.union(*map(subclasses, direct))


def named(name: str, function: Callable) -> Callable:
    """`function`, within a scope of that name."""
    import jax

    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(name):
            return function(*args, **kwargs)

    return within


def write(file: Path, compiled: Any, laid_out: Optional[int], mesh: Any, seconds: float) -> None:
    """The fields of `planning.step.CompiledText`, and axes, sizes and device numbers of the mesh; whole or not at all."""
    memory = compiled.memory_analysis()
    content = {
        "compiled": {
            "text": compiled.as_text(),
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes if laid_out is None else laid_out,
            "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "compile_seconds": seconds,
        },
        "mesh": {
            "axes": list(mesh.axis_names),
            "sizes": list(mesh.devices.shape),
            "devices": [device.id for device in mesh.devices.flat],
        },
    }
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_bytes(gzip.compress(json.dumps(content).encode(), 5))
    os.replace(partial, file)


if __name__ == "__main__":
    main()

"""Compilers for GPUs and TPUs on machines that have none, where they are for planning: they are kept from saying so.

CUDA's plugin logs that it finds no driver, as JAX is imported and as JAX looks for devices, and no setting of its own
says otherwise, for it logs before logging is set up; JAX adds a traceback. libtpu complains of what it cannot find out.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
"""One of them is there with every NVIDIA driver: Linux', a container's, Windows'."""
GOOGLE = "0x1ae0"
"""Vendor of every TPU on a PCI bus."""
ANSWERS = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
"""What libtpu would ask the cloud for."""
INFO = re.compile(rb"I\d{4} |WARNING: All log messages before absl::InitializeLog")
"""How a native log line of that level begins; and the one line that comes before the first of any."""


def keep_quiet() -> None:
    """Have JAX say nothing of devices that are not there; to be called before it is imported."""
    plugins = {point.value for point in entry_points(group="jax_plugins") if "cuda" in point.name}
    if plugins and not any(map(os.path.exists, GPU_FILES)):
        sys.meta_path.insert(0, _Finder(plugins))
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    if find_spec("libtpu") is not None and GOOGLE not in (vendor.read_text().strip() for vendor in vendors):
        os.environ.update(ANSWERS | os.environ)


@contextmanager
def without_info() -> Iterator[None]:
    """Show what native code writes to stderr, less its lines of level INFO, when all is written."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            os.write(2, b"".join(line for line in written if not INFO.match(line)))


class _Finder(MetaPathFinder):
    """Finds JAX and these plugins of its where they are, with loaders that are quiet."""

    def __init__(self, plugins: set[str]):
        self._plugins = plugins

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "jax" and name not in self._plugins:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                with without_info():
                    load(module)
                if name in self._plugins:
                    module.initialize = _quiet(module.initialize)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _quiet(initialize: Callable[[], None]) -> Callable[[], None]:
    @wraps(initialize)
    def quiet() -> None:
        with without_info():
            try:
                initialize()
            except RuntimeError as error:
                if not str(error).startswith("Unable to load CUDA"):
                    raise

    return quiet

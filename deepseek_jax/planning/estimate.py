"""From a config and a topology to a plan: compile or find the step, read it, and extend it to the run."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.implementations import choose
from deepseek_jax.parallel.mesh import make_mesh, resolve
from deepseek_jax.parallel.pipeline import bubble
from deepseek_jax.planning.run import RunFigures, accumulated, run_figures
from deepseek_jax.planning.step import CompiledText, StepFigures, compile_text, read_step
from deepseek_jax.planning.store import keep, kept
from deepseek_jax.planning.topologies import Topology, compiler_versions, make_devices, quiet

Tell = Callable[[str], None]


class Estimate(NamedTuple):
    """A plan of one config on one topology."""

    config: Config
    """As it was compiled: mesh, parts and implementations named."""
    step: StepFigures
    run: RunFigures | None
    """None on CPUs, of which no times are known."""
    bubble: float | None
    """Share of the stages' time, if there are stages."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"step": self.step.as_dict(), "run": None if self.run is None else dataclasses.asdict(self.run)}


def estimate(config: Config, topology: Topology, tell: Tell) -> Estimate:
    """Plan a run.

    Args:
        tell: for what a person wants to know while it takes long.

    Raises:
        ConfigError: the mesh does not fit the devices, or the compiler says that the program does not fit their memory.
    """
    config = arranged(config, topology)
    return _read(config, topology, compiled(config, topology, tell))


def compiled(config: Config, topology: Topology, tell: Tell) -> CompiledText:
    """The step of an arranged config, as it was compiled before or compiled now.

    Raises:
        ConfigError: as `estimate`.
    """
    text = kept(config, topology.name, compiler_versions())
    if text is not None:
        tell(f"compiled before, in {text.compile_seconds:.0f} s")
        return text
    tell(f"compiling for {topology.name}; this takes minutes for large models")
    try:
        with quiet():
            text = compile_text(config, make_devices(topology))
    except Exception as error:  # of a class that only the compilers' plugins have
        raise too_large(error, topology) from None
    tell(f"compiled in {text.compile_seconds:.0f} s; reading it")
    keep(config, topology.name, compiler_versions(), text)
    return text


def _from_before(config: Config, topology: Topology) -> Estimate | None:
    config = arranged(config, topology)
    text = kept(config, topology.name, compiler_versions())
    return None if text is None else _read(config, topology, text)


def _read(config: Config, topology: Topology, text: CompiledText) -> Estimate:
    """The plan of an arranged config from its compiled step."""
    step = read_step(text, make_mesh(config.parallel, make_devices(topology)), topology, even_rows(config))
    return _estimate(config, topology, step)


def _estimate(config: Config, topology: Topology, step: StepFigures) -> Estimate:
    run = None if topology.machine.platform == "cpu" else run_figures(config, topology, step.seconds)
    return Estimate(config, step, run, _bubble(config))


def arranged(config: Config, topology: Topology) -> Config:
    """`config` as it would run there, at the whole batch: its mesh resolved, parts and implementations chosen."""
    count = topology.devices
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size_start=None))
    config = dataclasses.replace(config, parallel=resolve(config, count))
    return choose(accumulated(config, count), topology.machine.platform)


def even_rows(config: Config) -> int:
    """Rows that a device's experts serve at once under even routing: as many as its own tokens choose."""
    train, parallel = config.train, config.parallel
    sequences = train.batch_size // train.gradient_accumulation_steps // parallel_size(config)
    if parallel.pipe > 1:
        sequences = parallel.microbatch_size
    return sequences * train.sequence_length * config.model.num_experts_per_tok


def parallel_size(config: Config) -> int:
    """Devices of a resolved config."""
    parallel = config.parallel
    return parallel.pipe * parallel.data * parallel.fsdp * parallel.expert


def extrapolated(config: Config, topology: Topology, tell: Tell, layers: int) -> Estimate:
    """A plan from two compilations with `layers` and one fewer, every figure carried on in a straight line to all layers.

    Raises:
        ConfigError: as `estimate`; or the model has no such number of layers.
    """
    model = config.model
    least = model.first_k_dense_replace + 2
    if not least <= layers < model.num_hidden_layers:
        raise ConfigError(f"--layers {layers}: must be from {least} to {model.num_hidden_layers - 1} for this model")
    fewer, more = (
        estimate(dataclasses.replace(config, model=dataclasses.replace(model, num_hidden_layers=n)), topology, tell)
        for n in (layers - 1, layers)
    )
    step = _carried_on(fewer.step, more.step, model.num_hidden_layers - layers)
    whole = _from_before(config, topology)
    if whole is not None:
        time, memory = step.seconds / whole.step.seconds - 1, step.needed_bytes / whole.step.needed_bytes - 1
        tell(f"all layers were compiled before: this extrapolation is off by {time:+.1%} in time and {memory:+.1%} in memory")
    return _estimate(arranged(config, topology), topology, step)


def _carried_on(fewer: Any, more: Any, further: int) -> Any:
    """`more` and `further` times what it has more than `fewer`, number by number; rows that only one has stay as they are."""
    if isinstance(more, bool | str) or more is None:
        return more
    if isinstance(more, int | float):
        return type(more)(max(more + further * (more - fewer), 0))
    if dataclasses.is_dataclass(more) and not isinstance(more, type):
        same = ("memory_bytes", "compile_seconds", "slowest", "kernels", "fullest", "unknown_kernels", "open_loops")
        changed = {
            f.name: _carried_on(getattr(fewer, f.name), getattr(more, f.name), further)
            for f in dataclasses.fields(more)
            if f.name not in same
        }
        return dataclasses.replace(more, **changed)
    if isinstance(more, list):
        by_key = {_key(row): row for row in fewer}
        return [_carried_on(by_key[_key(row)], row, further) if _key(row) in by_key else row for row in more]
    return more


def _key(row: Any) -> tuple:
    return tuple(value for value in dataclasses.astuple(row) if isinstance(value, str | tuple))


def too_large(error: Exception, topology: Topology) -> Exception:
    """What a compiler's failure means to the user; the error itself if that is not known."""
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm\. Exceeded hbm capacity by ([\d.]+\w)", str(error))
    if used is None:
        return error
    return ConfigError(
        f"does not fit {topology.name}: a device needs {used[1]}B of {used[2]}B, {used[3]}B too much; take more devices, "
        f"model.remat=full, a larger parallel.fsdp, fewer sequences at a time, or --search"
    )


def _bubble(config: Config) -> float | None:
    parallel, train = config.parallel, config.train
    if parallel.pipe == 1:
        return None
    own = train.batch_size // train.gradient_accumulation_steps // parallel_size(config)
    layers = config.model.num_hidden_layers - config.model.first_k_dense_replace
    return bubble(layers, parallel, own // parallel.microbatch_size)

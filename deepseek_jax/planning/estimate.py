"""From a config and a topology to a plan: compile or find the step, read it, and extend it to the run."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from deepseek_jax.config import Config, ConfigError, expert_layers
from deepseek_jax.implementations import choose
from deepseek_jax.parallel.mesh import make_mesh, readers, resolve
from deepseek_jax.parallel.pipeline import bubble
from deepseek_jax.planning.depth import at_depth, fewer_layers, stacked
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
    return choose(accumulated(config), topology.machine.platform)


def even_rows(config: Config) -> int:
    """Rows that a device's experts serve at once under even routing: as many as its own tokens choose."""
    train, parallel = config.train, config.parallel
    sequences = train.batch_size // train.gradient_accumulation_steps // readers(parallel)
    if parallel.pipe > 1:
        sequences = parallel.microbatch_size
    parts = parallel.exchange_parts if parallel.expert > 1 else 1
    return sequences * (train.sequence_length // parallel.context) * config.model.num_experts_per_tok // parts


def extrapolated(config: Config, topology: Topology, tell: Tell, layers: int) -> Estimate:
    """A plan from two compilations of `layers` layers and of fewer, carried on to all.

    Raises:
        ConfigError: as `estimate`; or `depth.fewer_layers` can't have so many.
    """
    whole = arranged(config, topology)
    shallow = [arranged(each, topology) for each in fewer_layers(whole, layers)]
    texts = [compiled(each, topology, tell) for each in shallow]
    fewer, more = ((text, _read(each, topology, text).step) for each, text in zip(shallow, texts))
    stack = stacked(shallow[1])
    step = at_depth(fewer, more, stack, stacked(whole) - stack)
    before = kept(whole, topology.name, compiler_versions())
    if before is not None:
        known = _read(whole, topology, before).step
        time, memory = step.seconds / known.seconds - 1, step.needed_bytes / known.needed_bytes - 1
        tell(f"all layers were compiled before: this extrapolation is off by {time:+.1%} in time and {memory:+.1%} in memory")
    return _estimate(whole, topology, step)


def too_large(error: Exception, topology: Topology) -> Exception:
    """What a compiler's failure means to the user; the error itself if that is not known."""
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm\.", str(error)) or re.search(
        r"required for HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error)
    )
    if used is None:
        return error
    return ConfigError(
        f"does not fit {topology.name}: a device needs {used[1]}B of {used[2]}B; take more devices, "
        f"model.remat=full, a larger parallel.fsdp, fewer sequences at a time, or --search"
    )


def _bubble(config: Config) -> float | None:
    parallel, train = config.parallel, config.train
    if parallel.pipe == 1:
        return None
    own = train.batch_size // train.gradient_accumulation_steps // readers(parallel)
    return bubble(expert_layers(config.model), parallel, own // parallel.microbatch_size)

"""From the compiled steps of few layers to the figures of many."""

import dataclasses
from typing import Any

from deepseek_jax.config import Config, ConfigError, expert_layers
from deepseek_jax.parallel.pipeline import assign_layers
from deepseek_jax.planning.buffers import Fullest, fullest_moment
from deepseek_jax.planning.program import Array, Instruction, Program
from deepseek_jax.planning.schedule import op_name
from deepseek_jax.planning.step import CompiledText, StepFigures, lines_of


def stacked(config: Config) -> int:
    """Mixture-of-experts layers that a device holds in a stack."""
    return assign_layers(expert_layers(config.model), config.parallel).shape[-1]


def fewer_layers(config: Config, layers: int) -> tuple[Config, Config]:
    """Two configs from which to carry on: of `layers` layers, and of as many fewer as make every stack one shorter.

    Raises:
        ConfigError: they have no two such stacks, stages would be uneven, or it is the whole model.
    """
    model, parallel = config.model, config.parallel
    if model.moe_layer_freq > 1:
        raise ConfigError(f"--layers {layers}: not with model.moe_layer_freq={model.moe_layer_freq}, whose layers differ")
    step = parallel.pipe * parallel.pipe_interleave
    few = range(model.first_k_dense_replace + 2 * step, model.num_hidden_layers, step)
    if layers not in few:
        in_steps = f" in steps of {step}" if step > 1 else ""
        known = f"from {few[0]} to {few[-1]}{in_steps}" if few else "left out: no fewer layers make stages of two"
        raise ConfigError(f"--layers {layers}: for this model and mesh it must be {known}")
    fewer, more = (
        dataclasses.replace(config, model=dataclasses.replace(model, num_hidden_layers=n)) for n in (layers - step, layers)
    )
    return fewer, more


def at_depth(
    fewer: tuple[CompiledText, StepFigures], more: tuple[CompiledText, StepFigures], stack: int, further: int
) -> StepFigures:
    """Figures with `further` layers more in stacks that are `stack` long in `more` and one less in `fewer`.

    Temporaries are what a following of the schedule says, and in proportion what the compiler found beyond it.
    """
    step = carried_on(fewer[1], more[1], further)
    fullest = fullest_at_depth(Program(fewer[0].text), Program(more[0].text), stack, further)
    beyond = more[1].temporary_bytes / max(more[1].fullest_bytes, 1)
    return dataclasses.replace(
        step,
        temporary_bytes=round(fullest.bytes * beyond),
        fullest_bytes=fullest.bytes,
        fullest=lines_of(fullest),
    )


def carried_on(fewer: Any, more: Any, further: int) -> Any:
    """`more` and `further` times what it has more than `fewer`, number by number; rows that only one has stay as they are."""
    if isinstance(more, bool | str) or more is None:
        return more
    if isinstance(more, int | float):
        return type(more)(max(more + further * (more - fewer), 0))
    if dataclasses.is_dataclass(more) and not isinstance(more, type):
        same = ("memory_bytes", "compile_seconds", "slowest", "kernels", "fullest", "unknown_kernels", "open_loops")
        changed = {
            f.name: carried_on(getattr(fewer, f.name), getattr(more, f.name), further)
            for f in dataclasses.fields(more)
            if f.name not in same
        }
        return dataclasses.replace(more, **changed)
    if isinstance(more, list):
        by_key = {_key(row): row for row in fewer}
        return [carried_on(by_key[_key(row)], row, further) if _key(row) in by_key else row for row in more]
    return more


def _key(row: Any) -> tuple:
    return tuple(value for value in dataclasses.astuple(row) if isinstance(value, str | tuple))


def fullest_at_depth(fewer: Program, more: Program, stack: int, further: int) -> Fullest:
    """When a program needs the most if its stacks of `stack` layers have `further` layers more.

    No straight line: few layers need the most at another moment than many. So the schedule of `more` is followed
    with every stack as long as it will be. A stack is an array with an axis of `stack` that `fewer` has with one less,
    unless the same operation makes it in `fewer`, as it is.
    """
    made = [(array, op_name(i)) for instructions in fewer.computations.values() for i in instructions for array in i.results]
    shapes, alike = {_shape(array) for array, _ in made}, {(_shape(array), path) for array, path in made}

    def as_deep(instruction: Instruction, array: Array) -> Array:
        if stack in array.shape and (_shape(array), op_name(instruction)) not in alike:
            for axis, size in enumerate(array.shape):
                if size == stack and _shape(_with_axis(array, axis, stack - 1)) in shapes:
                    return _with_axis(array, axis, stack + further)
        return array

    return fullest_moment(more, as_deep)


def _shape(array: Array) -> tuple:
    return array.dtype, array.shape


def _with_axis(array: Array, axis: int, size: int) -> Array:
    return array._replace(shape=(*array.shape[:axis], size, *array.shape[axis + 1 :]))

"""How long one operation of a compiled program takes, as far as its compiler or our own table can tell.

On TPUs the compiler writes the cycles that it expects beside most operations. On GPUs XLA's cost models leave several
times, of which the least is taken, and products, which they count on the wrong units, are counted anew. Kernels count
by their work (`planning.kernels`); collectives by their bytes (`planning.links`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.planning.kernels import kernel_name, kernel_work
from deepseek_jax.planning.machines import FP8_KERNEL_SHARE, KERNEL_SHARE, Machine
from deepseek_jax.planning.products import product_flops
from deepseek_jax.planning.program import TRANSPARENT, Array, Instruction, Program


class Cost(NamedTuple):
    """Of one run of an operation."""

    seconds: float
    flops: int = 0
    """Of its products."""
    kernel: str = ""
    """Its name, if it is one."""
    is_known: bool = True
    """False for a kernel of which nothing is known."""


FREE = Cost(0.0)
NO_ESTIMATE = 2**62
"""Cycles that XLA for TPUs writes where its estimate went beyond all bounds: 2**63 - 1."""


class Costs:
    """Costs of a program's operations on a machine.

    Args:
        even_rows: see `kernel_work`.
    """

    def __init__(self, program: Program, machine: Machine, even_rows: int | None = None):
        self._program, self._machine, self._even_rows = program, machine, even_rows
        self._inside: dict[str, int] = {}

    def of(self, instruction: Instruction, operands: Sequence[Array]) -> Cost:
        """Of an operation that runs by itself and is neither a loop, a call, a conditional nor a collective."""
        name = kernel_name(instruction)
        if name is not None:
            return self._of_kernel(name, instruction, operands)
        flops = self._flops(instruction, operands)
        if self._machine.platform == "tpu":
            cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            if cycles and int(cycles[1]) >= NO_ESTIMATE:
                moved = sum(array.bytes for array in (*operands, *instruction.results))
                return Cost(self._by_work(flops, moved, KERNEL_SHARE * self._machine.bf16_flops), flops)
            return Cost(int(cycles[1]) / self._machine.clock if cycles else 0.0, flops)
        return Cost(self._by_models(instruction, flops), flops)

    def _of_kernel(self, name: str, instruction: Instruction, operands: Sequence[Array]) -> Cost:
        work = kernel_work(name, instruction, operands, self._even_rows)
        if work is None:
            return Cost(0.0, kernel=name, is_known=False)
        is_fp8 = "fp8" in name
        rate = FP8_KERNEL_SHARE * self._machine.fp8_flops if is_fp8 else KERNEL_SHARE * self._machine.bf16_flops
        return Cost(self._by_work(work.flops, work.bytes, rate), work.flops, name)

    def _by_work(self, flops: float, moved: int, rate: float) -> float:
        """Seconds for products at that rate and the bytes that they move, whichever takes longer."""
        return max(flops / rate, moved / self._machine.memory_bandwidth)

    def _by_models(self, instruction: Instruction, flops: int) -> float:
        """By XLA's cost models for GPUs, the least of theirs, `sol` aside, which is not comparable with the rest."""
        listed = re.search(r'"reification_cost":\[(.*?)\]', instruction.rest)
        entries = [entry for entry in re.findall(r"\{[^}]*\}", listed[1]) if '"name":"sol"' not in entry] if listed else []
        return min((self._by_model(entry, flops) for entry in entries), default=0.0) / 1e6

    def _by_model(self, entry: str, flops: int) -> float:
        """Microseconds by one of the models; products' as the tensor cores would compute them, at KERNEL_SHARE of the peak.

        The models count products on the float32 units, and twice for some tiles.
        """
        whole, compute, memory = (
            _microseconds(entry, name) for name in ("exec_time_us", "compute_time_us", "memory_access_time_us")
        )
        if not flops:
            return whole
        on_tensor_cores = 1e6 * flops / (KERNEL_SHARE * self._machine.bf16_flops)
        return whole - max(compute, memory) + max(on_tensor_cores, memory)

    def _flops(self, instruction: Instruction, operands: Sequence[Array]) -> int:
        """Of its products, those within a fusion included."""
        if instruction.opcode in TRANSPARENT:
            return 0
        return product_flops(instruction, operands) + sum(
            self._within(name) for name in instruction.called("calls", "to_apply")
        )

    def _within(self, computation: str) -> int:
        if computation not in self._inside:
            program = self._program
            self._inside[computation] = sum(
                self._flops(instruction, program.operands(instruction))
                for instruction in program.computations.get(computation, ())
            )
        return self._inside[computation]


def _microseconds(entry: str, name: str) -> float:
    found = re.search(rf'"{name}":([\d.e+-]+)', entry)
    return float(found[1]) if found else 0.0

"""What one device of each known kind can do: the figures that estimates are made with, and where each comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One device, as JAX counts devices (half a chip on tpu7x). Rates are a second's."""

    name: str
    platform: str
    """As JAX calls it: tpu, gpu or cpu."""
    bf16_flops: float
    """Of products, at the peak."""
    fp8_flops: float
    memory: int
    """Bytes that a program may fill."""
    memory_bandwidth: float
    """Bytes."""
    link_bandwidth: float
    """Bytes that one link carries one way: of a TPU's torus, or all of a GPU's links to the others of its host."""
    network_bandwidth: float = 0.0
    """Bytes one way between hosts, for each device; TPUs of one slice have no use for it."""
    clock: float = 0.0
    """Cycles in which the TPU's compiler estimates."""
    devices_per_chip: int = 1
    wraps_from: int = 0
    """Chips along a side of the torus from which its ends are joined."""


GB = 10**9
GIB = 2**30

MACHINES = {
    machine.name: machine
    for machine in (
        # Cloud TPU's pages of each kind: peak, memory, its bandwidth. Link rates: "How to Scale Your Model" (2025), one way.
        # Clocks: peak / (2 x multiply-adds a cycle): 4 arrays of 128 x 128 on v5e, 8 on v5p, 256 x 256 four times after.
        # Memory is what the compilers state as theirs where a program is too large.
        Machine("v5e", "tpu", 197e12, 197e12, int(15.75 * GIB), 819e9, 45e9, clock=1.5e9, wraps_from=16),
        Machine("v5p", "tpu", 459e12, 459e12, int(95.74 * GIB), 2765e9, 90e9, clock=1.75e9, wraps_from=4),
        Machine("v6e", "tpu", 918e12, 918e12, int(31.25 * GIB), 1640e9, 90e9, clock=1.75e9, wraps_from=16),
        Machine(
            "tpu7x", "tpu", 1153.5e12, 2307e12, int(94.75 * GIB), 3690e9, 100e9, clock=2.2e9, devices_per_chip=2, wraps_from=4
        ),
        # NVIDIA's data sheets, dense rates; NVLink 4 and 5 one way; one 400 Gb/s adapter for each GPU.
        Machine("h100", "gpu", 989e12, 1979e12, 84_978_434_048, 3352e9, 450e9, 50e9),
        Machine("h200", "gpu", 989e12, 1979e12, 150_754_820_096, 4800e9, 450e9, 50e9),
        Machine("b200", "gpu", 2250e12, 4500e12, 191_500_000_000, 8000e9, 900e9, 50e9),
        # Two cores of a shared machine; no figure of time is claimed for it.
        Machine("cpu", "cpu", 2e11, 2e11, 24 * GIB, 20e9, 10e9),
    )
}

KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"} | {
    kind: kind.lower() for kind in ("H100", "H200", "B200")
}
"""What JAX's names of devices contain, the longer first, and which machine that is."""


def machine_of(device_kind: str) -> Machine | None:
    """The machine by what JAX calls its devices, such as `NVIDIA H100 80GB HBM3`; None where no peak is known, as of CPUs."""
    return next((MACHINES[name] for kind, name in KINDS.items() if kind in device_kind), None)


LINK_SHARE = 0.8
"""Of a link's rate that collectives reach: large messages in NCCL's and Google's own tests come to 75 to 90%."""
KERNEL_SHARE = 0.6
"""Of the peak that kernels reach, ours and others' alike, and products on GPUs: tokamax and MaxText 55 to 70% of a TPU's; on
an H100 XLA's bfloat16 products 64 to 72%, our grouped ones 53 to 60%. 60% on both sides of every comparison."""
FP8_KERNEL_SHARE = 0.3
"""Of float8's peak that our products of it reach: 25 to 33% on an H100 (`scripts/benchmark_kernels`)."""

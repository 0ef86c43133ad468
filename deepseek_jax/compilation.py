"""How XLA is asked to compile our larger programs."""

from typing import Optional


def compiler_options(platform: str) -> Optional[dict[str, str]]:
    """What `jax.jit` takes: on a CPU the order of work that needs the least memory, for other orders save no time there."""
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if platform == "cpu" else None

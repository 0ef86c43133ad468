"""How XLA is asked to compile our larger programs."""

from typing import Optional

OPTIONS = {
    # The order of work that needs the least memory: other orders save no time.
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    # Tokens travel to their experts and back beside other work; without it the core waits for them.
    "tpu": {"xla_tpu_enable_async_ragged_all_to_all": "true"},
}


def compiler_options(platform: str) -> Optional[dict[str, str]]:
    """What `jax.jit` takes for a platform."""
    return OPTIONS.get(platform)

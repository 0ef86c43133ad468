"""How XLA is asked to compile our larger programs."""

from typing import Optional

OPTIONS = {
    # The order of work that needs the least memory: other orders save no time.
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    # Weights are gathered and tokens sent beside other work; without these the core waits for both.
    "tpu": dict.fromkeys(
        [
            "xla_enable_async_all_gather",
            "xla_tpu_enable_async_collective_fusion",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "xla_tpu_enable_async_ragged_all_to_all",
        ],
        "true",
    ),
}


def compiler_options(platform: str) -> Optional[dict[str, str]]:
    """What `jax.jit` takes for a platform."""
    return OPTIONS.get(platform)

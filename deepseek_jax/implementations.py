"""Which implementation `auto` stands for, on the platform that a program is made for.

That platform need not be this machine's: a step can be compiled on a laptop for a pod. So a run names every choice once,
before it makes anything, and what a module finds as `auto` is for the devices at hand.
"""

import dataclasses
from typing import Any

import jax

from deepseek_jax.config import Config

BEST = {
    "grouped_matmul": {"tpu": "megablox", "gpu": "triton", "cpu": "blocked"},
    "attention": {"tpu": "splash", "gpu": "cudnn", "cpu": "blocked"},
    "exchange": {"tpu": "ragged", "gpu": "ragged", "cpu": "rounds"},
}
"""Operation -> platform, as JAX names it -> implementation."""

WITHOUT_FLOAT64 = {"megablox": "blocked", "triton": "blocked", "mosaic": "blocked", "splash": "chunked", "cudnn": "chunked"}
"""Kernels that have no float64, and what takes their place."""


def best(operation: str, platform: str | None = None, is_float64: bool = False) -> str:
    """What `auto` means for an operation of `BEST`; the platform is this program's own unless named."""
    choice = BEST[operation][platform or jax.default_backend()]
    return WITHOUT_FLOAT64.get(choice, choice) if is_float64 else choice


def choose(config: Config, platform: str) -> Config:
    """`config` with every `auto` replaced by the best there is for `platform`."""
    is_float64 = config.model.precision == "float64"

    def chosen(section: object) -> dict[str, Any]:
        return {name: best(name, platform, is_float64) for name in BEST if getattr(section, name, None) == "auto"}

    model = dataclasses.replace(config.model, **chosen(config.model))
    parallel = dataclasses.replace(config.parallel, **chosen(config.parallel))
    return dataclasses.replace(config, model=model, parallel=parallel)

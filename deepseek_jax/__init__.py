"""DeepSeek-V3 training in JAX, in lockstep with the PyTorch sibling `deepseek_torch`.

`from deepseek_jax import DeepSeekModel, DeepSeekTrainer` is all that a notebook needs; JAX is imported with them, and not
with the package.
"""

from typing import Any

from deepseek_jax.absent_devices import keep_quiet

keep_quiet()


def __getattr__(name: str) -> Any:
    if name in ("DeepSeekModel", "DeepSeekTrainer"):
        from deepseek_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

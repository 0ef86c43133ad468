"""The PyTorch sibling of `deepseek_jax`: the same model and training in the plainest code that is right.

`from deepseek_torch import DeepSeekModel, DeepSeekTrainer` is all that a notebook needs; PyTorch is imported with them, and
not with the package.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("DeepSeekModel", "DeepSeekTrainer"):
        from deepseek_torch import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

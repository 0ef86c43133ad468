"""Which parameters learn: `train.trainable`, names in which `*` stands for anything, such as `*/self_attn/*`."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Optional

from deepseek_jax.config.schema import ConfigError


def learns(trainable: Optional[Sequence[str]], path: Iterable[str]) -> bool:
    """Whether the parameter at `path`, keys from the stack of layers down to `weight`, learns; without names all do."""
    joined = "/".join(path)
    return trainable is None or any(fnmatchcase(joined, name) for name in trainable)


def check_trainable(trainable: Optional[Sequence[str]], paths: Iterable[Sequence[str]]) -> None:
    """Refuse names of nothing.

    Raises:
        ConfigError: naming the one, and some that there are.
    """
    paths = sorted({tuple(path) for path in paths})
    for name in trainable or ():
        if not any(learns([name], path) for path in paths):
            some = ", ".join("/".join(path) for path in paths[:: max(len(paths) // 6, 1)])
            raise ConfigError(f"train.trainable={name}: no parameter has that name; some are {some}")

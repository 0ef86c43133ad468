"""Which parameters learn: `train.trainable`, names in which `*` stands for anything, such as `*/self_attn/*`."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Optional

from deepseek_jax.config.schema import ConfigError


def learns(trainable: Optional[Sequence[str]], path: Iterable[str]) -> bool:
    """Whether the parameter at `path`, keys from the stack of layers down to `weight`, learns; without names all do."""
    joined = "/".join(path)
    return trainable is None or any(fnmatchcase(joined, name) for name in trainable)


def learning_part(trainable: Optional[Sequence[str]], tree: Any, path: tuple[str, ...] = ()) -> Any:
    """Of a tree of parameters, or of one like it, those that learn; without names the tree as it is.

    What does not learn has neither a gradient nor moments.
    """
    if trainable is None:
        return tree
    parts = {}
    for key, node in tree.items():
        if isinstance(node, Mapping):
            node = learning_part(trainable, node, (*path, key))
            if node:
                parts[key] = node
        elif learns(trainable, (*path, key)):
            parts[key] = node
    return parts


def with_part(tree: Any, part: Any) -> Any:
    """The tree with what `learning_part` took out of it replaced by `part`."""
    if not isinstance(tree, Mapping):
        return part
    return {key: with_part(node, part[key]) if key in part else node for key, node in tree.items()}


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

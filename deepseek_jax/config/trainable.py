"""Which parameters learn: `train.trainable`, names in which `*` stands for anything, such as `*/self_attn/*`."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Optional

from deepseek_jax.config.schema import Config, ConfigError

ADAPTERS = "*lora_[AB]"


def trainable(config: Config) -> Optional[list[str]]:
    """Names of what learns in a run, for the functions below: of a run with adapters these, and what else is named."""
    named = config.train.trainable
    return [ADAPTERS, *(named or [])] if config.lora.rank else named


def learns(names: Optional[Sequence[str]], path: Iterable[str]) -> bool:
    """Whether the parameter at `path`, keys from the stack of layers down to `weight`, learns; without names all do."""
    joined = "/".join(path)
    return names is None or any(fnmatchcase(joined, name) for name in names)


def learning_part(names: Optional[Sequence[str]], tree: Any, path: tuple[str, ...] = ()) -> Any:
    """Of a tree of parameters, or of one like it, those that learn; without names the tree as it is.

    What does not learn has neither a gradient nor moments.
    """
    if names is None:
        return tree
    parts = {}
    for key, node in tree.items():
        if isinstance(node, Mapping):
            node = learning_part(names, node, (*path, key))
            if node:
                parts[key] = node
        elif learns(names, (*path, key)):
            parts[key] = node
    return parts


def with_part(tree: Any, part: Any) -> Any:
    """The tree with what `part`, a tree of some of its parameters or of others, has in its place or beside it."""
    if not isinstance(part, Mapping):
        return part
    return {**tree, **{key: with_part(tree.get(key, {}), node) for key, node in part.items()}}


def check_trainable(names: Optional[Sequence[str]], paths: Iterable[Sequence[str]]) -> None:
    """Refuse names of nothing.

    Raises:
        ConfigError: naming the one, and some that there are.
    """
    paths = sorted({tuple(path) for path in paths})
    for name in names or ():
        if not any(learns([name], path) for path in paths):
            some = ", ".join("/".join(path) for path in paths[:: max(len(paths) // 6, 1)])
            raise ConfigError(f"train.trainable={name}: no parameter has that name; some are {some}")

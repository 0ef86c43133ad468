"""Texts to evaluate on beside the held-out one, each by its name: `data.eval.wiki=FILE`, tokenized once into the run."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.data.conversations import chat_fingerprint, conversation_files, pack_conversations
from deepseek_jax.data.documents import DataError, Texts, find_files, read_documents
from deepseek_jax.data.loader import TokenRow
from deepseek_jax.data.packing import FORMAT, TOKENIZER, open_tokens, state_of, write_tokens
from deepseek_jax.data.shards import MANIFEST, open_part
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import write_atomically

FOLDER = "data/eval"
"""In a run directory: NAME.npy, and NAME.json which says what it was made of."""


def check_sets(config: Config) -> None:
    """Look for the files of `data.eval` before anything is made; raises `DataError` for one that is not there."""
    for name in config.data.eval:
        if not _is_prepared_set(config, name):
            find_files(config.data.eval[name], field=f"data.eval.{name}")


def make_sets(config: Config, directory: Path) -> None:
    """Tokenize those sets that `directory`, whose tokenizer it is, does not hold yet, or of which a file has changed.

    Raises:
        DataError: a text cannot be read, or a prepared set has another tokenizer.
    """
    tokenizer = load_tokenizer(directory / TOKENIZER)
    find = conversation_files if config.data.format == "chat" else find_files
    for name, paths in config.data.eval.items():
        if _is_prepared_set(config, name):
            if config.data.format == "chat":
                raise DataError(f"data.eval.{name}={paths[0]}: prepared text; with data.format=chat give conversations")
            if load_tokenizer(Path(paths[0]) / TOKENIZER).get_vocab() != tokenizer.get_vocab():
                raise DataError(f"data.eval.{name}={paths[0]}: has another tokenizer than the run; give its text instead")
            continue
        tokens, known = _places(directory, name)
        fingerprint = {
            "format": FORMAT,
            **chat_fingerprint(config),
            "files": [state_of(path) for path in find(paths, field=f"data.eval.{name}")],
            "tokenizer": state_of(directory / TOKENIZER)[1:],
        }
        if tokens.exists() and _read(known) == fingerprint:
            continue
        tokens.parent.mkdir(parents=True, exist_ok=True)
        known.unlink(missing_ok=True)
        if config.data.format == "chat":
            with tempfile.TemporaryDirectory(prefix=".making-", dir=tokens.parent) as folder:
                part = Path(folder, tokens.name)
                pack_conversations(config, find(paths, field=f"data.eval.{name}"), Path(folder), [(part, 1.0)])
                os.replace(part, tokens)
        else:
            write_tokens(Texts(read_documents(paths)), tokenizer, tokens, f"tokenizing {name}")
        write_atomically(known, json.dumps(fingerprint, indent=1))


def open_sets(config: Config, directory: Path) -> dict[str, TokenRow]:
    """The tokens of every set, which stay on disk; raises `DataError` for one that is shorter than a sequence."""
    sets: dict[str, TokenRow] = {}
    for name, paths in config.data.eval.items():
        prepared = _is_prepared_set(config, name)
        sets[name] = open_part(Path(paths[0]), "held_out") if prepared else open_tokens(_places(directory, name)[0])
        if len(sets[name]) <= config.train.sequence_length:
            raise DataError(f"data.eval.{name}={', '.join(paths)}: {len(sets[name])} tokens, and one sequence needs "
                            f"{config.train.sequence_length + 1}; give more text")  # fmt: skip
    return sets


def _is_prepared_set(config: Config, name: str) -> bool:
    """Whether it is what `deepseek_jax.prepare` made, of which the held-out part counts."""
    paths = config.data.eval[name]
    return len(paths) == 1 and (Path(paths[0]) / MANIFEST).is_file()


def _places(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / FOLDER / f"{name}.npy", directory / FOLDER / f"{name}.json"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

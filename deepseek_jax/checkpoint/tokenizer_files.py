"""The tokenizer's files and what generation is told, which travel with the weights.

A run has a tokenizer.json and no more; Hugging Face wants to know besides which of its tokens ends a
text. A run that came from Hugging Face keeps what came with it in a folder of its own, to give it back.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tokenizers import Tokenizer

from deepseek_jax.checkpoint.hf_config import CONFIG_JSON
from deepseek_jax.checkpoint.staging import disk_errors
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import MAX_JSON_BYTES, file_inside, is_count, read_object, shown
from deepseek_jax.data.documents import DataError
from deepseek_jax.data.tokenizer import end_of_document_id, load_tokenizer

TOKENIZER_JSON = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
UNREAD = ("tiktoken.model", "tokenizer.model")
"""Tokenizers in forms that are carried along and not read: tiktoken's and SentencePiece's."""
COMPANIONS = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    *UNREAD,
    "vocab.json",
    "merges.txt",
    GENERATION_CONFIG,
    CONFIG_JSON,
)
"""Files of a Hugging Face directory that say something about text; config.json for its token ids."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
COMPANIONS_FOLDER = "huggingface"
"""In a run directory: the `COMPANIONS` that came with the weights."""


class TextFiles(NamedTuple):
    """How a model speaks.

    Attributes:
        tokenizer: None where there is no tokenizer.json; token ids are then all that can be given.
        ends: tokens that end a text.
        begin: the token that texts are read after: the one that begins a text, or else ends one.
        directory: of the tokenizer's other files, where there are any.
    """

    tokenizer: Optional[Tokenizer]
    ends: tuple[int, ...]
    begin: Optional[int]
    directory: Path


def read_text_files(path: Path) -> TextFiles:
    """Of a run or of a Hugging Face directory.

    Raises:
        UserError: one line naming the file that cannot be read.
    """
    directory = texts_directory(path)
    tokenizer = load_tokenizer(path) if (path / TOKENIZER_JSON).is_file() else None
    ends, begins = (_named_tokens(directory, name) for name in ("eos_token_id", "bos_token_id"))
    if not ends and tokenizer is not None:
        with suppress(DataError):  # then a limit alone ends a text
            ends = (end_of_document_id(tokenizer),)
    return TextFiles(tokenizer, ends, next(iter(begins + ends), None), directory)


def texts_directory(path: Path) -> Path:
    """Where the `COMPANIONS` of a run's tokenizer are: what came with its weights, or `path` itself."""
    kept = path / COMPANIONS_FOLDER
    has_own = (path / TOKENIZER_JSON).is_file()
    return kept if (kept / CONFIG_JSON).is_file() and (not has_own or _same_vocabulary(path, kept)) else path


def _same_vocabulary(own: Path, kept: Path) -> bool:
    """Whether training went on with the tokenizer that came; it may write the same one in other words."""
    return (kept / TOKENIZER_JSON).is_file() and load_tokenizer(own).get_vocab() == load_tokenizer(kept).get_vocab()


def _named_tokens(directory: Path, field: str) -> tuple[int, ...]:
    """All that generation_config.json and config.json name under `field`."""
    found: list[int] = []
    for name in (GENERATION_CONFIG, CONFIG_JSON):
        if (directory / name).is_file():
            value = read_object(file_inside(directory, name, str(directory))).get(field)
            tokens = value if isinstance(value, list) else [] if value is None else [value]
            if not all(is_count(token) for token in tokens):
                raise CheckpointError(
                    f"{directory / name}: {field} is {shown(value)}; a token id or a list of them is expected"
                )
            found += tokens
    return tuple(dict.fromkeys(found))


def keep_companions(source: Path, folder: Path) -> None:
    """Copy those of the `COMPANIONS` that the directory `source` has into `folder`.

    Raises:
        CheckpointError: one line naming the file that cannot be read or written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).exists() or (source / name).is_symlink():
            file = file_inside(source, name, str(source))
            if file.stat().st_size > MAX_JSON_BYTES:
                raise CheckpointError(f"{file}: {file.stat().st_size} bytes, too long for a {name}")
            with disk_errors(folder / name):
                shutil.copyfile(file, folder / name)


def write_tokenizer(directory: Path, tokenizer: Path | None, context: int) -> dict[str, Any]:
    """Put the tokenizer's files and generation_config.json into `directory`.

    Args:
        tokenizer: a directory with tokenizer.json, from `keep_companions` or a run's own; or none.
        context: the longest text in tokens.

    Returns:
        The ids of `TOKEN_IDS` for config.json.

    Raises:
        UserError: one line naming the file that is no tokenizer or cannot be written.
    """
    token_ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None and (tokenizer / CONFIG_JSON).is_file():
        for name in COMPANIONS:
            if name != CONFIG_JSON and (tokenizer / name).is_file():
                with disk_errors(directory / name):
                    shutil.copyfile(tokenizer / name, directory / name)
        content = read_object(tokenizer / CONFIG_JSON)
        token_ids |= {name: content[name] for name in TOKEN_IDS if name in content}
    elif tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        end = end_of_document_id(loaded)
        token_ids = {"bos_token_id": end, "eos_token_id": end}
        with disk_errors(directory / TOKENIZER_JSON):
            for name in (TOKENIZER_JSON, CHAT_TEMPLATE):
                if (tokenizer / name).is_file():
                    shutil.copyfile(tokenizer / name, directory / name)
        fields: dict[str, Any] = dict.fromkeys(("eos_token", "bos_token", "pad_token"), loaded.id_to_token(end))
        fields |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        fields |= {"model_max_length": context, "clean_up_tokenization_spaces": False}
        write_json(directory / TOKENIZER_CONFIG, fields)
    if not (directory / GENERATION_CONFIG).exists():
        write_json(directory / GENERATION_CONFIG, {"_from_model_config": True, **token_ids})
    return token_ids


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as Hugging Face does; raises `CheckpointError` if it cannot be written."""
    with disk_errors(path):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

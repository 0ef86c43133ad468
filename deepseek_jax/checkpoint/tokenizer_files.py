"""The tokenizer's files and what generation is told, which travel with the weights.

A run has a tokenizer.json and no more; Hugging Face wants to know besides which of its tokens ends a
text. A run that came from Hugging Face keeps what came with it in a folder of its own, to give it back.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.hf_config import CONFIG_JSON
from deepseek_jax.checkpoint.staging import disk_errors
from deepseek_jax.checkpoint.tensors import CheckpointError
from deepseek_jax.checkpoint.untrusted import MAX_JSON_BYTES, file_inside, read_object
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


def keep_companions(source: Path, folder: Path) -> None:
    """Copy those of the `COMPANIONS` that the directory `source` has into the new `folder`.

    Raises:
        CheckpointError: one line naming the file that cannot be read or written.
    """
    with disk_errors(folder):
        folder.mkdir()
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

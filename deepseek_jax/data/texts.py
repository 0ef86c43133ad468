"""Texts and tokenizers that are in a Python program's memory, as the files that a run is made of; and its prompts."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from tokenizers import Tokenizer

from deepseek_jax.data.documents import DataError
from deepseek_jax.data.tokenizer import END_OF_DOCUMENT, end_of_document_id, load_tokenizer

CONVERSATION = '{"messages": [...]}'


def write_texts(texts: Iterable[str | Mapping[str, Any]], path: Path) -> tuple[int, str]:
    """Write texts, or conversations {"messages": [...]}, as a .jsonl file that `data.input` can name.

    Returns:
        Their bytes, and their `data.format`: what the first is, all must be.

    Raises:
        DataError: naming the first that is neither, or not what the first is.
    """
    if isinstance(texts, str | bytes):
        raise DataError("train_texts: a list of texts is expected and not one text; write [text]")
    size, form = 0, ""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            found, record = _record(text)
            form = form or found
            if not found or found != form:
                kind = {"text": "text", "chat": CONVERSATION}.get(form, f"text or {CONVERSATION}")
                raise DataError(f"train_texts: number {number} is of type {type(text).__name__}; {kind} is expected")
            try:
                line = json.dumps(record)
            except (TypeError, ValueError) as error:
                raise DataError(f"train_texts: number {number}: {error}") from None
            file.write(line + "\n")
            size += len(record["text"].encode(errors="replace")) if found == "text" else len(line)
    if not size:
        raise DataError("train_texts: there is no text in them")
    return size, form


def _record(text: Any) -> tuple[str, dict[str, Any]]:
    """Its `data.format`, empty if it has none, and what a line of a file says of it."""
    if isinstance(text, str):
        return "text", {"text": text}
    if isinstance(text, Mapping) and "messages" in text:
        return "chat", {name: text[name] for name in ("messages", "tools") if name in text}
    return "", {}


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer of the library `tokenizers`, which ends documents by a token of its own.

    Args:
        tokenizer: one of that library, a fast one of transformers (`AutoTokenizer`), or the path of a tokenizer.json or
            of a directory with one. The token END_OF_DOCUMENT is added to one that has no such token that we know.

    Raises:
        DataError: when it is none of these.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(tokenizer, str | Path):
        found = load_tokenizer(tokenizer)
    elif isinstance(tokenizer, Tokenizer):
        found = Tokenizer.from_str(tokenizer.to_str())  # a copy, which the program's own does not change with
    else:
        raise DataError(f"tokenizer of type {type(tokenizer).__name__}: give the path of a tokenizer.json, or a fast "
                        "tokenizer of transformers, such as AutoTokenizer.from_pretrained returns")  # fmt: skip
    try:
        end_of_document_id(found)
    except DataError:
        found.add_special_tokens([END_OF_DOCUMENT])
    return found


def as_prompts(ids: Any, vocab_size: int) -> tuple[list[list[int]], bool]:
    """Token ids as a list of prompts, and whether they were given as several.

    Args:
        ids: a sequence of ids, or several: lists, or arrays of NumPy, JAX or PyTorch.

    Raises:
        DataError: when they are no ids of a vocabulary of that size.
    """
    given = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(given, list | tuple):
        raise DataError(f"ids of type {type(ids).__name__}: give token ids, such as tokenizer(text).input_ids")
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in given]
    is_batch = any(isinstance(row, list | tuple) for row in rows)
    prompts = [list(row) for row in rows] if is_batch and all(isinstance(row, list | tuple) for row in rows) else [rows]
    for prompt in prompts:
        if not prompt:
            raise DataError("ids: a prompt needs at least one token")
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise DataError(f"ids: {token!r} is no token; the model knows 0 to {vocab_size - 1}")
    return prompts, is_batch


def continued(prompts: list[list[int]], steps: Iterable[Iterable[int]], end: Optional[int]) -> list[list[int]]:
    """Prompts with the tokens that each step gives them, the first `end` being a sequence's last."""
    sequences, open_ = [list(prompt) for prompt in prompts], [True] * len(prompts)
    for step in steps:
        for row, token in enumerate(step):
            if open_[row]:
                sequences[row].append(int(token))
                open_[row] = token != end
    return sequences

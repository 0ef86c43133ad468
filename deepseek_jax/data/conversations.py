"""Conversations to rows of tokens, in which the assistant's words count (`data.format=chat`).

A row holds whole conversations, one after another and kept apart; none goes on in another row. What is left of a row is filled
with the beginning of another conversation, which does not count there: routers see nothing but real text. The first
sequence_length + 1 tokens of a row are conversations; those that MTP modules look ahead to are such filling.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deepseek_jax.checkpoint.hf_config import CONFIG_JSON
from deepseek_jax.checkpoint.hub import local_directory
from deepseek_jax.checkpoint.tokenizer_files import CHAT_TEMPLATE, COMPANIONS_FOLDER, keep_companions
from deepseek_jax.checkpoint.untrusted import shown
from deepseek_jax.config import Config
from deepseek_jax.data.compressed import BROKEN, COMPRESSED_SUFFIXES, kind_of, open_binary
from deepseek_jax.data.documents import READ_ROWS, DataError, find_files
from deepseek_jax.data.loader import window_length
from deepseek_jax.data.marks import COUNTED, ENDS
from deepseek_jax.data.shuffle import permute
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.generation.chat import ChatTemplate, as_messages, load_chat_template

SUFFIXES = (*(".jsonl" + packed for packed in ("", *COMPRESSED_SUFFIXES)), ".parquet")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TOGETHER = 1000
"""Conversations that are laid into rows at one time, the longest first."""


class Packed(NamedTuple):
    """What became of conversations."""

    conversations: int = 0
    cut: int = 0
    """Of them, those that were longer than a row, whose ends are left out."""
    dropped: int = 0
    """And those that have none of the assistant's words before a row's end."""
    rows: int = 0
    counted: int = 0
    """Tokens that the loss counts."""

    def told(self) -> str:
        """For a person."""
        return (f"{self.conversations:,} conversations in {self.rows:,} rows; {self.counted:,} tokens count; "
                f"{self.cut:,} cut at a row's length, {self.dropped:,} dropped with no answer before it")  # fmt: skip


def template_of(config: Config) -> ChatTemplate:
    """The chat template of a run: data.chat_template, or that which its tokenizer came with.

    Raises:
        UserError: there is none, or none that can be used.
    """
    if config.data.tokenizer is None:
        raise DataError("data.format=chat: give a tokenizer with a chat template, by init_from=DIR or data.tokenizer")
    place = Path(config.data.tokenizer).expanduser()
    folder = place if place.is_dir() else place.parent
    if (folder / COMPANIONS_FOLDER).is_dir():
        folder = folder / COMPANIONS_FOLDER
    given = config.data.chat_template
    return load_chat_template(folder, load_tokenizer(place), None if given is None else Path(given).expanduser())


def conversation_files(inputs: Sequence[str], field: str = "data.input") -> list[Path]:
    """The files that hold conversations; raises `DataError` for what is not there."""
    return find_files(inputs, suffixes=SUFFIXES, field=field)


def chat_fingerprint(config: Config) -> dict[str, Any]:
    """What rows depend on besides files, tokenizer and seed; nothing for text. Raises as `template_of` does."""
    if config.data.format != "chat":
        return {}
    template = hashlib.sha256(template_of(config).source.encode()).hexdigest()
    return {"chat": [window_length(config), config.train.sequence_length, template]}


def pack_conversations(
    config: Config, files: Sequence[Path], folder: Path, parts: Sequence[tuple[Path, float]]
) -> list[Packed]:
    """Write the conversations of `files` into flat files of rows, [window_length] tokens each, as `data.marks` has them.

    Args:
        folder: for what is needed meanwhile.
        parts: the files to write and their shares of the conversations, in an order of data.seed's.

    Raises:
        UserError: one line naming file and line at fault.
    """
    template, limit = template_of(config), config.train.sequence_length + 1
    lengths: list[int] = []
    cut = dropped = 0
    flat = folder / "conversations.bin"
    with flat.open("wb") as file:
        for where, messages in read_conversations(files):
            try:
                ids, counted = template.answers(messages)
            except UserError as error:
                raise DataError(f"{where}: {error}") from None
            tokens = np.asarray(ids, np.uint32) | np.where(counted, np.uint32(COUNTED), np.uint32(0))
            if not any(counted):
                raise DataError(f"{where}: the chat template gives the assistant's message no tokens")
            cut += len(tokens) > limit
            tokens = tokens[:limit].copy()
            if not (tokens[1:] & COUNTED).any():
                dropped, cut = dropped + 1, cut - 1
                continue
            tokens[-1] |= ENDS
            lengths.append(len(tokens))
            file.write(tokens.tobytes())
    if len(lengths) < len(parts):
        raise DataError(f"{files[0]}: {len(lengths)} conversations fit, and {len(parts)} are needed; give more "
                        f"or raise train.sequence_length={config.train.sequence_length}")  # fmt: skip
    stored, ends = np.memmap(flat, np.uint32, "r"), np.cumsum(lengths)
    order = permute(np.arange(len(lengths)), len(lengths), config.data.seed)
    found, first = [], 0
    for number, (path, share) in enumerate(parts):
        left = len(parts) - number - 1  # each of those that follow needs one
        last = len(order) if not left else min(max(first + 1, first + round(share * len(order))), len(order) - left)
        chosen = [stored[ends[i] - lengths[i] : ends[i]] for i in order[first:last]]
        with path.open("wb") as rows_file:
            rows, counts = _write_rows(rows_file, chosen, limit, window_length(config))
        found.append(Packed(len(chosen), 0, 0, rows, counts))
        first = last
    flat.unlink()
    return [found[0]._replace(conversations=found[0].conversations + dropped, cut=cut, dropped=dropped), *found[1:]]


def _write_rows(file: BinaryIO, conversations: Sequence[np.ndarray], limit: int, window: int) -> tuple[int, int]:
    """Lay conversations into rows and write them; how many rows, and how many tokens count."""
    rows = [
        row for start in range(0, len(conversations), TOGETHER) for row in laid(conversations[start : start + TOGETHER], limit)
    ]
    header = {"descr": "<u4", "fortran_order": False, "shape": (len(rows) * window,)}
    np.lib.format.write_array_header_1_0(file, header)
    counted = 0
    for number, row in enumerate(rows):
        tokens = np.concatenate(row)
        following, filling = number + 1, [tokens]
        while sum(map(len, filling)) < window:
            filling.append(rows[following % len(rows)][0] & np.uint32(~COUNTED & 0xFFFFFFFF))
            following += 1
        tokens = np.concatenate(filling)[:window]
        counted += int(np.count_nonzero(tokens & COUNTED))
        file.write(tokens.astype("<u4").tobytes())
    return len(rows), counted


def laid(conversations: Sequence[np.ndarray], limit: int) -> list[list[np.ndarray]]:
    """Conversations in rows of at most `limit` tokens: the longest first, each into the first row that has room."""
    rows: list[list[np.ndarray]] = []
    room: list[int] = []
    for conversation in sorted(conversations, key=len, reverse=True):
        place = next((i for i, free in enumerate(room) if free >= len(conversation)), None)
        if place is None:
            rows.append([conversation])
            room.append(limit - len(conversation))
        else:
            rows[place].append(conversation)
            room[place] -= len(conversation)
    return rows


def read_conversations(files: Sequence[Path]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every conversation with where it is, checked as far as can be said without a template.

    Raises:
        DataError: one line naming file and line, or row.
    """
    for path in files:
        reader = _read_parquet if kind_of(path) == ".parquet" else _read_jsonl
        try:
            for where, record in reader(path):
                yield where, _checked(record, where)
        except BROKEN as error:
            raise DataError(f"{path}: damaged compression: {error}; pack the file again") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _checked(record: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(record, dict) or "messages" not in record:
        raise DataError(f'{where}: has no messages; {{"messages": [{{"role": "user", "content": "..."}}, ...]}} is expected')
    if record.get("tools"):
        raise DataError(f"{where}: has tools, which are not rendered; leave them out, or write them into a system message")
    try:
        messages = as_messages(record["messages"], where)
    except UserError as error:
        raise DataError(str(error)) from None
    messages = [
        {key: value for key, value in message.items() if value is not None or key == "content"} for message in messages
    ]
    for message in messages:
        if message["role"] not in ROLES:
            raise DataError(f"{where}: role {shown(message['role'])}: give one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f"{where}: {message['role']}'s content is {shown(message.get('content'))}; text is expected")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message of the assistant's, so nothing to learn")
    return messages


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open_binary(path) as lines:
        for number, content in enumerate(lines, 1):
            where = f"{path}:{number}"
            if not content.strip():
                continue
            try:
                yield where, json.loads(content)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: is not UTF-8 (byte {error.start})") from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if "messages" not in names:
                raise DataError(f"{path}: has no column `messages` among {', '.join(names) or 'none'}")
            columns = [name for name in ("messages", "tools") if name in names]
            row = 0
            for batch in table.iter_batches(batch_size=READ_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}: row {row}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a sound parquet file: {str(error).splitlines()[0]}") from None


def keep_texts(config: Config) -> None:
    """Keep what came with the weights of init_from, if they are Hugging Face's, in the run, so that exports have it too.

    Raises:
        UserError: one line naming the file that cannot be read or written.
    """
    source, kept = local_directory(str(config.init_from)), Path(config.run_dir) / COMPANIONS_FOLDER
    origin = source if (source / CONFIG_JSON).is_file() else source / COMPANIONS_FOLDER
    if (origin / CONFIG_JSON).is_file() and not kept.exists():
        keep_companions(origin, kept)
        if config.data.chat_template is not None:
            keep_template(config, kept)


def keep_template(config: Config, folder: Path) -> None:
    """Leave the template that conversations were rendered by in `folder`, for `generate --chat` and exports."""
    (folder / CHAT_TEMPLATE).write_text(template_of(config).source, encoding="utf-8")

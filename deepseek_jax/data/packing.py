"""Documents to two flat files of tokens, for training and held out, made once and reused while nothing changed.

Documents follow each other without padding, each closed by the end-of-document token, and sequences are cut
from that stream wherever they fall (report 4.1: packed, without masks between documents).
"""

import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from deepseek_jax.checkpoint.tokenizer_files import CHAT_TEMPLATE
from deepseek_jax.config import HELD_OUT as HELD_OUT_NAME
from deepseek_jax.config import Config
from deepseek_jax.data.conversations import (
    Packed,
    chat_fingerprint,
    conversation_files,
    keep_template,
    pack_conversations,
)
from deepseek_jax.data.documents import DataError, Texts, find_files, read_documents, split_documents
from deepseek_jax.data.loader import Mixture, TokenRow, Windows, evaluation_sequences, weights_of, window_length
from deepseek_jax.data.shards import open_part, read_manifest
from deepseek_jax.data.tokenizer import (
    end_of_document_id,
    largest_id,
    load_tokenizer,
    pieces,
    token_byte_lengths,
    train_tokenizer,
)
from deepseek_jax.errors import write_atomically

FORMAT = 1
"""Raise it when the same text would give other tokens."""
BATCH_CHARACTERS = 2**21
CONVERSATIONS = "data/conversations.json"
"""What became of them, as `Packed`."""
TOKENIZER, TRAIN, HELD_OUT, FINGERPRINT = (
    "tokenizer.json", "data/train.npy", "data/held_out.npy", "data/fingerprint.json",
)  # fmt: skip


@dataclass(frozen=True)
class PreparedData:
    """A run's text as tokens, which stay on disk."""

    tokenizer: Tokenizer
    sets: tuple[TokenRow, ...]
    """To train on: of each of `data.path`, or the one of `data.input`."""
    held_out: tuple[TokenRow, ...]
    """Of each of them."""
    end_of_document: int
    token_bytes: np.ndarray
    """Bytes of text that each token stands for, int32 [vocab_size]; special tokens 0."""
    eval: dict[str, TokenRow] = field(default_factory=dict)
    """What else is evaluated on, by the names of `data.eval`."""
    conversations: Optional[Packed] = None
    """What became of those to train on, where there are some."""

    @property
    def train(self) -> TokenRow:
        """The tokens to train on, where there is one set."""
        (tokens,) = self.sets
        return tokens

    @property
    def train_tokens(self) -> int:
        """How many there are to train on."""
        return sum(map(len, self.sets))

    @property
    def held_out_tokens(self) -> int:
        """How many are held out."""
        return sum(map(len, self.held_out))

    def to_evaluate(self, config: Config) -> dict[str, Windows | Mixture]:
        """By name what is evaluated on: of the sets together what is held out, and `eval`."""
        of_sets = {HELD_OUT_NAME: evaluation_sequences(config, self.held_out, weights_of(config, self.sets))}
        return of_sets | {name: evaluation_sequences(config, [text], [1]) for name, text in self.eval.items()}


def prepare(config: Config, directory: Path) -> PreparedData:
    """The tokens of `config.data.input`, from `directory` if they are there already, else made there.

    `directory` then holds tokenizer.json, data/train.npy, data/held_out.npy and data/fingerprint.json; of
    `config.data.path`, whose tokens stay where they are, the first and the last. Files are put in place when all are
    whole; a failure leaves what was there before.

    Raises:
        DataError: one line on the input, the tokenizer or a corpus shorter than one sequence.
    """
    directory = Path(directory)
    fingerprint = _fingerprint(config)
    if not _agrees(directory, fingerprint):
        _make(config, directory, fingerprint)
    return open_prepared(config, directory)


def open_prepared(config: Config, directory: Path) -> PreparedData:
    """What `prepare` has left in `directory`; raises as it does."""
    tokenizer = load_tokenizer(directory / TOKENIZER)
    token_bytes = token_byte_lengths(tokenizer, config.model.vocab_size)
    sets: tuple[TokenRow, ...]
    held_out: tuple[TokenRow, ...]
    if config.data.path:
        sets, held_out = (tuple(open_part(Path(path), part) for path in config.data.path) for part in ("train", "held_out"))
    else:
        sets, held_out = (open_tokens(directory / TRAIN),), (open_tokens(directory / HELD_OUT),)
    _check_lengths(config, min(map(len, sets)), min(map(len, held_out)))
    packed = Packed(**json.loads((directory / CONVERSATIONS).read_text())) if config.data.format == "chat" else None
    return PreparedData(tokenizer, sets, held_out, end_of_document_id(tokenizer), token_bytes, conversations=packed)


def is_prepared(config: Config, directory: Path) -> bool:
    """Whether `directory` holds the tokens of this very text and these settings, so that `prepare` changes nothing."""
    return _agrees(Path(directory), _fingerprint(config))


def changed_files(config: Config, directory: Path) -> list[str]:
    """What is not as it was when `directory`'s tokens were made, file by file, in words."""
    try:
        then = json.loads((directory / FINGERPRINT).read_text(encoding="utf-8")).get("files", [])
        was = {path: state for path, *state in then}
    except (OSError, ValueError, AttributeError):
        return []
    now = {path: state for path, *state in _fingerprint(config).get("files", [])}
    told = [f"{path} is gone" for path in was if path not in now] + [f"{path} is new" for path in now if path not in was]
    for path, (size, _) in now.items():
        if path in was and was[path] != now[path]:
            told.append(
                f"{path} has {size:,} bytes and had {was[path][0]:,}" if size != was[path][0] else f"{path} has changed"
            )
    return told


def write_tokens(texts: Texts | Collection[str], tokenizer: Tokenizer, path: Path, title: str = "tokenizing") -> int:
    """Write the tokens of `texts`, an end-of-document token after each, to one flat .npy file.

    The file appears whole or not at all; uint16 if the vocabulary allows, else uint32.

    Returns:
        How many tokens were written.

    Raises:
        DataError: when the tokenizer has no end-of-document token or the file cannot be written.
    """
    dtype = np.dtype("<u2" if largest_id(tokenizer) < 2**16 else "<u4")
    count = 0
    with _replacing(Path(path)) as file:
        _write_header(file, dtype, count)
        for tokens in _encode(_progress(texts, title), tokenizer):
            file.write(tokens.astype(dtype).tobytes())
            count += len(tokens)
        _write_header(file, dtype, count)
    return count


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    # NumPy leaves room for the shape to grow, so that the header can be written again in its place.
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Token ids of `texts`, in batches of pieces, for the tokenizer's threads work on several at once."""
    end = end_of_document_id(tokenizer)
    for batch in _batches(texts):
        encoded = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        for (_, is_last), encoding in zip(batch, encoded, strict=True):
            yield np.array(encoding.ids + [end] * is_last, np.int64)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of the texts, each with whether it is its text's last."""
    batch, size = [], 0
    for text in texts:
        remaining = len(text)
        for piece in pieces(text):
            remaining -= len(piece)
            batch.append((piece, remaining == 0))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _progress(texts: Texts | Collection[str], title: str) -> Iterator[str]:
    """`texts`, with a bar on the terminal while they last."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(texts, total=len(texts))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _make(config: Config, directory: Path, fingerprint: dict[str, Any]) -> None:
    if config.data.path:
        return _take(config, directory, fingerprint)
    try:
        (directory / "data").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=directory / "data") as name:
            _make_in(Path(name), config, fingerprint)
            (directory / FINGERPRINT).unlink(missing_ok=True)
            of_chat = (CHAT_TEMPLATE, CONVERSATIONS) if config.data.format == "chat" else ()
            for file in (TOKENIZER, TRAIN, HELD_OUT, *of_chat, FINGERPRINT):
                os.replace(Path(name, file), directory / file)
    except OSError as error:
        raise DataError(f"{directory}: the tokens cannot be written: {error.strerror or error}") from None
    finally:
        for folder in (directory / "data", directory):
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _take(config: Config, directory: Path, fingerprint: dict[str, Any]) -> None:
    """Take over what prepared sets have, once it is known to fit."""
    first, *others = (load_tokenizer(Path(path).expanduser() / TOKENIZER) for path in config.data.path)
    for path, other in zip(config.data.path[1:], others):
        if other.get_vocab() != first.get_vocab():
            raise DataError(f"{path}: has another tokenizer than {config.data.path[0]}; prepare it with "
                            f"prepare.tokenizer={config.data.path[0]}")  # fmt: skip
    token_byte_lengths(first, config.model.vocab_size)
    (directory / "data").mkdir(parents=True, exist_ok=True)
    write_atomically(directory / TOKENIZER, first.to_str())
    write_atomically(directory / FINGERPRINT, json.dumps(fingerprint, indent=1))


def _make_in(staging: Path, config: Config, fingerprint: dict[str, Any]) -> None:
    (staging / "data").mkdir()
    if config.data.format == "chat":
        return _make_chat(staging, config, fingerprint)
    dataset = read_documents(config.data.input, cache_dir=staging / "documents")
    train, held_out = split_documents(dataset, config.data.held_out_fraction, config.data.seed)
    vocab_size = config.model.vocab_size
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else train_tokenizer(train, vocab_size)
    token_byte_lengths(tokenizer, vocab_size)
    tokenizer.save(str(staging / TOKENIZER))
    train_count = write_tokens(train, tokenizer, staging / TRAIN, "tokenizing the training text")
    held_out_count = write_tokens(held_out, tokenizer, staging / HELD_OUT, "tokenizing the held-out text")
    _check_lengths(config, train_count, held_out_count)
    (staging / FINGERPRINT).write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")


def _make_chat(staging: Path, config: Config, fingerprint: dict[str, Any]) -> None:
    """As `_make_in`, of conversations."""
    tokenizer = load_tokenizer(str(config.data.tokenizer))
    token_byte_lengths(tokenizer, config.model.vocab_size)
    files, share = conversation_files(config.data.input), config.data.held_out_fraction
    parts = (staging / TRAIN, 1 - share), (staging / HELD_OUT, share)
    packed, _ = pack_conversations(config, files, staging, parts)
    tokenizer.save(str(staging / TOKENIZER))
    keep_template(config, staging)
    (staging / CONVERSATIONS).write_text(json.dumps(packed._asdict()), encoding="utf-8")
    (staging / FINGERPRINT).write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")


def _check_lengths(config: Config, train: int, held_out: int) -> None:
    needed, where = window_length(config), ", ".join(config.data.path or config.data.input)
    if train < needed:
        raise DataError(f"{where}: {train} tokens found to train on and one sequence needs {needed}; give more text "
                        f"or lower train.sequence_length={config.train.sequence_length}")  # fmt: skip
    if held_out < needed:
        raise DataError(f"{where}: {held_out} tokens held out and one sequence needs {needed}; give more text "
                        f"or raise data.held_out_fraction={config.data.held_out_fraction}")  # fmt: skip


def _fingerprint(config: Config) -> dict[str, Any]:
    """What the tokens depend on; files by path, size and time of change, prepared sets by their own fingerprints."""
    if config.data.path:
        sets = [read_manifest(Path(path))["fingerprint"] for path in config.data.path]
        return {"format": FORMAT, "sets": sets, "weights": config.data.weights, "seed": config.data.seed}
    if not config.data.input:
        raise DataError("data.input is empty; give data.input=FILE (text, .jsonl, .parquet, a directory or a glob), or "
                        "data.path=DIR of what deepseek_jax.prepare made")  # fmt: skip
    tokenizer = config.data.tokenizer
    if tokenizer and not Path(tokenizer).expanduser().exists():
        raise DataError(f"{tokenizer}: no such file; data.tokenizer must be a tokenizer.json or null")
    chat = chat_fingerprint(config)
    files = conversation_files(config.data.input) if chat else find_files(config.data.input)
    return {
        "format": FORMAT,
        **chat,
        "data": {name: getattr(config.data, name) for name in ("input", "tokenizer", "held_out_fraction", "seed")},
        "vocab_size": config.model.vocab_size,
        "tokenizer": state_of(Path(tokenizer).expanduser().resolve()) if tokenizer else None,
        "files": [state_of(path) for path in files],
    }


def state_of(path: Path) -> list[Any]:
    """What changes with a file: its path, size and time of change."""
    state = path.stat()
    return [str(path), state.st_size, state.st_mtime_ns]


def _agrees(directory: Path, fingerprint: dict[str, Any]) -> bool:
    try:
        stored = json.loads((directory / FINGERPRINT).read_text(encoding="utf-8"))
        load_tokenizer(directory / TOKENIZER)
        for name in () if "sets" in fingerprint else (TRAIN, HELD_OUT):
            open_tokens(directory / name)
    except (OSError, ValueError):
        return False
    return stored == fingerprint


def open_tokens(path: Path) -> np.ndarray:
    """A flat file of tokens, mapped; raises `DataError` if it is none."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as tokens: {error}") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise DataError(f"{path}: holds {tokens.dtype} of shape {tokens.shape}; a row of token ids is expected")
    return tokens

"""Text files to documents: what there is to read, refused in one line where it is not text.

Text is untrusted and often large. It goes through `datasets` into an Arrow file that is memory-mapped,
so that a corpus need not fit in memory; nothing is fetched, and nothing stays in the user's cache.
"""

import glob
import json
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deepseek_jax.data.compressed import BROKEN, COMPRESSED_SUFFIXES, kind_of, open_binary
from deepseek_jax.data.shuffle import permute
from deepseek_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = (".txt", ".md", ".rst", ".py", ".jsonl")
TEXT_SUFFIXES = (*(kind + packed for kind in KINDS for packed in ("", *COMPRESSED_SUFFIXES)), ".parquet")
READ_ROWS = 256


class DataError(UserError):
    """Text, a tokenizer or tokens that cannot be used; one line that names the file and the remedy."""


def find_files(
    inputs: Sequence[str],
    suffixes: tuple[str, ...] = TEXT_SUFFIXES,
    field: str = "data.input",
    with_empty: bool = False,
) -> list[Path]:
    """The files that paths, directories and globs stand for: each once, directories in sorted order.

    Directories are searched to any depth for `suffixes`, hidden names left out. Empty files are passed
    over there, but not when named.

    Args:
        field: of the config, for messages.
        with_empty: keep empty files, too, and named ones that are empty.

    Raises:
        DataError: an input that is missing, empty or matches nothing.
    """
    found: dict[Path, None] = {}
    for name in inputs:
        files = _matches(name, suffixes, field, with_empty)
        if not files:
            raise DataError(f"{name}: holds no text file that is not empty ({' '.join(suffixes)})")
        found.update(dict.fromkeys(file.resolve() for file in files))
    return list(found)


def _matches(name: str, suffixes: tuple[str, ...], field: str, with_empty: bool) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_directory(path, suffixes, with_empty)
    if path.exists():
        if not path.is_file():
            raise DataError(f"{name}: is no ordinary file; give a text, .jsonl or .parquet file")
        if path.stat().st_size == 0 and not with_empty:
            raise DataError(f"{name}: is empty; give a file with text in it")
        return [path]
    if not glob.has_magic(name):
        raise DataError(f"{name}: no such file or directory; check {field}")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        raise DataError(f"{name}: matches no file; check {field}")
    return [
        file
        for match in matches
        for file in (_in_directory(match, suffixes, with_empty) if match.is_dir() else _if_not_empty(match, with_empty))
    ]


def _in_directory(directory: Path, suffixes: tuple[str, ...], with_empty: bool) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        named_as_text = (n for n in sorted(names) if n.endswith(suffixes) and not n.startswith("."))
        files += [file for name in named_as_text for file in _if_not_empty(Path(folder, name), with_empty)]
    return files


def _if_not_empty(path: Path, with_empty: bool) -> list[Path]:
    return [path] if path.is_file() and (with_empty or path.stat().st_size > 0) else []


def read_documents(inputs: Sequence[str], cache_dir: Path | None = None) -> "Dataset":
    """The documents in `inputs` as a memory-mapped dataset with one column, `text`.

    A text file is one document; each line of a .jsonl file and each row of a .parquet file is one, in its
    `text`. Blank documents are left out.

    Args:
        inputs: files, directories or globs, see `find_files`.
        cache_dir: where the Arrow file lives; None takes a temporary directory that goes with the dataset.

    Raises:
        DataError: naming the file (and line or row) that is missing, empty, binary or malformed.
    """
    files = find_files(inputs)
    import datasets  # Here, because it takes seconds to import and a prepared run does not need it.

    quiet, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    temporary = None if cache_dir else tempfile.TemporaryDirectory(prefix="documents-")
    folder = str(cache_dir if temporary is None else temporary.name)
    try:
        dataset = datasets.Dataset.from_generator(
            _documents,
            features=datasets.Features({"text": datasets.Value("large_string")}),
            cache_dir=folder,
            gen_kwargs={"paths": tuple(files)},
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(f"{folder}: documents cannot be stored there: {cause}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not quiet:
            datasets.enable_progress_bars()
    if temporary:
        weakref.finalize(dataset, temporary.cleanup)
    return dataset


def _documents(paths: Sequence[Path]) -> Iterator[dict[str, str]]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    blank = True
    for path in paths:
        try:
            for text in readers.get(kind_of(path), _read_text)(path):
                if text and not text.isspace():
                    blank = False
                    yield {"text": text}
        except BROKEN as error:
            raise DataError(f"{path}: damaged compression: {error}; pack the file again") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if blank:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise DataError(f"{paths[0]}{more}: nothing but blanks to read; give text")


def _read_text(path: Path) -> Iterator[str]:
    with open_binary(path) as file:
        yield _decode(file.read(), path).removeprefix("\ufeff")


def _read_jsonl(path: Path) -> Iterator[str]:
    with open_binary(path) as lines:
        for number, content in enumerate(lines, 1):
            where = f"{path}:{number}"
            line = _decode(content, where)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f'{where}: has no text; each line must be of the form {{"text": "..."}}')
            try:
                text.encode()
            except UnicodeEncodeError:
                raise DataError(f"{where}: has half a surrogate pair, which is no character; repair the line") from None
            yield text


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise DataError(f"{path}: has no column `text` among {', '.join(table.schema_arrow.names) or 'none'}")
            row = 0
            for batch in table.iter_batches(batch_size=READ_ROWS, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise DataError(f"{path}: row {row} holds {type(text).__name__} as `text`; text is expected")
                    yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a sound parquet file: {str(error).splitlines()[0]}") from None


def _decode(data: bytes, where: Path | str) -> str:
    zero = data.find(0)
    if zero >= 0:
        raise DataError(f"{where}: is binary (a zero at byte {zero}); give text in UTF-8, .jsonl or .parquet")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 (byte {error.start}); give text in UTF-8, .jsonl or .parquet") from None


@dataclass(frozen=True)
class Texts:
    """Documents that stay on disk, between pieces of cut ones; iterating gives each text."""

    documents: "Dataset"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.before) + len(self.documents) + len(self.after)

    def __iter__(self) -> Iterator[str]:
        yield from self.before
        for batch in self.documents.iter(READ_ROWS):
            yield from batch["text"]
        yield from self.after


def split_documents(dataset: "Dataset", held_out_fraction: float, seed: int) -> tuple[Texts, Texts]:
    """Shuffle the documents and hold out the last ones, `held_out_fraction` of all bytes.

    The document at the boundary is cut, at a line break where one is near, so that a single long document can
    be split too.

    Returns:
        The texts to train on and the texts held out; neither is empty.

    Raises:
        DataError: when there is too little text to split.
    """
    order = permute(np.arange(len(dataset)), len(dataset), seed)
    ends = np.cumsum(_byte_sizes(dataset)[order])
    held_out_bytes = max(1, round(int(ends[-1]) * held_out_fraction))
    boundary = int(np.searchsorted(ends, ends[-1] - held_out_bytes, side="right"))
    begin = int(ends[boundary - 1]) if boundary else 0
    text = dataset[int(order[boundary])]["text"]
    head, tail = _cut(text, int(ends[-1]) - held_out_bytes - begin, near=held_out_bytes // 4)
    if not head and boundary == 0:
        raise DataError(f"the text has {ends[-1]} bytes in all, too few to hold a part out; give more text")
    train, held_out = (dataset.select(part, keep_in_memory=True) for part in (order[:boundary], order[boundary + 1 :]))
    return Texts(train, after=(head,) if head else ()), Texts(held_out, before=(tail,))


def _byte_sizes(dataset: "Dataset") -> np.ndarray:
    import pyarrow.compute

    tables = dataset.with_format("arrow").iter(READ_ROWS)
    return np.concatenate([pyarrow.compute.binary_length(table["text"]).to_numpy() for table in tables])


def _cut(text: str, byte: int, near: int) -> tuple[str, str]:
    """`text` in two at a character near `byte`, best after a line break at most `near` characters away."""
    middle = len(text.encode()[:byte].decode(errors="ignore"))
    breaks = (text.rfind("\n", max(0, middle - near), middle) + 1, text.find("\n", middle, middle + near) + 1)
    inside = [position for position in breaks if 0 < position < len(text)]
    position = min(inside, key=lambda p: abs(p - middle), default=middle)
    return text[:position], text[position:]

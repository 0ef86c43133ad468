"""Real text that every Python has at hand: the standard library's documentation and source, as one .jsonl file.

python scripts/stdlib_text.py runs/text/python.jsonl
"""

import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "turtledemo", "lib2to3", "ensurepip",
    "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip
"""Folders of others' code, of tests and of tables."""


def documentation() -> Iterator[str]:
    """The chapters of the language reference that come with `help()`."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # Left out by some distributions.
        return
    yield from topics.values()


def source() -> Iterator[str]:
    """The standard library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata"):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def write(target: Path) -> None:
    """All of it to `target`, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    documents = [text for part in (documentation(), source()) for text in part if text.strip()]
    partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    partial.replace(target)
    size = sum(len(text.encode()) for text in documents)
    print(f"{target}: {len(documents)} documents, {size / 1e6:.1f} MB of Python's own documentation and source")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

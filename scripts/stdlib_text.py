"""Real text that every Python has at hand: the standard library's documentation and source, as one .jsonl file.

python scripts/stdlib_text.py runs/text/python.jsonl
"""

import json
import os
import sys
from pathlib import Path

from deepseek_jax.data.sources import python_library


def write(target: Path) -> None:
    """All of it to `target`, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    documents = [document.text for document in python_library()]
    partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    partial.replace(target)
    size = sum(len(text.encode()) for text in documents)
    print(f"{target}: {len(documents)} documents, {size / 1e6:.1f} MB of Python's own documentation and source")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""Real text that every Python has at hand: the standard library's documentation and source, as one .jsonl file.

python scripts/stdlib_text.py runs/text/python.jsonl
"""

import argparse
import json
from pathlib import Path

from deepseek_jax.data.sources import python_library
from deepseek_jax.errors import write_atomically


def write(target: Path) -> None:
    """All of it to `target`, which appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    documents = [document.text for document in python_library()]
    write_atomically(target, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    size = sum(len(text.encode()) for text in documents)
    print(f"{target}: {len(documents)} documents, {size / 1e6:.1f} MB of Python's own documentation and source")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, metavar="FILE.jsonl")
    write(parser.parse_args().target)

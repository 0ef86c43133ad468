"""Real texts of known domains that a machine may have at hand, to measure what `deepseek_jax.data` tells of them."""

import ast
import gzip
import importlib.util
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from deepseek_jax.data.sources import python_library

MAN = Path("/usr/share/man")
MIN_CHARACTERS = 600


def labelled(limit: int) -> Iterator[tuple[str, str, str]]:
    """(domain, source, text), at most `limit` of each source."""
    library = list(python_library())
    topics = [d for d in library if d.source.startswith("python:topics/") and len(d.text) >= MIN_CHARACTERS]
    modules = [d for d in library if not d.source.startswith("python:topics/") and len(d.text) >= MIN_CHARACTERS]
    yield from (("general", "Python's language reference", d.text) for d in topics[:limit])
    yield from (("code", "Python's standard library", d.text) for d in modules[:: -(-len(modules) // limit)])
    headers = sorted(Path("/usr/include").rglob("*.h"))
    yield from islice((("code", "C headers", text) for path in headers[:: max(len(headers) // (2 * limit), 1)]
                       if len(text := path.read_text(errors="ignore")) >= MIN_CHARACTERS), limit)  # fmt: skip
    yield from islice((("general", "man pages, English", text) for text in man_pages("en")), limit)
    yield from islice((("math", "docstrings of sympy and mpmath", text) for text in math_docstrings()), limit)
    for name in sorted(path.name for path in MAN.glob("*") if path.is_dir() and not path.name.startswith("man")):
        yield from islice(
            (("multilingual", "man pages, other languages", text) for text in man_pages(name)), max(limit // 10, 3)
        )


def man_pages(language: str) -> Iterator[str]:
    """Their running text, without roff's marks."""
    folder = MAN if language == "en" else MAN / language
    for path in sorted(folder.glob("man[1-8]/*.gz")):
        try:
            raw = gzip.decompress(path.read_bytes()).decode()
        except (OSError, UnicodeDecodeError, EOFError):
            continue
        text = re.sub(r"\\f[A-Z]|\\f\(..|\\f\[\w*\]|\\s[-+]?\d|\\[|&/,%]", "", raw).replace("\\-", "-").replace("\\(aq", "'")
        if "\\(" in text or "\\*" in text:  # characters that only roff can write
            continue
        lines = [re.sub(r"^\.(?:B|I|BR|IR|RB|BI|IB|SM)\s+", "", line) for line in text.splitlines()]
        text = "\n".join(line for line in lines if not line.startswith((".", "'")))
        if len(text) >= MIN_CHARACTERS and (language == "en" or _untranslated(path, lines) < 0.3):
            yield text


def _untranslated(path: Path, lines: list[str]) -> float:
    """Share of a translated page's lines that the English page has, too: translations are often of a few lines only."""
    try:
        original = gzip.decompress((MAN / path.parent.name / path.name).read_bytes()).decode(errors="ignore").splitlines()
    except OSError:
        return 0.0
    seen = {line.strip() for line in original}
    running = [line.strip() for line in lines if len(line.strip()) > 30]
    return sum(line in seen for line in running) / max(len(running), 1)


def math_docstrings() -> Iterator[str]:
    """Of the packages' functions and classes about polynomials, number theory, integrals, special functions."""
    for name, folders in (("sympy", ("polys", "ntheory", "integrals", "functions", "series", "matrices")), ("mpmath", ("",))):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        for path in (path for folder in folders for path in sorted((Path(spec.origin).parent / folder).rglob("*.py"))):
            if "tests" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    text = ast.get_docstring(node) or ""
                    prose = re.sub(r"(?m)^\s*(?:>>>|\.\.\. ).*\n(?:(?!\s*>>>|\s*$).*\n)*", "", text)
                    if len(prose) >= MIN_CHARACTERS:
                        yield prose

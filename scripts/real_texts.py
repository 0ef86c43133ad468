"""Real texts of known domains that a machine may have at hand, to measure what `deepseek_jax.data` tells of them."""

import ast
import gettext
import gzip
import importlib.util
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from deepseek_jax.data.sources import python_library

MAN, LOCALE = Path("/usr/share/man"), Path("/usr/share/locale")
MIN_CHARACTERS = 600
MATH = {"sympy": ("polys", "ntheory", "integrals", "functions", "series", "matrices"), "mpmath": ("",)}
OTHER_MATH = {
    "scipy": ("special", "stats", "linalg", "integrate", "interpolate", "spatial"),
    "numpy": ("polynomial", "linalg"),
}
API = {"matplotlib": ("",), "pandas": ("",), "datasets": ("",)}


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
    yield from islice((("math", "docstrings of sympy and mpmath", text) for text in docstrings(MATH)), limit)
    for name in sorted(path.name for path in MAN.glob("*") if path.is_dir() and not path.name.startswith("man")):
        yield from islice(
            (("multilingual", "man pages, other languages", text) for text in man_pages(name)), max(limit // 10, 3)
        )


def held_out(limit: int) -> Iterator[tuple[str, str, str]]:
    """As `labelled`, of sources on which no rule was tried before the figures were taken."""
    yield from islice((("general", "docstrings of matplotlib, pandas, datasets", text) for text in docstrings(API)), limit)
    yield from spread("general", "descriptions of Python packages", sorted(_packages().glob("*.dist-info/METADATA")), limit)
    yield from spread("code", "npm's JavaScript", sorted(Path("/usr/lib/node_modules/npm").rglob("*.js")), limit)
    yield from spread("code", "Perl's modules", sorted(Path("/usr/share/perl").rglob("*.pm")), limit)
    yield from spread("math", "docstrings of scipy and numpy", list(docstrings(OTHER_MATH)), limit)
    yield from spread("multilingual", "translations of programs' messages", sorted(LOCALE.glob("*/LC_MESSAGES/*.mo")), limit)


def spread(domain: str, source: str, found: Sequence[Path | str], limit: int) -> Iterator[tuple[str, str, str]]:
    """About `limit` texts from all over what was found."""
    for each in found[:: -(-len(found) // limit) or 1]:
        if isinstance(each, str):
            text = each
        elif each.suffix == ".mo":
            text = _messages(each)
        else:
            text = each.read_text(errors="ignore").split("\n\n", each.name == "METADATA")[-1]
        if len(text) >= MIN_CHARACTERS:
            yield domain, source, text


def _messages(path: Path) -> str:
    """What a gettext catalogue says in place of English."""
    try:
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)
    except (OSError, UnicodeDecodeError, ValueError):
        return ""
    return "\n".join(said for name, said in catalogue._catalog.items() if name and said != name and len(said) > 30)  # type: ignore[attr-defined]


def _packages() -> Path:
    return Path(np.__file__).parent.parent


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


def docstrings(folders_of: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Of functions and classes in folders of packages, without the examples."""
    for name, folders in folders_of.items():
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

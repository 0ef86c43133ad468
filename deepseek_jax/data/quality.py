"""Is it text worth learning from? Rules of Gopher, C4 and FineWeb for prose, of StarCoder for code, and a score.

Every rule measures one thing and scores it: 1 at a value that nobody doubts, 0.6 at the published limit, and on along that
line. A document's score is its lowest, and that rule's name is what it is dropped by.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from deepseek_jax.data.dedup import UNSPACED, WORD

LIMIT_SCORE = 0.6
READ_CHARACTERS = 2**18
"""Of a longer document its beginning, middle and end are judged, so many characters in all."""
REPEATED_WORDS = 10

BULLET = ("- ", "* ", "+ ", "•", "●", "·", "–", "—")
BLOB = re.compile(r"[A-Za-z0-9+/=_%\\-]{100,}|(?:[0-9a-fA-F]{2}[\s:,]+){40,}")
MOJIBAKE = re.compile("[\ufffd\x80-\x84\x86-\x9f]|[ÃÂâÐÑÅÄ][\u0080-\u00bf€™œ“”…‚„†‡ˆ‰Š‹Œ˜š›žŸ–—]")
BOILERPLATE = re.compile(
    r"cookies?\b.*\b(?:use|policy|accept|consent)|(?:use|accept).{0,40}\bcookies|all rights reserved|privacy policy"
    r"|terms of (?:use|service)|sign (?:up|in)\b|log ?in\b|subscribe|newsletter|click here|read more"
    r"|share (?:this|on)|follow us|enable javascript|skip to (?:main )?content"
    r"|add to cart|copyright ©|lorem ipsum|©|back to top|leave a (?:reply|comment)",
    re.IGNORECASE,
)
CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{6}")
VOWEL = re.compile(r"[aeiouyıøœæ]")
ANY_WORD = re.compile(r"[^\W\d_]{4,}")
LATIN_WORD = re.compile(r"[a-z\u00df-\u024f\u1e00-\u1eff]{4,}")


class Judgement(NamedTuple):
    """A document's score, 0 to 1, and the rule that gave the lowest."""

    score: float
    rule: str


def judge(text: str, domain: str) -> Judgement:
    """Score `text` as what its domain says it is; see `domains.DOMAINS`."""
    text = _sample(text)
    rules = _code_rules(text) if domain == "code" else _prose_rules(text, is_math=domain == "math")
    return min((Judgement(score, rule) for rule, score in rules), key=lambda judgement: judgement.score)


def _sample(text: str) -> str:
    if len(text) <= READ_CHARACTERS:
        return text
    part, middle = READ_CHARACTERS // 3, len(text) // 2
    return "\n".join((text[:part], text[middle : middle + part], text[-part:]))


def _score(value: float, limit: float, good: float) -> float:
    """1 at `good`, LIMIT_SCORE at `limit`, along that line within 0 and 1."""
    return min(max(LIMIT_SCORE + (1 - LIMIT_SCORE) * (value - limit) / (good - limit), 0.0), 1.0)


def _prose_rules(text: str, is_math: bool) -> Iterator[tuple[str, float]]:
    words = text.split()
    units = WORD.findall(text.lower())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    total = max(len(text), 1)
    yield "blob", _score(_matched(BLOB, text) / total, 0.1, 0.0)
    yield "mojibake", _score(len(MOJIBAKE.findall(text)) / total, 0.003, 0.0)
    unspaced = len(re.findall(f"[{UNSPACED}]", text)) > 0.2 * len(text)
    if unspaced:
        yield "too short", _score(len(units), 100, 300)
    else:
        count = max(len(words), 1)
        yield "too short", _score(len(words), 50, 150)
        length = sum(map(len, words)) / count
        yield "long words", _score(length, 10, 7.5)
        yield "short words", _score(length, 2 if is_math else 3, 4)
        alphabetic = sum(any(map(str.isalpha, word)) for word in words) / count
        yield "few words with letters", _score(alphabetic, 0.5 if is_math else 0.7, 0.85)
        yield "symbols", _score((text.count("#") + text.count("...") + text.count("…")) / count, 0.1, 0.02)
        yield "gibberish", _score(_unspeakable(text), 0.12, 0.04)
    yield "bullets", _score(_share(lines, lambda line: line.startswith(BULLET)), 0.9, 0.6)
    yield "cut lines", _score(_share(lines, lambda line: line.endswith(("...", "…"))), 0.3, 0.05)
    yield "boilerplate", _score(_share(lines, lambda line: bool(BOILERPLATE.search(line[:1000]))), 0.3, 0.1)
    yield "repeated lines", _score(_repeated(lines), 0.3, 0.1)
    if len(units) > REPEATED_WORDS:
        yield "repeated phrases", _score(_repeated_phrases(units), 0.3, 0.1)
        yield "one phrase over and over", _score(_top_share(units), 0.2, 0.1)


def _code_rules(text: str) -> Iterator[tuple[str, float]]:
    lines = [line for line in text.splitlines() if line.strip()]
    total = max(len(text), 1)
    yield "too short", _score(len(text), 100, 300)
    yield "long lines", _score(sum(map(len, lines)) / max(len(lines), 1), 100, 80)
    yield "a very long line", _score(max(map(len, lines), default=0), 1000, 500)
    yield "few letters or digits", _score(sum(map(str.isalnum, text)) / total, 0.25, 0.4)
    yield "blob", _score(_matched(BLOB, text) / total, 0.2, 0.02)
    yield "mojibake", _score(len(MOJIBAKE.findall(text)) / total, 0.003, 0.0)
    yield "repeated lines", _score(_repeated([line for line in lines if len(line) > 30]), 0.5, 0.3)
    packed = len(zlib.compress(text.encode(errors="replace"), 1)) / total
    yield "repetition", _score(packed, 0.05, 0.12)


def _matched(pattern: re.Pattern[str], text: str) -> int:
    return sum(match.end() - match.start() for match in pattern.finditer(text))


def _share(lines: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, lines)) / max(len(lines), 1)


def _unspeakable(text: str) -> float:
    """Share of the words that are in Latin letters and have no vowel, or six consonants in a row."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    words = LATIN_WORD.findall(plain)
    odd = sum(not VOWEL.search(word) or bool(CONSONANTS.search(word)) for word in words)
    return odd / max(len(ANY_WORD.findall(plain)), 1)


def _repeated(lines: Sequence[str]) -> float:
    """Share of the characters that are in lines seen before."""
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(sum(map(len, lines)), 1)


def _repeated_phrases(units: Sequence[str]) -> float:
    """Share of the words that begin ten words in a row that were there before."""
    codes = [hash(unit) for unit in units]
    seen: set[int] = set()
    repeated = 0
    for place in range(len(codes) - REPEATED_WORDS + 1):
        phrase = hash(tuple(codes[place : place + REPEATED_WORDS]))
        repeated += phrase in seen
        seen.add(phrase)
    return repeated / (len(codes) - REPEATED_WORDS + 1)


def _top_share(units: Sequence[str]) -> float:
    """Share of the words that are in the most frequent pair of neighbours."""
    (_, count), *_ = Counter(zip(units, units[1:])).most_common(1)
    return 2 * count / len(units) if count > 2 else 0.0

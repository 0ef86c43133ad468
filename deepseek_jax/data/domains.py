"""The domain of a document from its text: code, math, multilingual, or general, which is English prose."""

import re

from deepseek_jax.data.dedup import UNSPACED

DOMAINS = ("general", "code", "math", "multilingual")
READ_CHARACTERS = 2**16
LANGUAGE_CHARACTERS = 2**12

CODE_LINE = re.compile(
    r"^\s*(?:def |class |import \w|from [\w.]+ import |return\b|(?:if|elif|else|for|while|try|except|with)\b.*:\s*$|@\w+"
    r"|#include|#define|#if|(?:public|private|protected|static|void|int|char|const|let|var|function|func|fn|pub|use|package"
    r"|struct|impl|async|raise|assert|yield|elif|fi|done|then|esac)\b.*[\w(){};:=]\s*$)"
    r"|[;{}]\s*$|^\s*[)\]}]+[,;]?\s*$|^\s*[\w.\[\]'\"]+\s*[-+*/|&:]?=\s*\S|^\s*[\w.]+\([^)]*\)\s*$|^\s*(?://|/\*|\*/|\#\s|\#$)"
    r"|^\s*['\"][^'\"]*['\"]\s*[:,]|^\s*(?:pass|break|continue)\s*$"
)
FORMULA = re.compile(
    r"\\(?:frac|sum|int|prod|sqrt|mathbb|mathbf|mathrm|mathcal|begin\{(?:equation|align|matrix)|alpha|beta|gamma|delta|theta"
    r"|lambda|sigma|omega|pi|infty|partial|left|right|cdot|leq?|geq?|in|to|ldots|operatorname)\b|[∑∏∫√∞∂∇≤≥≠≈∈∉⊂⊆∪∩∀∃→⇒⇔ℝℤℕℚℂ]"
    r"|\w\s?\^\s?[\w({-]|:math:|\$[^$\n]{1,80}\$"
)
MATH_WORD = re.compile(
    r"\b(?:theorems?|lemmas?|corollar(?:y|ies)|polynomials?|integrals?|equations?|matri(?:x|ces)|eigenvalues?|derivatives?"
    r"|coefficients?|integers?|rational|algebra(?:ic)?|prime|primes|modulo|factori[sz]ations?|denominators?|convergen(?:t|ce)"
    r"|hypergeometric|logarithms?|finite field|permutations?|vectors?|proofs?|infinity|complex plane|quadratic|asymptotic)\b",
    re.IGNORECASE,
)
LETTER = re.compile(r"[^\W\d_]")
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]")
CJK = re.compile(rf"[{UNSPACED}]")
CODE_LINES, MATH_PER_WORD, OTHER_LETTERS = 0.4, 0.025, 0.3
"""Share of lines that look like code; formulas and mathematical words per word; share of letters that are not Latin."""


def classify(text: str) -> str:
    """One of DOMAINS; code and mathematics are recognised before the language that they are written in."""
    text = text[:READ_CHARACTERS]
    lines = [line for line in text.splitlines() if line.strip()]
    is_code = sum(bool(CODE_LINE.search(line[:400])) for line in lines) / max(len(lines), 1)
    if is_code >= CODE_LINES:
        return "code"
    words = len(text.split()) + len(CJK.findall(text)) // 2
    if (len(FORMULA.findall(text)) + len(MATH_WORD.findall(text))) / max(words, 1) >= MATH_PER_WORD:
        return "math"
    letters = len(LETTER.findall(text))
    if letters and 1 - len(LATIN.findall(text)) / letters >= OTHER_LETTERS:
        return "multilingual"
    return "general" if language(text) == "en" else "multilingual"


def language(text: str) -> str:
    """ISO 639-1 code of the language, by py3langid."""
    import py3langid  # here, for it reads its model

    return str(py3langid.classify(" ".join(text[:LANGUAGE_CHARACTERS].split()))[0])

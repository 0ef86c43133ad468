"""Documents rearranged so that a model learns to fill in a middle: prefix, suffix, then the middle (report 4.1)."""

from typing import NamedTuple, Optional

import numpy as np
from tokenizers import Tokenizer

from deepseek_jax.data.documents import DataError

OWN = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
DEEPSEEK = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


class Marks(NamedTuple):
    """Token ids of what stands before the prefix, before the suffix, and before the middle."""

    begin: int
    hole: int
    end: int


def find_marks(tokenizer: Tokenizer) -> Marks:
    """The marks of a tokenizer.

    Raises:
        DataError: when it has none.
    """
    for names in (OWN, DEEPSEEK):
        ids = [token for name in names if (token := tokenizer.token_to_id(name)) is not None]
        if len(ids) == len(names):
            return Marks(*ids)
    raise DataError(f"prepare.fim_rate: the tokenizer has no tokens for it; add {' '.join(OWN)} to it, or set fim_rate=0")


def cut_for_infilling(text: str, rate: float, key: tuple[int, ...]) -> Optional[tuple[str, str, str]]:
    """Prefix, middle and suffix of a `rate` of all documents, cut at two places; None of the others.

    Args:
        key: what the choice depends on: the seed, and which document it is.
    """
    random = np.random.default_rng(key)
    if len(text) < 3 or random.random() >= rate:
        return None
    first, second = sorted((random.choice(len(text) - 1, 2, replace=False) + 1).tolist())
    return text[:first], text[first:second], text[second:]

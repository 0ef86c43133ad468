"""What a token of a training sequence is besides its id: whether it ends a document, and whether a loss counts it.

Conversations (`data.format=chat`) say both token by token: an answer may end in the very token that ends a document, and of
a conversation the assistant's words alone are learnt. Both are bits of the number that stands for the token, so that one array
is what is stored, read and sent to devices.
"""

from typing import Any, NamedTuple, Optional

from deepseek_jax.config import DataConfig

COUNTED, ENDS = 1 << 30, 1 << 29
IDS = ENDS - 1


class Marked(NamedTuple):
    """Arrays of one shape, of NumPy, JAX or PyTorch."""

    ids: Any
    ends: Optional[Any]
    """Whether a token is its document's last; None where documents are not kept apart."""
    counted: Optional[Any]
    """Whether it counts as a target; None where all of its own document's do."""


def read_marks(data: DataConfig, tokens: Any) -> Marked:
    """Take the numbers of training sequences apart, as `data` says that they are put together."""
    if data.format == "chat":
        return Marked(tokens & IDS, (tokens & ENDS) != 0, (tokens & COUNTED) != 0)
    return Marked(tokens, tokens == data.end_of_document if data.mask_documents else None, None)


def counts(marked: Marked) -> Any:
    """Whether the next token's loss counts it: booleans [B, T] of tokens 1 to T; None where every one does."""
    if marked.ends is None:
        return None
    own = ~marked.ends[:, :-1]
    return own if marked.counted is None else own & marked.counted[:, 1:]

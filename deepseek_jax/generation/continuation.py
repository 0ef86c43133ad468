"""One sequence as it is being written: its tokens, its text, and when it ends."""

from collections.abc import Collection, Sequence
from typing import Optional

from tokenizers import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for the first bytes of a character."""


class Continuation:
    """What is written after a prompt.

    Attributes:
        prompt: token ids.
        tokens: those written, the end token included.
        log_probabilities: theirs, where they are told.
        finish: None while it goes on; `stop` after an end token or a stop string, `length` at its limit.
        text: of the tokens, without the end token, and cut before a stop string; empty without a tokenizer.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        ends: Collection[int] = (),
        tokenizer: Optional[Tokenizer] = None,
        stop: Sequence[str] = (),
    ):
        """`ends` are tokens that end it, `stop` strings that do."""
        self.prompt, self.limit = list(prompt), max_new_tokens
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []
        self.finish: Optional[str] = None
        self._ends, self._stop = frozenset(ends), [string for string in stop if string]
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._told = 0
        self._text: Optional[str] = None

    @property
    def text(self) -> str:
        """See the class."""
        if self._text is not None:
            return self._text
        return "" if self._stream is None else self._stream.text

    def take(self, token: int, log_probability: Optional[float] = None) -> None:
        """Take in the next token; one that comes after the end is not wanted."""
        if self.finish:
            return
        self.tokens.append(token)
        if log_probability is not None:
            self.log_probabilities.append(log_probability)
        if token in self._ends:
            self._close("stop")
        else:
            if self._stream is not None:
                self._stream.push(token)
                self._look_for_stop()
            if not self.finish and len(self.tokens) >= self.limit:
                self._close("length")

    def news(self) -> str:
        """Text that has become certain since the last call: what may be the beginning of a stop string is held back."""
        certain = len(self.text) if self.finish else len(self.text) - self._held_back()
        piece = self.text[self._told : certain]
        self._told = max(certain, self._told)
        return piece

    def _held_back(self) -> int:
        longest = max((len(string) for string in self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(string.startswith(self.text[-length:]) for string in self._stop):
                return length
        return 0

    def _look_for_stop(self) -> None:
        places = [place for string in self._stop if (place := self.text.find(string)) >= 0]
        if places:
            self._text, self.finish = self.text[: min(places)], "stop"

    def _close(self, finish: str) -> None:
        self.finish = finish
        if self._stream is not None:
            self._stream.rest()
            self._look_for_stop()


class TextStream:
    """Turns tokens into text as they come, holding back characters that are not complete yet.

    Only the last few tokens are decoded anew, with one certain piece before them, as some decoders treat a text's
    beginning in their own way.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._open: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """Text that has become certain with this token."""
        self._open.append(token)
        piece = self._piece()
        if not piece or piece.endswith(INCOMPLETE):
            return ""
        return self._advance(piece)

    def rest(self) -> str:
        """What was still held back at the end."""
        return self._advance(self._piece())

    def _piece(self) -> str:
        before, whole = (
            self._tokenizer.decode(tokens, skip_special_tokens=False) for tokens in (self._before, self._before + self._open)
        )
        return whole[len(before) :]

    def _advance(self, piece: str) -> str:
        self._before, self._open = self._open or self._before, []
        self.text += piece
        return piece

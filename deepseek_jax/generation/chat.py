"""Conversations as the tokens that a model was taught to read: the tokenizer's chat template, rendered.

Templates come with checkpoints, from strangers: they run in Jinja's sandbox, which reads what it is given and
changes nothing. The names of special tokens within a message are text: nobody speaks in another's role.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding, Tokenizer

from deepseek_jax.checkpoint.tokenizer_files import CHAT_TEMPLATE, TOKENIZER_CONFIG
from deepseek_jax.checkpoint.untrusted import file_inside, read_object, shown
from deepseek_jax.data.tokenizer import end_of_document_id
from deepseek_jax.errors import UserError

TEMPLATE_JSON = "chat_template.json"
MAX_TEMPLATE_BYTES = 10**6
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
APART = "\N{ZERO WIDTH NON-JOINER}\uf8ff\N{ZERO WIDTH NON-JOINER}"
"""Put into the names of special tokens that occur in messages and taken out after rendering; text that has it is refused."""
BEGIN, END = (f"\N{ZERO WIDTH NON-JOINER}{mark}\N{ZERO WIDTH NON-JOINER}" for mark in ("\uf8fd", "\uf8fe"))
"""Around what a template says that the assistant writes; taken out of what is rendered."""


class ChatTemplate:
    """A chat template and the tokenizer that it belongs to."""

    def __init__(self, template: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str], where: str):
        """`where` is the file, for messages; raises `UserError` when it is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        self._where, self._special_tokens, self.source = where, dict(special_tokens), template
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise UserError(f"{where}: the chat template is no Jinja: {error}") from None
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        names = sorted((token.content for token in tokenizer.get_added_tokens_decoder().values()), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as text.

        Args:
            messages: each {"role": ..., "content": ...}, and whatever else the template reads.
            add_generation_prompt: whether to end with what begins the assistant's answer.

        Raises:
            UserError: one line with what the template says of these messages.
        """
        return _bare(self._rendered(messages, add_generation_prompt)).replace(APART, "")

    def tokens(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The conversation as token ids; arguments as for `render`."""
        text = _bare(self._rendered([_each_string(message, self._apart) for message in messages], add_generation_prompt))
        return [token for piece, _, special in self._pieces(text) for token in self._encode(piece, special).ids]

    def answers(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """A whole conversation as token ids, and which of them are the assistant's words.

        Those are what the template puts between `{% generation %}` and `{% endgeneration %}`. Where it has none, they are
        what an assistant's message adds to the text that ends in the prompt for it, as `generate --chat` would have it.
        A token that is in part theirs is theirs.

        Raises:
            UserError: one line with what the template says of these messages, or why it cannot be said whose words are whose.
        """
        kept = [_each_string(message, self._apart) for message in messages]
        marked = self._rendered(kept, add_generation_prompt=False)
        text = _bare(marked)
        is_answer = np.zeros(len(text), bool)
        for start, end in _marked_spans(marked) if BEGIN in marked else self._added_spans(kept, text):
            is_answer[start:end] = True
        ids: list[int] = []
        counted: list[bool] = []
        for piece, places, special in self._pieces(text):
            encoding, done = self._encode(piece, special), 0
            for token, (start, end) in zip(encoding.ids, encoding.offsets):
                # Some tokenizers leave blanks out of offsets; several tokens of one character all have its place.
                begin = done if done < end else start
                ids.append(token)
                counted.append(bool(is_answer[places[begin : max(end, begin + 1)]].any()))
                done = max(done, end)
        return ids, counted

    def _added_spans(self, kept: list[Any], text: str) -> list[tuple[int, int]]:
        """Where in `text`, the whole conversation, each of the assistant's messages stands: what it adds to its prompt."""
        spans = []
        for number, message in enumerate(kept):
            if message["role"] != "assistant":
                continue
            before = _bare(self._rendered(kept[:number], add_generation_prompt=True))
            after = _bare(self._rendered(kept[: number + 1], add_generation_prompt=False))
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"{self._where}: the chat template writes message {number + 1} otherwise than after its prompt, or once "
                    "others follow; mark the assistant's words in it by {% generation %} and {% endgeneration %}"
                )
            spans.append((len(before), len(after)))
        return spans

    def _pieces(self, text: str) -> Iterator[tuple[str, np.ndarray, bool]]:
        """Pieces to encode by themselves, the places of their characters in `text`, and whether special tokens are meant."""
        if APART not in text:
            yield text, np.arange(len(text)), True
            return
        assert self._special is not None
        start = 0
        for number, piece in enumerate(self._special.split(text)):
            places = np.arange(start, start + len(piece))
            start += len(piece)
            for match in reversed([*re.finditer(APART, piece)]):
                places = np.delete(places, slice(*match.span()))
            yield piece.replace(APART, ""), places, number % 2 == 1

    def _encode(self, text: str, special: bool) -> Encoding:
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _apart(self, text: str) -> str:
        """`text` in which no special token is named."""
        if any(mark in text for mark in (APART, BEGIN, END)):
            raise UserError(
                "a message contains U+200C U+F8FF U+200C, or U+F8FD or U+F8FE so, which keep text and tokens apart here"
            )
        if self._special is None:
            return text
        return self._special.sub(lambda match: match[0][:1] + APART + match[0][1:], text)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except SecurityError as error:
            raise UserError(f"{self._where}: the chat template does what it must not: {error}") from None
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError, ArithmeticError) as error:
            raise UserError(f"{self._where}: the chat template refuses these messages: {error}") from None


def load_chat_template(directory: Path, tokenizer: Optional[Tokenizer], given: Optional[Path] = None) -> ChatTemplate:
    """The template in a directory's chat_template.jinja, chat_template.json or tokenizer_config.json, or in the file given.

    Raises:
        UserError: when there is none, or none that can be used.
    """
    if tokenizer is None:
        raise UserError(f"{directory}: without a tokenizer.json no chat template can be used; give token ids by --prompt-ids")
    settings = _object(directory, TOKENIZER_CONFIG)
    special: dict[str, Any] = {name: _content(settings[name]) for name in SPECIAL_TOKENS if settings.get(name)}
    if not settings:  # a run's own tokenizer, of which exports say the same
        special = dict.fromkeys(SPECIAL_TOKENS[:3], tokenizer.id_to_token(end_of_document_id(tokenizer)))
    if given is not None:
        if not given.is_file():
            raise UserError(f"{given}: no such file; a chat template in Jinja is expected")
        template = _template(given.parent, given.name, as_jinja=True)
        assert template is not None
        return ChatTemplate(template, tokenizer, special, str(given))
    for name in (CHAT_TEMPLATE, TEMPLATE_JSON, TOKENIZER_CONFIG):
        template = _template(directory, name)
        if template is not None:
            return ChatTemplate(template, tokenizer, special, str(directory / name))
    raise UserError(f"{directory}: no chat template, neither {CHAT_TEMPLATE} nor chat_template in {TOKENIZER_CONFIG}; "
                    f"put one there")  # fmt: skip


def as_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation out of a file; raises `UserError` with `where` when it is none."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: messages is {shown(value)}; a list of messages is expected")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: {shown(message)} is no message: an object with role and content is expected")
    return value


def _template(directory: Path, name: str, as_jinja: bool = False) -> Optional[str]:
    if not (directory / name).is_file():
        return None
    if as_jinja or name == CHAT_TEMPLATE:
        file = file_inside(directory, name, str(directory))
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise UserError(f"{file}: {file.stat().st_size} bytes, too long for a chat template")
        return file.read_text(encoding="utf-8")
    value = _object(directory, name).get("chat_template")
    if isinstance(value, list):  # several by name
        by_name = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = by_name.get("default")
    if value is not None and not isinstance(value, str):
        raise UserError(f"{directory / name}: chat_template is {shown(value)}; a text is expected")
    return value


def _object(directory: Path, name: str) -> dict[str, Any]:
    return read_object(file_inside(directory, name, str(directory))) if (directory / name).is_file() else {}


def _content(token: Any) -> str:
    """A special token's name, which tokenizer_config.json may wrap in an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _each_string(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_string(item, change) for key, item in value.items()}
    return [_each_string(item, change) for item in value] if isinstance(value, list) else value


def _bare(rendered: str) -> str:
    return rendered.replace(BEGIN, "").replace(END, "")


def _marked_spans(rendered: str) -> list[tuple[int, int]]:
    """Where in the text without BEGIN and END what is between them stands."""
    spans, begun, place = [], 0, 0
    for piece in re.split(f"({BEGIN}|{END})", rendered):
        if piece == BEGIN:
            begun = place
        elif piece == END:
            spans.append((begun, place))
        else:
            place += len(piece)
    return spans


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: Optional[int] = None, **options: Any) -> str:
    """Unlike Jinja's own it escapes nothing for HTML, as templates of models expect."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, by which some templates mark the assistant's words: renders what is within.

    It is no part of Jinja. What is within stands between BEGIN and END.
    """

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """See `Extension.parse`."""
        line = next(parser.stream).lineno
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END))
        return [begin, *parser.parse_statements(("name:endgeneration",), drop_needle=True), end]

"""Conversations as the tokens that a model was taught to read: the tokenizer's chat template, rendered.

Templates come with checkpoints, from strangers: they run in Jinja's sandbox, which reads what it is given and
changes nothing. The names of special tokens within a message are text: nobody speaks in another's role.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from deepseek_jax.checkpoint.tokenizer_files import TOKENIZER_CONFIG
from deepseek_jax.checkpoint.untrusted import file_inside, read_object, shown
from deepseek_jax.errors import UserError

TEMPLATE_FILE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
MAX_TEMPLATE_BYTES = 10**6
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
APART = "\N{ZERO WIDTH NON-JOINER}\uf8ff\N{ZERO WIDTH NON-JOINER}"
"""Put into the names of special tokens that occur in messages and taken out after rendering; text that has it is refused."""


class ChatTemplate:
    """A chat template and the tokenizer that it belongs to."""

    def __init__(self, template: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str], where: str):
        """`where` is the file, for messages; raises `UserError` when it is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        self._where, self._special_tokens = where, dict(special_tokens)
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
        return self._rendered(messages, add_generation_prompt).replace(APART, "")

    def tokens(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """The conversation as token ids; arguments as for `render`."""
        kept = [_each_string(message, self._apart) for message in messages]
        text, ids = self._rendered(kept, add_generation_prompt), []
        if APART not in text:
            return self._encode(text, special=True)
        assert self._special is not None
        for number, piece in enumerate(self._special.split(text)):
            ids += self._encode(piece.replace(APART, ""), special=number % 2 == 1)
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _apart(self, text: str) -> str:
        """`text` in which no special token is named."""
        if APART in text:
            raise UserError(
                "a message contains U+200C U+F8FF U+200C, which is used here to keep text and special tokens apart"
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


def load_chat_template(directory: Path, tokenizer: Optional[Tokenizer]) -> ChatTemplate:
    """The template in a directory's chat_template.jinja, chat_template.json or tokenizer_config.json.

    Raises:
        UserError: when there is none, or none that can be used.
    """
    if tokenizer is None:
        raise UserError(f"{directory}: without a tokenizer.json no chat template can be used; give token ids by --prompt-ids")
    settings = _object(directory, TOKENIZER_CONFIG)
    special = {name: _content(settings[name]) for name in SPECIAL_TOKENS if settings.get(name)}
    for name in (TEMPLATE_FILE, TEMPLATE_JSON, TOKENIZER_CONFIG):
        template = _template(directory, name)
        if template is not None:
            return ChatTemplate(template, tokenizer, special, str(directory / name))
    raise UserError(f"{directory}: no chat template, neither {TEMPLATE_FILE} nor chat_template in {TOKENIZER_CONFIG}")


def as_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation out of a file; raises `UserError` with `where` when it is none."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: messages is {shown(value)}; a list of messages is expected")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: {shown(message)} is no message: an object with role and content is expected")
    return value


def _template(directory: Path, name: str) -> Optional[str]:
    if not (directory / name).is_file():
        return None
    if name == TEMPLATE_FILE:
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


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: Optional[int] = None, **options: Any) -> str:
    """Unlike Jinja's own it escapes nothing for HTML, as templates of models expect."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, by which some templates mark the assistant's words: renders what is within.

    It is no part of Jinja.
    """

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """See `Extension.parse`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

"""What tests of the data share: a text, a small vocabulary, and a config that reads files."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from deepseek_jax.config import Config, load_config
from deepseek_jax.data import packing

TEXT = Path(packing.__file__).read_text() * 2
VOCAB_SIZE = 320
SMALL = settings(max_examples=60)


def tiny(*inputs: Path | str, **data) -> Config:
    config = load_config("tiny")
    fields = {"input": [str(name) for name in inputs], "held_out_fraction": 0.05, **data}
    return replace(config, data=replace(config.data, **fields))


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message

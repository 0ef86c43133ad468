"""The tokenizer: any text comes back, and its bytes are counted."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from deepseek_jax.data.documents import DataError
from deepseek_jax.data.tokenizer import (
    END_OF_DOCUMENT,
    PIECE_CHARACTERS,
    end_of_document_id,
    load_tokenizer,
    pieces,
    token_byte_lengths,
    train_tokenizer,
)
from parity_tests.texts import SMALL, TEXT, VOCAB_SIZE, one_line


@SMALL
@given(st.text(max_size=80) | st.text("\n\r\t \u00a0_a1.é{END", max_size=80))
def test_any_text_comes_back(tokenizer, text):
    text += END_OF_DOCUMENT  # It stands in the text, so it is text.
    ids = tokenizer.encode(text).ids
    assert end_of_document_id(tokenizer) not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert token_byte_lengths(tokenizer, VOCAB_SIZE)[ids].sum() == len(text.encode())


def test_tokenizer_is_the_same_in_every_process(tokenizer, text_file):
    program = (
        "import sys, pathlib; from deepseek_jax.data.tokenizer import train_tokenizer\n"
        f"print(train_tokenizer([pathlib.Path(sys.argv[1]).read_text()], {VOCAB_SIZE}).to_str())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", program, text_file], env=environment, capture_output=True, text=True)
    assert other.stdout.strip() == tokenizer.to_str()


def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tokenizer):
    text = TEXT.replace("\n", "\n  ") * (3 * PIECE_CHARACTERS // len(TEXT) + 1)
    parts = list(pieces(text))
    assert len(parts) > 3 and "".join(parts) == text and max(map(len, parts)) <= PIECE_CHARACTERS
    assert [i for part in parts for i in tokenizer.encode(part).ids] == tokenizer.encode(text).ids
    wall = "x" * (2 * PIECE_CHARACTERS) + "\n" + " " * PIECE_CHARACTERS + "y"
    parts = list(pieces(wall))
    assert "".join(parts) == wall and max(map(len, parts)) <= PIECE_CHARACTERS
    assert tokenizer.decode([i for part in parts for i in tokenizer.encode(part).ids]) == wall


def test_loading_gives_back_the_tokenizer_without_truncation(tokenizer, tmp_path):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=9)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXT).ids == tokenizer.encode(TEXT).ids
    assert loaded.encode(END_OF_DOCUMENT).ids == tokenizer.encode(END_OF_DOCUMENT).ids


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"model": {"type": "BPE", "vocab": 1}}'])
def test_bad_tokenizer_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_tokenizer(path)
    one_line(error, str(path))


@pytest.mark.parametrize("name", ["<｜end▁of▁sentence｜>", "</s>", "<|endoftext|>"])
def test_end_of_document_of_known_tokenizers(name):
    other = Tokenizer(models.BPE())
    with pytest.raises(DataError):
        end_of_document_id(other)
    other.add_special_tokens(["<other>", name])
    assert end_of_document_id(other) == 1


def test_byte_lengths_of_added_and_byte_fallback_tokens(tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens([AddedToken("ünd", special=False)])
    lengths = token_byte_lengths(other, VOCAB_SIZE + 5)
    assert lengths.dtype == np.int32 and lengths.shape == (VOCAB_SIZE + 5,)
    assert lengths[other.token_to_id("ünd")] == 4 and lengths[0] == 0 and not lengths[VOCAB_SIZE + 1 :].any()
    with pytest.raises(DataError, match=r"model\.vocab_size=320: .* at least 321"):
        token_byte_lengths(other, VOCAB_SIZE)

    spiece = Tokenizer(models.BPE({"▁né": 0, "<0x0A>": 1, "e": 2}, [], byte_fallback=True))
    spiece.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert list(token_byte_lengths(spiece, 3)) == [4, 1, 1]


def test_vocabulary_without_room_for_every_byte():
    with pytest.raises(DataError, match=r"model\.vocab_size=256: .* at least 257"):
        train_tokenizer([TEXT], 256)

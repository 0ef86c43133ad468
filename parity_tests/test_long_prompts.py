"""Prompts read in parts, and a cache that grows: the numbers and tokens of reading at once, in the memory that is stated."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import RopeScaling, load_config
from deepseek_jax.generation import generator as generating
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.generator import Generator
from deepseek_jax.model import chunked_attention, decoding
from deepseek_jax.model.decoding_weights import prepare
from parity_tests.comparison import relative_difference
from parity_tests.siblings import Siblings

PART, LENGTHS = 16, [70, 33]


@cache
def pair() -> Siblings:
    """Groups, YaRN, two MTP modules, and a context of several parts."""
    config = dataclasses.replace(
        load_config("tiny").model, precision="float64", num_hidden_layers=2, num_nextn_predict_layers=2,
        rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0),
    )  # fmt: skip
    return Siblings(config)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 320, length).tolist() for length in LENGTHS]


@pytest.fixture
def in_parts(monkeypatch):
    """Of 16 tokens, whose attention goes by blocks of 5."""
    monkeypatch.setattr(decoding, "PART", PART)
    monkeypatch.setattr(generating, "PART", PART)
    monkeypatch.setattr(chunked_attention, "CHUNK", 5)


def read():
    """Logits after the prompts, and the caches of the main model's layers and of an MTP module."""
    config = pair().config
    weights = prepare(config, pair().variables, 2, drafts=True)
    tokens = np.zeros((2, 72), np.int32)
    for row, prompt in zip(tokens, prompts()):
        row[: len(prompt)] = prompt

    @jax.jit
    def both(weights, tokens):
        logits, cache = decoding.prefill(config, weights, tokens, jnp.array(LENGTHS), 96)
        hidden, _ = decoding.read(config, weights, tokens, 96)
        return logits, cache, decoding.read_mtp(config, weights, 0, hidden, jnp.roll(tokens, -1, axis=1), 96)

    logits, cache, (state, mtp) = jax.device_get(both(weights, tokens))
    assert cache[0].c_kv.shape[1] == mtp.c_kv.shape[1] == 96
    return [logits[:, None], state, *[leaf[:, :72] for leaf in jax.tree.leaves((cache, mtp))]]


def test_a_prompt_in_parts_is_the_prompt_at_once(x64, request):
    whole = read()
    request.getfixturevalue("in_parts")
    for part, one in zip(read(), whole, strict=True):
        for row, length in enumerate(LENGTHS):  # beyond its prompt a row holds what is never read
            assert relative_difference(part[row, :length], one[row, :length]) < 1e-12


@pytest.mark.parametrize("speculative", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tokens_are_the_same_and_the_cache_is_as_large_as_the_formula_says(speculative, x64, monkeypatch, request):
    config = pair().config

    def written(bytes_of_caches: list[int]) -> list[list[int]]:
        generator = Generator(config, pair().variables, 2, speculative)
        following = generator._following

        def watched(weights, settings, state, keys, **static):
            bytes_of_caches.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache)))
            return following(weights, settings, state, keys, **static)

        generator._following = watched
        rows = [Continuation(prompt, 50) for prompt in prompts()]
        for _ in generator.run(rows):
            pass
        return [row.tokens for row in rows]

    at_once: list[int] = []
    expected = written(at_once)
    request.getfixturevalue("in_parts")
    monkeypatch.setattr(generating, "CACHE_BLOCK", 8)
    grown: list[int] = []
    assert written(grown) == expected and all(len(tokens) == 50 for tokens in expected)
    of_position = 2 * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 8
    assert set(at_once) == {128 * of_position}  # 70 and 50 tokens, in multiples of 32
    assert [size // of_position for size in dict.fromkeys(grown)] == [96, 128] and grown == sorted(grown)


def test_memory_grows_with_the_cache_alone(in_parts, monkeypatch):
    """What a prompt twice as long needs more is its latents and states, not scores or keys."""
    config = dataclasses.replace(pair().config, precision="float32", num_nextn_predict_layers=0)
    monkeypatch.setattr(decoding, "PART", 256)
    weights = prepare(config, jax.tree.map(lambda x: np.asarray(x, np.float32), pair().variables), 1)

    def temporaries(length: int) -> int:
        tokens, lengths = jax.ShapeDtypeStruct((1, length), "int32"), jax.ShapeDtypeStruct((1,), "int32")
        lowered = jax.jit(partial(decoding.prefill, config, cache_length=length)).lower(weights, tokens, lengths)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(4096)
    caches = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert long - short < 2048 * 4 * 3 * (caches + config.hidden_size)

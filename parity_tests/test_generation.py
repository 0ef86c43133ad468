"""Generation in both siblings: greedy tokens equal each other and those of no cache; sampling follows its rules."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepseek_jax.config import RopeScaling, load_config
from deepseek_jax.errors import UserError
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling import Form, Sampling, choices, log_probability, sequence_keys
from deepseek_jax.generation.sampling import sample_token as jax_sample_token
from deepseek_jax.model import decoding
from deepseek_jax.model.decoding_weights import prepare
from deepseek_torch.generate import generate
from deepseek_torch.sampling import Sampler
from parity_tests.comparison import relative_difference
from parity_tests.siblings import Siblings

PROMPTS = [[5, 9, 2, 77, 31], [8], [100, 101, 102]]
CUTTABLE = dict(hidden_size=64, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=24, v_head_dim=32, moe_intermediate_size=32)
"""Sizes whose weights decoding cuts into panels; those of `tiny` stay whole, but for the head."""


@cache
def siblings(**sizes: int) -> Siblings:
    """Groups, YaRN, an MTP module that generation has no use for, and a context of 40 tokens."""
    config = dataclasses.replace(
        load_config("tiny").model, precision="float64", num_hidden_layers=2, max_position_embeddings=40,
        rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0), **sizes,
    )  # fmt: skip
    return Siblings(config)


@cache
def generator(sequences: int = 1, **sizes: int) -> Generator:
    with jax.enable_x64(True):
        return Generator(siblings(**sizes).config, siblings(**sizes).variables, sequences)


def from_jax(prompts, max_new_tokens, end=None, **arrangement):
    with jax.enable_x64(True):
        return [step.tolist() for step in generator(**arrangement).generate(prompts, max_new_tokens, end)]


def from_torch(prompts, max_new_tokens, end=None):
    return list(generate(siblings().torch, prompts, max_new_tokens, end))


def test_decodings_last_norm_has_the_models_epsilon():
    """So large that it shows; of the layers' norms the whole model's tests tell."""
    config = dataclasses.replace(siblings().config, rms_norm_eps=0.5)
    pair, hidden = Siblings(config), np.random.default_rng(0).standard_normal((2, 3, config.hidden_size))
    with torch.no_grad():
        expected = pair.torch.model["norm"](torch.from_numpy(hidden)) @ pair.torch.head()
    with jax.enable_x64(True):
        weights = prepare(config, pair.variables, 2)
        assert relative_difference(decoding.logits_of(config, weights, jnp.asarray(hidden)), expected) < 1e-13


def without_cache(prompt, count):
    """Greedy tokens, the whole sequence read anew for each."""
    model, tokens = siblings().torch, list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model.hidden_states(torch.tensor([tokens]))[0, -1] @ model.head()
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_equal_and_those_of_no_cache():
    expected = [list(step) for step in zip(*(without_cache(prompt, 12) for prompt in PROMPTS))]
    assert len({token for step in expected for token in step}) > 10, "a model that repeats itself proves little"
    assert from_torch(PROMPTS, 12) == expected
    assert from_jax(PROMPTS, 12) == expected


@pytest.mark.parametrize("sequences", [1, 3])
def test_greedy_tokens_from_cut_weights(sequences):
    """Three sequences choose more experts than there are: then those are cut as well."""
    layer = generator(sequences, **CUTTABLE)._weights.layers[1]
    kept = sorted("/".join(path) for path, weight in flatten_dict(layer["params"]).items() if weight.ndim > 1)
    experts = [f"mlp/experts/{name}_proj" for name in ("down", "gate", "up")] if sequences == 1 else []
    assert kept == [*experts, "mlp/gate/weight", "self_attn/kv_b_proj/weight"]
    expected = list(generate(siblings(**CUTTABLE).torch, PROMPTS, 12, None))
    assert len({token for step in expected for token in step}) > 10
    assert from_jax(PROMPTS, 12, sequences=sequences, **CUTTABLE) == expected


def test_a_sequence_that_has_ended_stays_ended():
    free = from_torch(PROMPTS, 12)
    end = free[3][0]
    first = [next((i for i, step in enumerate(free) if step[row] == end), 12) for row in range(3)]
    expected = [[token if i <= first[row] else end for row, token in enumerate(step)] for i, step in enumerate(free)]
    assert from_torch(PROMPTS, 12, end) == from_jax(PROMPTS, 12, end) == expected
    assert len(from_torch(PROMPTS[:1], 12, end)) == len(from_jax(PROMPTS[:1], 12, end)) == first[0] + 1


def test_the_context_is_the_limit():
    """The last token written needs no room, for nothing reads it."""
    prompt = [list(range(36))]
    assert from_torch(prompt, 100) == from_jax(prompt, 100) == [[token] for token in without_cache(prompt[0], 5)]
    for from_sibling in (from_torch, from_jax):
        with pytest.raises(UserError, match=r"41 tokens; the context .* is 40"):
            from_sibling([list(range(41))], 1)


@pytest.mark.parametrize(("asked", "form"), [
    ({}, Form(greedy=True, filters=False, penalizes=False, tells=False)),
    ({"temperature": 1e-3}, Form(greedy=False, filters=False, penalizes=False, tells=False)),
    ({"top_k": 3, "min_p": 0.5}, Form(greedy=True, filters=False, penalizes=False, tells=False)),
    ({"temperature": 1, "top_k": 1}, Form(greedy=False, filters=True, penalizes=False, tells=False)),
    ({"temperature": 1, "top_p": 0.99}, Form(greedy=False, filters=True, penalizes=False, tells=False)),
    ({"temperature": 1, "min_p": 0.01}, Form(greedy=False, filters=True, penalizes=False, tells=False)),
    ({"repetition_penalty": 0.9}, Form(greedy=True, filters=False, penalizes=True, tells=False)),
    ({"log_probabilities": True}, Form(greedy=True, filters=False, penalizes=False, tells=True)),
])  # fmt: skip
def test_what_is_compiled_is_what_is_asked_for(asked, form):
    assert Sampling(**asked).form() == form
    assert [Sampling(top_k=k).settings(40).top_k.item() for k in (0, 7, 50)] == [40, 7, 40]


def test_log_probabilities_of_several_positions():
    logits, tokens = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32), np.array([[4, 0, 2], [1, 1, 3]])
    expected = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        log_probability(logits, tokens), [[p[t] for p, t in zip(*row)] for row in zip(expected, tokens)], 1e-5
    )


def test_what_cannot_be_asked_for():
    for asked in ({"temperature": -0.1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1},
                  {"repetition_penalty": 0}):  # fmt: skip
        with pytest.raises(UserError, match=f"^{next(iter(asked))}="):
            Sampling(**asked)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.0, 0.5), (1.0, 1e-6)])
def test_samples_follow_temperature_and_top_p(temperature, top_p):
    """Of 4000 draws each token's share is within four standard errors of what it is to be."""
    draws, logits = 4000, np.array([0.3, 2.0, -1.0, 1.5, 0.0, 1.9, -3.0], np.float32)
    exact = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-exact)
    kept = order[np.cumsum(exact[order]) - exact[order] < top_p]
    expected = np.zeros(7)
    expected[kept] = exact[kept] / exact[kept].sum()
    rows = np.tile(logits, (draws, 1))
    in_torch = Sampler(temperature, top_p).draw_rows(torch.from_numpy(rows))
    asked, keys = Sampling(temperature=temperature, top_p=top_p), sequence_keys(0, np.arange(draws))
    in_jax = jax_sample_token(jnp.asarray(rows), None, asked.form(), asked.settings(7), keys)
    for tokens in (in_torch, in_jax):
        shares = np.bincount(np.asarray(tokens), minlength=7) / draws
        assert (np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()


@pytest.mark.parametrize("asked", [
    Sampling(temperature=0.7, top_k=5), Sampling(temperature=1.3, top_k=20, top_p=0.6), Sampling(temperature=1, min_p=0.2),
    Sampling(temperature=0.9, top_k=30, top_p=0.9, min_p=0.05, repetition_penalty=1.7),
])  # fmt: skip
def test_what_is_sampled_among_is_what_transformers_has(asked):
    logits, seen = np.random.default_rng(0).normal(0, 2, (16, 40)).astype(np.float32), np.arange(3 * 16).reshape(16, 3) % 40
    logits[0, 5] = 40  # after it float32's shares already sum to 1
    processors = [
        RepetitionPenaltyLogitsProcessor(asked.repetition_penalty), TemperatureLogitsWarper(float(asked.temperature)),
        TopKLogitsWarper(asked.top_k or 40), TopPLogitsWarper(asked.top_p), MinPLogitsWarper(asked.min_p),
    ]  # fmt: skip
    expected = LogitsProcessorList(processors)(torch.from_numpy(seen), torch.from_numpy(logits.copy()))
    mask = np.zeros((16, 40), bool)
    np.put_along_axis(mask, seen, True, axis=1)
    found = choices(jnp.asarray(logits), jnp.asarray(mask), asked.form(), asked.settings(40))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isinf(expected).any()


def run(rows, asked=Sampling(), **options):  # noqa: B008
    with jax.enable_x64(True):
        for _ in generator(3).run(rows, asked, **options):
            pass
    return rows


def test_every_sequence_and_token_has_a_key_of_its_own():
    """Of a hot model, whose tokens are all about as likely. A sequence hangs on its number and the seed alone."""
    hot = Sampling(temperature=1e6)
    rows = run([Continuation(PROMPTS[0], 12) for _ in range(3)], hot)
    tokens = [token for row in rows for token in row.tokens]
    assert len(tokens) == 36 and len(set(tokens)) >= 28, "36 draws out of 320 tokens should hardly repeat"
    again = run([Continuation(prompt, 12) for prompt in (PROMPTS[1], PROMPTS[0])], hot, numbers=[7, 1])
    assert again[1].tokens == rows[1].tokens
    other = run([Continuation(PROMPTS[0], 12)], hot, seed=1)
    assert len(set(other[0].tokens) & set(rows[0].tokens)) < 5


def test_log_probabilities_and_a_penalty_for_repetition():
    """Penalised choices, but the model's own probabilities, against the whole sequence read anew."""
    asked = Sampling(repetition_penalty=1.5, log_probabilities=True)
    rows = run([Continuation(prompt, 8) for prompt in PROMPTS], asked)
    for row in rows:
        tokens = list(row.prompt)
        for token, told in zip(row.tokens, row.log_probabilities):
            with torch.no_grad():
                logits = siblings().torch.hidden_states(torch.tensor([tokens]))[0, -1] @ siblings().torch.head()
            assert abs(torch.log_softmax(logits, -1)[token].item() - told) < 1e-12
            seen = sorted(set(tokens))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / np.float32(1.5), logits[seen] * np.float32(1.5))
            assert int(logits.argmax()) == token
            tokens.append(token)
    assert rows[0].tokens != without_cache(PROMPTS[0], 8) or rows[1].tokens != without_cache(PROMPTS[1], 8)


def test_a_short_prompt_is_not_cut_by_a_long_one():
    """Each has its own limit at the end of the context of 40, and its own finish."""
    rows = run([Continuation(range(38), 100), Continuation([8], 12), Continuation([8], 100, ends=[without_cache([8], 3)[2]])])
    assert [(len(row.tokens), row.finish) for row in rows] == [(3, "length"), (12, "length"), (3, "stop")]
    assert rows[1].tokens == without_cache([8], 12)

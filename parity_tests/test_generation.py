"""Generation in both siblings: greedy tokens equal each other and those of no cache; sampling follows its rules."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from deepseek_jax.config import RopeScaling, load_config
from deepseek_jax.errors import UserError
from deepseek_jax.generate import Generator
from deepseek_jax.generate import sample_token as jax_sample_token
from deepseek_torch.generate import generate, sample_token
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
    in_torch = sample_token(torch.from_numpy(rows), temperature, top_p, torch.Generator().manual_seed(0))
    in_jax = jax_sample_token(rows, jnp.float32(temperature), jnp.float32(top_p), jax.random.key(0), greedy=False)
    for tokens in (in_torch, in_jax):
        shares = np.bincount(np.asarray(tokens), minlength=7) / draws
        assert (np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()

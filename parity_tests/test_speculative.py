"""Drafts by MTP modules that the main model checks: greedily the same tokens, sampled the same distribution."""

import dataclasses
import itertools
from functools import cache

import jax
import numpy as np
import pytest
import torch

import deepseek_torch
from deepseek_jax.config import load_config
from deepseek_jax.errors import UserError
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling import Sampling
from deepseek_torch.generate import generate, generate_by_drafts
from parity_tests.siblings import Siblings

VOCABULARY, NEW, ROWS = 4, 10, 1500
LIKELIEST = Sampling(temperature=1.0, top_k=1)
"""The program that samples, held to greedy choices: so that it is compiled once."""


@cache
def siblings(**fields) -> Siblings:
    """A vocabulary so small that drafts are often right by chance, weights so large that tokens are not alike; two modules."""
    config = dataclasses.replace(
        load_config("tiny").model, vocab_size=VOCABULARY, num_hidden_layers=2, num_nextn_predict_layers=2, precision="float64",
        initializer_range=0.3, max_position_embeddings=64, **fields,
    )  # fmt: skip
    return Siblings(config)


@cache
def generator(**fields) -> Generator:
    with jax.enable_x64(True):
        return Generator(siblings(**fields).config, siblings(**fields).variables, ROWS, speculative=True, length_multiple=4)


def write(prompts, sampling=Sampling(), new=NEW, **fields):  # noqa: B008
    """Tokens of each prompt, and how many of them came in each round."""
    rows, lengths = [Continuation(prompt, new) for prompt in prompts], [[0] * len(prompts)]
    with jax.enable_x64(True):
        for _ in generator(**fields).run(rows, sampling):
            lengths.append([len(row.tokens) for row in rows])
    return [row.tokens for row in rows], np.diff(lengths, axis=0).T


def random_prompts(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in rng.integers(1, 8, count)]


@torch.no_grad()
def hidden_by_depth(model, tokens):
    """States for the head of every depth, [1 + D, T, d], for tokens [T + D]."""
    return model(torch.tensor([tokens])).hidden[:, 0]


def rounds_by_definition(pair, prompt, tokens):
    """How many tokens come in each round when all is read anew for every draft."""
    model, depth, text, came = pair.torch.eval(), 2, [*prompt, *tokens], [1]
    newest, head = len(prompt), pair.torch.head()
    while newest < len(text) - 1:
        known, drafts = text[: newest + 1], []
        for k in range(1, depth + 1):  # module k at position newest - 1 reads the token at newest - 1 + k
            states = hidden_by_depth(model, [*known, *drafts, *[0] * (depth - k)])
            drafts.append(int((states[k, newest - 1] @ head).argmax()))
        right = [draft == token for draft, token in zip(drafts, text[newest + 1 :])]
        came.append(min(len(list(itertools.takewhile(bool, right))) + 1, len(text) - 1 - newest))
        newest += came[-1]
    return came


@pytest.mark.parametrize(("fields", "asked"), [
    ({}, LIKELIEST), ({"mtp_form": "parallel", "mtp_hidden_after_norm": False}, Sampling()),
])  # fmt: skip
def test_greedy_tokens_of_200_prompts_are_those_without_drafts(fields, asked):
    prompts, pair, made = random_prompts(200), siblings(**fields), generator(**fields)
    tokens, rounds = write(prompts, asked, **fields)
    expected = list(generate(pair.torch, prompts, NEW, None))
    assert tokens == [list(row) for row in zip(*expected)]
    assert len({tuple(row) for row in tokens}) > 50, "prompts that are all continued alike prove little"
    assert 0.2 < made.accepted / made.drafted < 0.95
    for number in range(12):  # the drafts are the modules' own: with a wrong cache they would be others
        assert [came for came in rounds[number] if came] == rounds_by_definition(pair, prompts[number], tokens[number])
    of_sibling, share = generate_by_drafts(pair.torch, prompts[:8], NEW, None)
    assert of_sibling == tokens[:8] and 0 < share < 1


@pytest.mark.parametrize("in_torch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_samples_have_the_main_models_distribution(in_torch):
    """All texts of four tokens: chi-square against their probabilities by the whole model, filters included."""
    asked, prompt, draws = Sampling(temperature=1.5, top_p=0.97), [1, 3, 0, 2, 2, 1, 3], ROWS
    if in_torch:
        tokens, share = generate_by_drafts(siblings().torch, [prompt] * draws, 4, None, 1.5, 0.97)
    else:
        before = generator().drafted, generator().accepted
        tokens = [row[:4] for row in write([prompt] * draws, asked, 8)[0]]
        share = (generator().accepted - before[1]) / (generator().drafted - before[0])
    assert 0.2 < share < 0.95, "drafts must be both taken and refused for this to prove anything"
    model, texts = siblings().torch.eval(), list(itertools.product(range(VOCABULARY), repeat=4))
    with torch.no_grad():
        hidden = model.hidden_states(torch.tensor([[*prompt, *text[:3]] for text in texts]))[:, 6:]
        choices = torch.softmax(hidden @ model.head() / 1.5, -1).numpy()
    order = np.argsort(-choices, axis=-1)
    ordered = np.take_along_axis(choices, order, -1)
    np.put_along_axis(choices, order, np.where(np.cumsum(ordered, -1) - ordered < 0.97, ordered, 0), -1)
    choices /= choices.sum(-1, keepdims=True)
    expected = draws * np.take_along_axis(choices, np.array(texts)[..., None], -1)[..., 0].prod(-1)
    assert abs(expected.sum() - draws) < 1e-6
    counts = np.zeros(len(texts))
    np.add.at(counts, np.array(tokens) @ VOCABULARY ** np.arange(3, -1, -1), 1)
    assert not counts[expected == 0].any()
    often = expected >= 5
    cells = np.append(expected[often], expected[~often].sum()), np.append(counts[often], counts[~often].sum())
    square, freedom = ((cells[1] - cells[0]) ** 2 / np.maximum(cells[0], 1)).sum(), often.sum()
    assert freedom > 30 and square < freedom + 4 * np.sqrt(2 * freedom)


def test_without_a_module_there_is_one_line():
    config = dataclasses.replace(load_config("tiny").model, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="has no MTP modules"):
        Generator(config, {}, speculative=True)
    with pytest.raises(UserError, match="has no MTP modules"):
        deepseek_torch.DeepSeekModel("tiny", num_nextn_predict_layers=0).generate([1], speculative=True)

"""Writing and scoring on a mesh: the numbers of one device, weights straight to their devices, batches of any size."""

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from deepseek_jax.checkpoint.on_mesh import load_on_mesh, serving_division
from deepseek_jax.checkpoint.pretrained import VariablesSource
from deepseek_jax.config import ConfigError, RopeScaling, load_config
from deepseek_jax.generation.continuation import Continuation
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling import Sampling
from deepseek_jax.generation.scoring import Scorer
from deepseek_jax.model.decoding import decode, prefill, spread
from deepseek_jax.model.decoding_weights import prepare
from parity_tests.siblings import Siblings

PROMPTS = [[5, 9, 2, 77, 31], [8], [100, 101, 102], [7, 7], [301, 2, 5, 4, 9, 1, 0], [33], [1, 2], [250, 5, 6], [99], [3, 4]]
FEW = [mesh.split() for mesh in ("expert=8", "fsdp=2 expert=2 data=2")]
ALL = [*FEW, *(mesh.split() for mesh in ("expert=2", "expert=4", "data=2", "fsdp=2", "data=2 expert=4", "fsdp=8"))]
MESHES = [pytest.param(mesh, marks=[pytest.mark.slow] * (mesh not in FEW), id=" ".join(mesh)) for mesh in ALL]


@cache
def siblings(**fields) -> Siblings:
    """A dense layer and one with experts, groups, YaRN, an MTP module; 48 wide, so that fsdp divides every weight."""
    config = dataclasses.replace(
        load_config("tiny").model, precision="float64", num_hidden_layers=2, max_position_embeddings=64,
        rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0), **fields,
    )  # fmt: skip
    return Siblings(config)


def on_mesh(pair, mesh, stacked=False):
    """Division and weights; no mesh is one device."""
    if mesh is None:
        return None, pair.variables
    count = int(np.prod([int(axis.partition("=")[2]) for axis in mesh]))
    words = [f"parallel.{axis}" for axis in (mesh if "data" in " ".join(mesh) else ["data=1", *mesh])]
    division = serving_division(pair.config, words, jax.devices()[:count])
    return division, load_on_mesh(VariablesSource(pair.config, pair.variables), pair.config, division, stacked)


def logits(pair, mesh):
    """After eight prompts, and after one more token of each."""
    tokens, lengths = np.zeros((8, 8), np.int32), np.array([len(prompt) for prompt in PROMPTS[:8]], np.int32)
    for row, prompt in zip(tokens, PROMPTS):
        row[: len(prompt)] = prompt
    division, variables = on_mesh(pair, mesh)
    weights = prepare(pair.config, variables, 8, division=division)

    def both(weights, _, tokens, lengths):
        first, cache = prefill(pair.config, weights, tokens, lengths, 32)
        return first, decode(pair.config, weights, cache, tokens[:, 0], lengths)[0]

    return jax.device_get(jax.jit(spread(both, weights))(weights, None, tokens, lengths))


@cache
def expected_logits():
    return logits(siblings(), None)


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_are_those_of_one_device(x64, mesh):
    for found, expected in zip(logits(siblings(), mesh), expected_logits()):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def write(pair, mesh, sampling=Sampling(), **options):  # noqa: B008
    division, variables = on_mesh(pair, mesh)
    rows = [Continuation(prompt, 10) for prompt in PROMPTS]
    generator = Generator(pair.config, variables, 3, division=division, **options)
    for _ in generator.run(rows, sampling):
        pass
    return [row.tokens for row in rows], generator


def test_tokens_are_those_of_one_device(x64):
    """Ten prompts on eight devices, drafted by an MTP module; the head is the embedding."""
    pair = siblings(tie_word_embeddings=True)
    greedy = write(pair, None)[0]
    assert len({token for row in greedy for token in row}) > 10
    drafted, generator = write(pair, FEW[1], speculative=True)
    assert drafted == greedy and generator.drafted


@pytest.mark.slow
def test_samples_are_those_of_one_device(x64):
    """By each sequence's own key, wherever it is."""
    hot = Sampling(temperature=1.5, top_k=50, repetition_penalty=1.3)
    assert write(siblings(), FEW[0], hot)[0] == write(siblings(), None, hot)[0]


def test_scores_are_those_of_one_device(x64):
    """Windows of long texts too, and fewer than there are devices."""
    texts = [list(range(n, 3 * n)) for n in (2, 9, 40)]
    pair = siblings()

    def scores(mesh):
        division, variables = on_mesh(pair, mesh, stacked=True)
        return list(Scorer(pair.config, variables, 32, 16, 2, division).score(texts))

    for found, expected in zip(scores(FEW[1]), scores(None), strict=True):
        np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-10)
        np.testing.assert_array_equal(found.greedy, expected.greedy)


def test_every_device_holds_its_share_and_each_tensor_is_read_once(x64):
    pair = siblings()
    division = on_mesh(pair, FEW[1])[0]
    source, read = VariablesSource(pair.config, pair.variables), []
    original = source.read
    source.read = lambda place: read.append(place.name) or original(place)
    experts = load_on_mesh(source, pair.config, division)["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"][0]
    assert experts.shape == (8, 48, 20)
    assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 48, 20)}
    assert len(read) == len(set(read))
    for shard in experts.addressable_shards:
        whole = pair.variables["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"][0]
        np.testing.assert_array_equal(shard.data, whole[shard.index])


@pytest.mark.parametrize(("words", "message"), [
    (["parallel.pipe=2"], r"parallel\.pipe=2: does not write or score; divide by expert, fsdp and data"),
    (["parallel.context=2"], r"parallel\.context=2: does not write or score; divide by expert, fsdp and data"),
    (["train.steps=2"], r"'train\.steps=2': only fields such as parallel\.expert=8"),
    (["parallel.expert=3"], r"parallel: .* does not make the 8 devices that are here; nearest .*"),
    (["parallel.experts=8"], r"unknown field parallel\.experts; did you mean expert\?"),
])  # fmt: skip
def test_what_is_no_mesh_is_told(words, message):
    with pytest.raises(ConfigError, match=message):
        serving_division(load_config("tiny").model, words)

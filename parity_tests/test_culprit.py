"""Numbers that are none are traced to where they began, under the same names by both siblings."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from deepseek_jax.config import ParallelConfig, RopeScaling, load_config
from deepseek_jax.parallel.mesh import resolve
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.training.culprit import Search
from deepseek_jax.training.step import Scalars, TrainState
from deepseek_torch.training.culprit import find_culprit
from deepseek_torch.training.step import TrainState as TorchTrainState
from parity_tests.siblings import Siblings
from parity_tests.weights import from_torch

FAULTS = [
    "model.layers.0.input_layernorm",
    "model.layers.1.self_attn.kv_a_layernorm",
    "model.layers.2.mlp.gate",
    "model.layers.2.mlp.shared_experts.down_proj",
    "model.norm",
    "model.layers.3.eh_proj",
    "model.layers.3.shared_head.norm",
    "lm_head",
]
"""Modules whose weight holds one NaN."""


@pytest.fixture(scope="module")
def config():
    tiny = load_config("tiny")
    model = dataclasses.replace(tiny.model, num_hidden_layers=3, rope_scaling=RopeScaling(original_max_position_embeddings=16),
                                grouped_matmul="reference")  # fmt: skip
    return dataclasses.replace(tiny, model=model)


@pytest.fixture(scope="module")
def pair(config):
    return Siblings(config.model)


@pytest.fixture(scope="module")
def search(config):
    """Its programs are compiled once."""
    return Search(config)


BATCH = np.random.default_rng(0).integers(1, 320, (2, 8, 12), dtype=np.int32)
SCALARS = Scalars(*map(np.float32, (1e-3, 1e-3, 0.3)))


def states(config, pair, factors):
    """Of both siblings, with a factor on the first number of a tensor, or on all of it if it is finite."""
    weights = {name: value.clone() for name, value in pair.torch.state_dict().items()}
    for tensor, factor in factors.items():
        weights[tensor].view(-1)[0 if np.isnan(factor) else slice(None)] *= factor
    variables = from_torch(weights, config.model)
    model = Siblings(config.model).torch
    model.load_state_dict(weights)
    theirs = TorchTrainState(model, torch.optim.SGD(model.parameters()))
    return TrainState(variables["params"], variables["router_state"], None), theirs


@pytest.mark.parametrize("module", FAULTS)
def test_where_it_began(config, pair, search, module):
    ours, theirs = states(config, pair, {f"{module}.weight": np.nan})
    told = search.find(ours, BATCH, SCALARS)
    assert told == f"it began in the forward pass of micro-batch 1 of 2, in {module}{' or the loss' * (module == 'lm_head')}"
    assert find_culprit(theirs, torch.from_numpy(BATCH).long(), 0.3, config) == told


LAYER = "model.layers.1."
TOO_STEEP = {f"{LAYER}input_layernorm.weight": 1e15} | {
    f"{LAYER}self_attn.{name}.weight": 1e-15 for name in ("q_a_proj", "kv_a_proj_with_mqa")
}
"""Forward all is as before; the gradients of the last two are so much larger."""


def test_a_gradient_that_alone_is_no_number(config, pair, search):
    ours, theirs = states(config, pair, TOO_STEEP)
    told = search.find(ours, BATCH, SCALARS._replace(mtp_loss_weight=np.float32(1e33)))
    assert told == (f"it began in the backward pass of micro-batch 1 of 2, in {LAYER}self_attn.q_a_proj, "
                    f"{LAYER}self_attn.kv_a_proj_with_mqa")  # fmt: skip
    assert find_culprit(theirs, torch.from_numpy(BATCH).long(), 1e33, config) == told


def test_the_micro_batch_is_named_and_what_is_fine_is_no_culprit(config, pair, search):
    """Token 0 is in the second part alone, and its vector is no number."""
    batch = BATCH.copy()
    ours, theirs = states(config, pair, {"model.embed_tokens.weight": np.nan})
    batch[1, 3, 5] = 0
    told = search.find(ours, batch, SCALARS)
    assert told == "it began in the forward pass of micro-batch 2 of 2, in model.embed_tokens"
    assert find_culprit(theirs, torch.from_numpy(batch).long(), 0.3, config) == told
    ours, theirs = states(config, pair, {})
    assert search.find(ours, BATCH, SCALARS).startswith("made again, the same batch gives finite numbers")
    assert find_culprit(theirs, torch.from_numpy(BATCH).long(), 0.3, config).startswith("made again")


@pytest.mark.slow
def test_on_a_mesh_with_stages(config, pair):
    ours, _ = states(config, pair, {})
    of_mesh = ParallelConfig(pipe=2, data=1, fsdp=2, expert=2)
    config = dataclasses.replace(
        config, parallel=of_mesh, train=dataclasses.replace(config.train, batch_size=16, gradient_accumulation_steps=2)
    )
    config = dataclasses.replace(config, parallel=resolve(config, 8))
    division = Division(config.parallel, ours.params)
    cut = jax.tree.map(lambda spec: jax.sharding.NamedSharding(division.mesh, spec), division.param_specs())
    search = Search(config, division)
    for weight, factors, found in (
        (0.3, {f"{FAULTS[3]}.weight": np.nan}, f"forward pass of micro-batch 1 of 2, in {FAULTS[3]}"),
        (1e33, TOO_STEEP, f"backward pass of micro-batch 1 of 2, in {LAYER}self_attn.q_a_proj"),
    ):
        ours, _ = states(config, pair, factors)
        ours = ours._replace(params=jax.device_put(ours.params, cut))
        told = search.find(ours, BATCH, SCALARS._replace(mtp_loss_weight=np.float32(weight)))
        assert told.startswith(f"it began in the {found}"), told

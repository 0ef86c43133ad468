"""Documents of one sequence kept apart: their losses are those of each document alone."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, PartitionSpec

from deepseek_jax.config import MESH_AXES, Config, DataConfig, load_config
from deepseek_jax.data.marks import COUNTED, ENDS, Marked
from deepseek_jax.model.segments import segments
from deepseek_jax.training.evaluation import counted_bytes, evaluation_nats
from deepseek_jax.training.loss import counted_targets, targets_of_part, training_loss
from deepseek_jax.training.step import init_state
from deepseek_torch.model.segments import segments as torch_segments
from deepseek_torch.training import loss as torch_loss
from parity_tests.comparison import assert_close
from parity_tests.modules import COMPILE_QUICKLY
from parity_tests.siblings import Siblings
from parity_tests.test_parallel import Stepper, assert_same, batch, config_with
from parity_tests.weights import to_torch

END, LENGTH, DEPTH = 0, 24, 1


def sequences() -> np.ndarray:
    """[2, T + 1 + D]; documents of several lengths, one of them empty but for its end, the last ones cut."""
    tokens = np.random.default_rng(0).integers(1, 320, (2, LENGTH + 1 + DEPTH), dtype=np.int32)
    tokens[0, [4, 5, 13, 24]] = END
    tokens[1, [0, 20]] = END
    return tokens


def test_segments_number_documents_and_their_places():
    tokens = np.array([[7, 0, 3, 4, 0, 0, 5], [0, 1, 1, 1, 1, 1, 0]])
    expected = [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]], [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    for found in (segments(jnp.asarray(tokens) == END), torch_segments(torch.from_numpy(tokens) == END)):
        assert [part.tolist() for part in found] == list(expected)


@torch.no_grad()
def losses_one_by_one(pair: Siblings, tokens: np.ndarray) -> np.ndarray:
    """Mean nats by depth of the documents in `tokens`, each in a sequence of its own that starts at position 0."""
    nats: list[list[float]] = [[] for _ in range(DEPTH + 1)]
    for row in tokens:
        starts = [0, *(np.flatnonzero(row == END) + 1)]
        for start, document in zip(starts, np.split(row, starts[1:])):
            # What is put behind is not seen: the model is causal, and no target lies there.
            alone = torch.from_numpy(np.append(document, [5] * DEPTH)).long()[None]
            output = pair.torch(alone[:, :-1]) if len(document) > 1 else None
            for depth in range(DEPTH + 1):
                for place in range(min(len(document) - 1 - depth, LENGTH - start)):
                    logits = output.hidden[depth, 0, place] @ output.head
                    nats[depth].append(torch.nn.functional.cross_entropy(logits, alone[0, place + depth + 1].long()).item())
    return np.array([np.mean(of_depth) for of_depth in nats])


def test_losses_are_those_of_the_documents_one_by_one(x64):
    config = load_config("tiny", ["model.precision=float64", f"train.sequence_length={LENGTH}", "data.mask_documents=true",
                                  f"data.end_of_document={END}", "train.sequence_balance_weight=0.01"])  # fmt: skip
    pair, tokens = Siblings(config.model), sequences()
    pair.torch.zero_grad()
    loss, parts = torch_loss.training_loss(pair.torch, torch.from_numpy(tokens).long(), config, mtp_weight=0.7)
    loss.backward()

    one_by_one = losses_one_by_one(pair, tokens)
    assert_close({"torch": parts.cross_entropy}, {"torch": one_by_one}, 1e-12)

    state = pair.variables["router_state"]
    evaluation = jax.jit(partial(evaluation_nats, config=config, division=None), compiler_options=COMPILE_QUICKLY)
    nats = evaluation(pair.variables["params"], state, tokens[:, : LENGTH + 1], np.ones(len(tokens)))
    count = counted_targets(Marked(tokens, tokens == END, None), LENGTH, DEPTH, None)[0].sum()
    assert_close({"evaluation": nats / count}, {"evaluation": one_by_one[0]}, 1e-12)
    loss_of = jax.value_and_grad(partial(training_loss, config=config, mtp_weight=jnp.float64(0.7)), has_aux=True)
    (own, own_parts), gradients = jax.jit(loss_of, compiler_options=COMPILE_QUICKLY)(pair.variables["params"], state, tokens)
    theirs = {name: p.grad.numpy() for name, p in pair.torch.named_parameters()}
    ours = to_torch({"params": gradients}, config.model)
    assert_close({"loss": own, "parts": own_parts.cross_entropy}, {"loss": loss.detach(), "parts": parts.cross_entropy}, 1e-12)
    assert_close({name: ours[name] for name in theirs}, theirs, 1e-12)
    plain, _ = torch_loss.training_loss(
        pair.torch, torch.from_numpy(tokens).long(), replace(config, data=replace(config.data, mask_documents=False)), 0.7
    )
    assert abs(plain.item() - loss.item()) > 1e-3


def test_targets_count_the_same_on_a_mesh():
    tokens = np.concatenate([sequences(), sequences()[::-1]])
    tokens[3, 10:] = END

    def shares(tokens, division):
        counted = counted_targets(Marked(tokens, tokens == END, None), LENGTH, DEPTH, division)
        return counted / targets_of_part(counted, division)

    whole = shares(jnp.asarray(tokens), None)
    assert np.allclose(whole.sum((1, 2)), 1)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2, 1, 1, 1), MESH_AXES)
    of_device = partial(shares, division=SimpleNamespace(mesh=mesh))
    batch = PartitionSpec("data")
    parts = jax.shard_map(of_device, mesh=mesh, in_specs=batch, out_specs=PartitionSpec(None, "data"), check_vma=False)(tokens)
    assert np.allclose(np.asarray(parts) / 2, whole, rtol=1e-6)  # the loss is the devices' mean


@pytest.fixture(scope="module")
def masked_start():
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(partial(init_state, masked_on()))())


@pytest.fixture(scope="module")
def of_one_device(masked_start):
    return Stepper(masked_on(), masked_start).run(masked_start)


def masked_on(**parallel: int) -> Config:
    config = config_with(**parallel)
    return replace(config, data=replace(config.data, mask_documents=True))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [
    dict(pipe=2),
    dict(fsdp=2, expert=2),
    dict(pipe=2, data=2, expert=2),
    dict(pipe=2, fsdp=2, data=2, pipe_interleave=3, microbatch_size=2),
], ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items()))  # fmt: skip
def test_masked_steps_on_a_mesh_are_those_of_one_device(mesh, masked_start, of_one_device):
    """Five of them, with MTP of depth 2: bounds of documents travel with the sequences through stages."""
    assert_same(Stepper(masked_on(**mesh), masked_start).run(masked_start), of_one_device)


def test_what_stages_predict_of_documents_is_what_one_device_predicts(masked_start, x64):
    """The forward pass alone: every sequence's own nats, each with other documents than those that it meets on its way."""
    tokens = batch(masked_on(), 0)[0, :, :-2]
    told = []
    for config in (masked_on(), masked_on(pipe=2, pipe_interleave=2, microbatch_size=2), config_with()):
        division = Stepper(config, masked_start).division
        nats = jax.jit(partial(evaluation_nats, config=config, division=division), compiler_options=COMPILE_QUICKLY)
        state = masked_start.params, masked_start.router_state
        told.append([float(nats(*state, tokens[:12], np.eye(12)[row])) for row in (0, 5, 11)])
    one, stages, together = told
    assert_close({"nats": np.array(stages)}, {"nats": np.array(one)}, 1e-12)
    assert abs(np.array(together) / one - 1).min() > 1e-3, "the masks are to matter"


def test_bytes_of_documents():
    row, sizes = np.array([[3, 0, 4, 4]]), np.array([0, 1, 1, 2, 5])
    assert counted_bytes(DataConfig(mask_documents=True, end_of_document=END), row, sizes) == 5
    assert counted_bytes(DataConfig(), row, sizes) == 10
    chat = np.array([[3, COUNTED | 3, COUNTED | ENDS | 4, COUNTED | 2]])
    assert counted_bytes(DataConfig(format="chat"), chat, sizes) == 2 + 5

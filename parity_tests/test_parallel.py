"""The same numbers on a mesh as on one device, in float64, and one clear line for a mesh that cannot work."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from deepseek_jax.config import Config, ConfigError, ParallelConfig, Phase, load_config
from deepseek_jax.parallel.exchange import OVERFLOW
from deepseek_jax.parallel.mesh import make_mesh, mesh_shape, resolve
from deepseek_jax.parallel.pipeline import ABSENT, assign_layers, bubble
from deepseek_jax.parallel.sharding import Division, bytes_per_device, place_batch
from deepseek_jax.training.evaluation import evaluation_nats
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.step import Scalars, TrainState, init_state, train_step
from parity_tests.comparison import difference

DEVICES, STEPS, TOLERANCE, QK_CLIP = 8, 5, 1e-10, 1e-3


def config_with(**parallel: int) -> Config:
    """MTP of depth 2, groups, accumulation, clips that bite; nine layers of experts, which no number of stages divides."""
    tiny = load_config("tiny")
    model = dataclasses.replace(
        tiny.model, precision="float64", num_hidden_layers=10, num_nextn_predict_layers=2, hidden_size=32,
        grouped_matmul="reference",
    )  # fmt: skip
    train = dataclasses.replace(
        tiny.train, sequence_length=6, batch_size=32, gradient_accumulation_steps=2, gradient_clip=0.5,
        sequence_balance_weight=1e-2, bias_update_speed=[Phase(1e-2)], loss_chunk_tokens=10,
        qk_clip=QK_CLIP,
    )  # fmt: skip
    return dataclasses.replace(tiny, model=model, train=train, parallel=ParallelConfig(**{"data": 1} | parallel))


@pytest.fixture(scope="module")
def start() -> TrainState:
    """Weights from the seed, and biases of either sign."""
    with jax.enable_x64(True):
        state = jax.device_get(jax.jit(partial(init_state, config_with()))())
    rng = np.random.default_rng(0)
    return state._replace(router_state=jax.tree.map(lambda b: rng.normal(-0.5, 0.1, b.shape), state.router_state))


@pytest.fixture(scope="module")
def favoured(start) -> TrainState:
    """Biases so high that every token goes to the same three experts, all on the first of two shards."""
    return start._replace(router_state=jax.tree.map(lambda b: b + 100 * (np.arange(b.shape[-1]) < 3), start.router_state))


class Stepper:
    """Training on a mesh, or on one device without one; it compiles once."""

    def __init__(self, config: Config, start: TrainState):
        self.config = config
        self.division = None
        if config.parallel != ParallelConfig(data=1):  # one device
            devices = jax.devices()[: math.prod(mesh_shape(config.parallel))]
            parallel = resolve(config, len(devices))
            self.division = Division(parallel, start.params, make_mesh(parallel, devices))
        self._step = jax.jit(partial(train_step, config=config, division=self.division))

    def shardings(self, state: TrainState) -> TrainState:
        return self.division.shardings(state, make_optimizer(self.config.train))

    def run(self, state: TrainState) -> dict[str, np.ndarray]:
        """All that five steps tell and leave, by name; Adam's moments carry each step's gradients."""
        told = []
        with jax.enable_x64(True):
            if self.division is not None:
                state = jax.device_put(state, self.shardings(state))
            for number in range(STEPS):
                tokens = batch(self.config, number)
                tokens = place_batch(self.division, tokens.shape, 1, lambda start, end, t=tokens: t[:, start:end])
                state, metrics = self._step(state, tokens, Scalars(*map(np.float64, (1e-2, 1e-2, 0.3))))
                told.append(metrics)
            found = jax.device_get((state, told))
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def batch(config: Config, seed: int) -> np.ndarray:
    shape = (2, config.train.batch_size // 2, config.train.sequence_length + 3)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    if config.data.mask_documents:
        tokens[rng.random(shape) < 0.2] = config.data.end_of_document
    return tokens


@pytest.fixture(scope="module")
def one_device(start, favoured) -> dict[str, dict[str, np.ndarray]]:
    """What one device computes."""
    stepper = Stepper(config_with(), start)
    return {"start": stepper.run(start), "favoured": stepper.run(favoured)}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    apart = {name: difference(actual[name], expected[name]).relative for name in expected}
    worst = max(apart, key=apart.get)
    assert apart[worst] <= TOLERANCE, f"{worst}: {apart[worst]:.1e}"


MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(expert=8),
    dict(data=2, expert=4, exchange_room=1),
    dict(fsdp=2, expert=4),
    dict(fsdp=4, expert=2, exchange_parts=2),
    dict(fsdp=2, expert=4, exchange_groups=2),
    dict(pipe=4, fsdp=2),
    dict(pipe=8),
    dict(pipe=2, fsdp=2, data=2, pipe_interleave=3, microbatch_size=2),
]
IN_CI = [dict(pipe=2, fsdp=2, data=2, pipe_interleave=3, microbatch_size=2)]
"""With `test_all_axes_that_tokens_cross_and_the_worst_routing` each axis once; the others are slow."""


@pytest.mark.parametrize("mesh", [
    pytest.param(mesh, id="-".join(f"{axis}{size}" for axis, size in mesh.items()),
                 marks=[] if mesh in IN_CI else [pytest.mark.slow])
    for mesh in MESHES
])  # fmt: skip
def test_five_steps_are_those_of_one_device(mesh, start, one_device):
    """Losses, gradient norms, counts, and in the end parameters, moments and biases."""
    assert_same(Stepper(config_with(**mesh), start).run(start), one_device["start"])
    scores = [leaf for name, leaf in one_device["start"].items() if "largest_scores" in name]
    assert 0 < sum((of > QK_CLIP).sum() for of in scores) < sum(of.size for of in scores), (
        "the clip is to be part of the proof"
    )


def test_all_axes_that_tokens_cross_and_the_worst_routing(start, favoured, one_device):
    """Even routing, and then every token on one shard, so that the other gets none, with one program."""
    stepper = Stepper(config_with(pipe=2, data=2, expert=2), start)
    assert_same(stepper.run(start), one_device["start"])
    assert_same(stepper.run(favoured), one_device["favoured"])
    counts = one_device["favoured"]["[1][0].parts.counts['moe_layers']"]
    assert (counts[:, :3] > 0).all() and (counts[:, 3:] == 0).all(), "the test is to be of the worst routing"


@pytest.mark.parametrize("mesh", [
    dict(pipe=2, data=2, expert=2),
    *(pytest.param(mesh, marks=pytest.mark.slow)
      for mesh in (dict(fsdp=8), dict(pipe=2, fsdp=2, data=2), dict(context=2, fsdp=2, expert=2))),
])  # fmt: skip
def test_muon_makes_whole_matrices_orthogonal_on_any_mesh(mesh):
    """Three updates by the same gradients, whose matrices the devices have in parts."""
    told, rng = [], np.random.default_rng(0)
    for parallel in ({}, mesh):
        config = config_with(**parallel)
        model = dataclasses.replace(config.model, first_k_dense_replace=0, num_nextn_predict_layers=0)
        train = dataclasses.replace(config.train, optimizer="muon", qk_clip=None, sequence_length=8)
        config = dataclasses.replace(config, model=model, train=train)
        with jax.enable_x64(True):
            shapes = jax.eval_shape(partial(init_state, config))
            if not told:
                params, *gradients = (jax.tree.map(lambda p: rng.standard_normal(p.shape), shapes.params) for _ in range(4))
            division = Division(resolve(config, DEVICES), params) if parallel else None
            optimizer = make_optimizer(train, model, division)
            state, own = optimizer.init(params), params
            if division is not None:
                places = division.shardings(shapes, optimizer)
                state, own = jax.device_put((state, params), (places.optimizer, places.params))
            update = jax.jit(optimizer.update)
            for gradient in gradients:
                updates, state = update(gradient, state, own)
            found = jax.device_get((updates, state))
        told.append({jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)})
    assert_same(told[1], told[0])


def test_a_wrong_sum_would_be_found(start, one_device):
    """A mesh that forgets one device's tokens: the comparison sees it."""
    wrong = dict(one_device["start"])
    name = next(name for name in wrong if "o_proj" in name)
    wrong[name] = wrong[name] * (1 + 1e-9)
    with pytest.raises(AssertionError, match="o_proj"):
        assert_same(wrong, one_device["start"])


def traced_step(precision: str, mesh: dict[str, int], **fields: object):
    """A step in narrow arithmetic, and the shapes that it is called with, in their places."""
    config = config_with(**mesh)
    fields = {"precision": precision, "num_hidden_layers": 3, "num_nextn_predict_layers": 1} | fields
    model = dataclasses.replace(config.model, **fields)
    config = dataclasses.replace(config, model=model)
    state = jax.eval_shape(partial(init_state, config))
    division = Division(resolve(config, DEVICES), state.params) if mesh else None
    if division is not None:
        places = division.shardings(state, make_optimizer(config.train))
        state = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), state, places)
    tokens = batch(config, 0)[:, :, 1:]
    tokens = place_batch(division, tokens.shape, 1, lambda start, end: tokens[:, start:end])
    arguments = state, tokens, Scalars(*map(np.float32, (1e-2, 1e-2, 0.3)))
    return jax.jit(partial(train_step, config=config, division=division)).trace(*arguments), arguments, config


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("fp8", marks=pytest.mark.slow)])
def test_weights_are_gathered_narrow_and_gradients_summed_wide(precision):
    """No gradient of a weight is summed in bfloat16, neither over devices nor from tick to tick; what products take in
    bfloat16 travels in bfloat16."""
    traced, (state, *_), _ = traced_step(precision, dict(pipe=2, data=2, expert=2))
    matrices = {leaf.shape[-2:] for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1}
    summed, gathered = types_of_sums_and_gathers(traced.jaxpr.jaxpr, matrices)
    assert summed == {jnp.dtype("float32")}
    assert jnp.dtype("bfloat16") in gathered  # in fp8 the head alone: float8 codes are made from master weights
    experts = {leaf.shape[-2:] for leaf in jax.tree.leaves(state.params["moe_layers"]["mlp"]["experts"])}
    codes = {"fp8": {jnp.dtype("float8_e4m3fn")}, "bfloat16": set()}[precision]
    # Master weights that further rounds narrow, if there are any, would stay alive for them.
    assert read_by_overflow(traced.jaxpr.jaxpr, experts) == {jnp.dtype("bfloat16")} | codes


def test_the_embedding_is_gathered_wide_and_its_gradient_summed_wide():
    """Where it is smaller than the tokens' vectors, so that it travels itself: many tokens may share one of its rows."""
    table = 40, 32
    fields = dict(vocab_size=table[0], num_hidden_layers=1, num_nextn_predict_layers=0)
    traced, (state, *_), _ = traced_step("bfloat16", dict(data=2, fsdp=4), **fields)
    assert state.params["embed_tokens"]["weight"].shape == table
    found = {"all_gather": set(), "scatter-add": set()}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in found:
                found[equation.primitive.name] |= {out.aval.dtype for out in equation.outvars if out.aval.shape == table}
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(traced.jaxpr.jaxpr)
    assert found == {"all_gather": {jnp.dtype("float32")}, "scatter-add": {jnp.dtype("float32")}}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_a_narrow_step_is_that_of_one_device(precision):
    """But for the order of sums."""
    told = []
    for mesh in ({}, dict(pipe=2, data=2, expert=2)):
        traced, (shapes, *others), config = traced_step(precision, mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        state = jax.device_put(jax.jit(partial(init_state, config))(), places if mesh else None)
        state, metrics = traced.lower().compile()(state, *others)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
        told.append((float(metrics.loss), float(metrics.grad_norm)))
    (loss, norm), (loss_on_mesh, norm_on_mesh) = told
    assert abs(loss_on_mesh / loss - 1) < 1e-4 and abs(norm_on_mesh / norm - 1) < 2e-2, told


@pytest.mark.slow
def test_fp8_evaluation_on_a_mesh_is_that_of_one_device():
    """But for the order of sums, which may move a code to its neighbour."""
    config = config_with()
    model = dataclasses.replace(config.model, precision="fp8", num_hidden_layers=3, num_nextn_predict_layers=1)
    config, told = dataclasses.replace(config, model=model), []
    tokens, weights = batch(config, 0)[0, :, : config.train.sequence_length + 1], np.ones(16, np.float32)
    weights[13:] = 0  # what only fills the batch
    state = jax.jit(partial(init_state, config))()
    for mesh in ({}, dict(pipe=2, data=2, expert=2)):
        config = dataclasses.replace(config, parallel=ParallelConfig(**{"data": 1} | mesh))
        division = Division(resolve(config, DEVICES), state.params) if mesh else None
        places = division and division.shardings(state, make_optimizer(config.train)).params
        params = jax.device_put(state.params, places)
        nats = jax.jit(partial(evaluation_nats, config=config, division=division))
        told.append(float(nats(params, state.router_state, tokens, weights)))
    assert abs(told[0] / (13 * 6 * math.log(config.model.vocab_size)) - 1) < 0.1 and abs(told[1] / told[0] - 1) < 1e-3, told


def types_of_sums_and_gathers(jaxpr, matrices: set[tuple[int, int]]) -> tuple[set, set]:
    """Of what reduce-scatters and of what loops carry in the shape of a weight, and of what is gathered.

    Vectors of tokens travel by reduce-scatters of which one device has the vector and the others zeros.
    """
    summed, gathered = set(), set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "reduce_scatter" and "embed_tokens" not in str(equation.source_info.name_stack):
            summed |= {each.aval.dtype for each in equation.outvars}
        elif equation.primitive.name == "all_gather":
            gathered |= {each.aval.dtype for each in equation.outvars if each.aval.shape[-2:] in matrices}
        elif equation.primitive.name == "scan":
            (body,) = jaxprs_in_params(equation.params)  # what is not carried comes out with one more axis
            written = {inner for made in body.eqns if made.primitive.name == "dynamic_update_slice" for inner in made.outvars}
            carried = [out for out, inner in zip(equation.outvars, body.outvars)
                       if out.aval.ndim == inner.aval.ndim and inner not in written]  # fmt: skip
            summed |= {each.aval.dtype for each in carried if each.aval.shape[-2:] in matrices}
        for inner in jaxprs_in_params(equation.params):
            for known, more in zip((summed, gathered), types_of_sums_and_gathers(inner, matrices)):
                known |= more
    return summed, gathered


def read_by_overflow(jaxpr, matrices: set[tuple[int, int]]) -> set:
    """Types in which the rounds after the first get weights, or their gradients so far, of these shapes."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while" and OVERFLOW in str(equation.source_info.name_stack):
            found |= {each.aval.dtype for each in equation.invars if each.aval.ndim > 2 and each.aval.shape[-2:] in matrices}
        else:
            found = found.union(*(read_by_overflow(inner, matrices) for inner in jaxprs_in_params(equation.params)))
    return found


@pytest.mark.parametrize(("fields", "mesh"), [
    pytest.param(
        dict(tie_word_embeddings=True, q_lora_rank=None, num_nextn_predict_layers=0, first_k_dense_replace=0,
             num_hidden_layers=3),
        dict(pipe=2, data=2, fsdp=2), id="tied-plain-queries-no-dense-layer", marks=pytest.mark.slow,
    ),
    pytest.param(
        dict(first_k_dense_replace=2, num_hidden_layers=2, num_nextn_predict_layers=0), dict(fsdp=2, expert=4),
        id="dense-alone",
    ),
    pytest.param(
        dict(scoring_func="softmax", capacity_factor=1.0, n_shared_experts=2, shared_expert_gate=True, feed_forward="gelu",
             mtp_form="parallel", num_hidden_layers=4),
        dict(pipe=2, fsdp=2, expert=2), id="the-guides-forms", marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_other_models(fields, mesh):
    """One with all that is optional the other way round, in stages; one without experts; and one of other forms."""
    told = []
    for parallel in ({}, mesh):
        config = config_with(**parallel)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
        with jax.enable_x64(True):
            state = jax.device_get(jax.jit(partial(init_state, config))())
        told.append(Stepper(config, state).run(state))
    assert_same(told[1], told[0])


def test_every_device_holds_its_share_of_the_state(start):
    """1/8 of master weights and moments, but for the few arrays that an axis does not divide."""
    for mesh in (*MESHES, dict(pipe=2, data=2, expert=2)):
        stepper = Stepper(config_with(**mesh), start)
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(start.params))
        own = bytes_per_device(start.params, stepper.shardings(start).params)
        assert whole / 8 <= own < whole / 8 * 1.01, mesh


def test_layers_of_stages():
    """58 layers over 16 stages: each layer once, stages of 3 or 4; interleaved chunks follow each other over devices."""
    places = assign_layers(58, ParallelConfig(pipe=16))
    assert places.shape == (16, 1, 4) and sorted(places[places != ABSENT]) == list(range(58))
    assert set((places != ABSENT).sum(axis=(1, 2))) == {3, 4}
    assert assign_layers(8, ParallelConfig(pipe=2, pipe_interleave=2)).tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert bubble(8, ParallelConfig(pipe=4), rounds=1) == pytest.approx(3 / 7)
    assert bubble(24, ParallelConfig(pipe=4, pipe_interleave=3), rounds=1) == pytest.approx(3 / 15)
    assert bubble(58, ParallelConfig(pipe=16), rounds=100) == pytest.approx(1 - 1600 * 58 / (1615 * 64))


@pytest.mark.parametrize("fields, complaint", [
    (["parallel.data=3"], "pipe 1 x data 3 x fsdp 1 x context 1 x expert 1 does not make the 8 devices .* parallel.data=4 .*"),
    (["parallel.data=-1", "parallel.expert=3"], "expert 3 does not make the 8 devices that are here; nearest .*expert=4"),
    (["parallel.data=-1", "parallel.fsdp=-1"], "parallel.data and parallel.fsdp=-1: only one axis may be -1"),
    (["parallel.data=0"], "parallel.data=0: must be at least 1, or -1"),
    (["parallel.data=1", "parallel.expert=8", "model.n_routed_experts=12"],
     "parallel.expert=8: must divide model.n_routed_experts=12; nearest 6 or 4"),
    (["parallel.data=2", "parallel.pipe=4"], "parallel.pipe=4 .* 4 parts for 3 mixture-of-experts layers; at most pipe=3"),
    (["parallel.data=8", "train.batch_size=12"], "train.batch_size=12: must be a multiple of 8, .* nearest 16"),
    (["parallel.data=1", "parallel.fsdp=8", "model.remat=none"], "model.remat=none: .* choose products, hidden, .* or full"),
    (["parallel.data=2", "parallel.expert=4", "parallel.exchange_groups=3"],
     "parallel.exchange_groups=3: must divide parallel.expert=4; nearest 2 or 4"),
    (["parallel.exchange_room=0.5"], "parallel.exchange_room=0.5: must be at least 1"),
    (["parallel.exchange=letters"], "parallel.exchange=letters: choose one of auto, rounds, ragged"),
    (["parallel.experts=2"], "^command line: unknown field parallel.experts; did you mean expert?"),
])  # fmt: skip
def test_a_mesh_that_cannot_work_is_one_line(fields, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        resolve(load_config("tiny", fields), DEVICES)
    assert "\n" not in str(caught.value)

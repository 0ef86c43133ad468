"""Every implementation of `causal_attention` gives the output and gradients of a loop over documents in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.kernels.splash_attention import block_size
from deepseek_jax.model import attention_scores, chunked_attention
from deepseek_jax.model.causal_attention import causal_attention, causal_attention_and_scores, resolved
from deepseek_jax.model.products import policy
from parity_tests.emulation import emulate_splash

SUPPORTED = [
    *((name, dtype) for name in ("reference", "blocked", "chunked") for dtype in ("float64", "float32", "bfloat16")),
    ("splash", "float32"),
    ("splash", "bfloat16"),
]
TOLERANCES = {
    "float64": 1e-12,
    "float32": 5e-6,  # 2^-24 a rounding, and one more of the queries that splash scales beforehand
    "bfloat16": 4e-2,  # 2^-9 a rounding: of weights, of the output and of the scores' gradients
}
"""Largest difference over the largest number of an array."""
BATCH, HEADS, WIDTH, V_WIDTH, SCALE = 2, 2, 24, 16, 0.3
LENGTH = 300  # three of splash' blocks of 128, five of chunks of 64, and a rest of both
DOCUMENTS = [[1, 62, 3, 150, 84], [299, 1]]
"""Lengths in either sequence: across blocks, inside one, of one token, and one that starts after a block's first key."""


@pytest.fixture(autouse=True)
def small_and_emulated(monkeypatch):
    """Several chunks in a short sequence, and the TPU's kernel interpreted."""
    monkeypatch.setattr(chunked_attention, "CHUNK", 64)
    monkeypatch.setattr(attention_scores, "CHUNK", 64)
    emulate_splash(monkeypatch)


def arrays(length, dtype):
    """q, k, v and the output's gradient."""
    rng = np.random.default_rng(0)
    widths = WIDTH, WIDTH, V_WIDTH, V_WIDTH
    return [jnp.asarray(rng.standard_normal((BATCH, length, HEADS, width)), dtype) for width in widths]


@partial(jax.jit, static_argnums=5)
def output_and_gradients(q, k, v, gradient, segment_ids, implementation):
    def attend(q, k, v):
        return causal_attention(q, k, v, SCALE, segment_ids, implementation)

    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(gradient)


def expected(q, k, v, gradient, documents):
    """The same, one sequence and one document after the other."""
    operands = [np.asarray(x, np.float64) for x in (q, k, v, gradient)]
    results = [np.zeros_like(operands[i]) for i in (2, 0, 1, 2)]
    for sequence, lengths in enumerate(documents):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends):
            here = sequence, slice(start, end)
            for result, of_document in zip(results, document(*(x[here] for x in operands))):
                result[here] = of_document
    return results


def document(q, k, v, gradient):
    """Output and gradients of one document, each [T, H, ...]."""
    scores = np.einsum("thd,shd->hts", q, k) * SCALE
    scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_weights = np.einsum("thv,shv->hts", gradient, v)
    of_scores = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True)) * SCALE
    return (np.einsum("hts,shv->thv", weights, v), np.einsum("hts,shd->thd", of_scores, k),
            np.einsum("hts,thd->shd", of_scores, q), np.einsum("hts,thv->shv", weights, gradient))  # fmt: skip


def check(actual, right):
    for value, result in zip(actual, right, strict=True):
        assert value.shape == result.shape
        error = np.abs(np.asarray(value, np.float64) - result).max()
        assert error <= TOLERANCES[str(value.dtype)] * max(np.abs(result).max(), 1), error


@pytest.mark.parametrize("implementation, dtype", SUPPORTED)
def test_documents(implementation, dtype):
    with jax.enable_x64(dtype == "float64"):
        operands = arrays(LENGTH, dtype)
        segment_ids = jnp.asarray([np.repeat(np.arange(len(lengths)), lengths) for lengths in DOCUMENTS], jnp.int32)
        actual = output_and_gradients(*operands, segment_ids, implementation)
        assert all(value.dtype == dtype for value in actual)
        check(actual, expected(*operands, DOCUMENTS))


@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("implementation", ["reference", "blocked", "chunked", "splash"])
def test_whole_sequences(implementation, length):
    with jax.enable_x64(implementation != "splash"):
        operands = arrays(length, "float32" if implementation == "splash" else "float64")
        check(output_and_gradients(*operands, None, implementation), expected(*operands, [[length]] * BATCH))


@pytest.mark.parametrize("implementation, documents", [("blocked", DOCUMENTS), ("chunked", DOCUMENTS), ("reference", None)])
def test_the_largest_scores_are_told_beside_the_same_output(implementation, documents):
    """Of what a token sees alone: the largest of all are between documents, or of what comes later."""
    with jax.enable_x64(True):
        q, k, v, _ = arrays(LENGTH, "float64")
        ids = documents and jnp.asarray([np.repeat(np.arange(len(lengths)), lengths) for lengths in documents], jnp.int32)
        same, (out, largest) = (
            jax.jit(partial(attend, scale=SCALE, segment_ids=ids, implementation=implementation))(q, k, v)
            for attend in (causal_attention, causal_attention_and_scores)
        )
        scores = np.einsum("bthd,bshd->bhts", q, k) * SCALE
        seen = np.tri(LENGTH, dtype=bool)[None] & (True if ids is None else np.asarray(ids[:, :, None] == ids[:, None]))
        right = np.where(seen[:, None], scores, -np.inf).max(axis=(0, 2, 3))
        assert np.allclose(largest, right, rtol=1e-14) and (right < scores.max(axis=(0, 2, 3))).all()
        assert np.allclose(out, same, rtol=0, atol=1e-15)


@pytest.mark.parametrize("implementation", ["blocked", "chunked"])
def test_a_large_score_is_told_where_a_token_sees_it_and_nowhere_else(implementation):
    """Each head has one score, of two tokens at the edges of blocks and documents, the same or any two."""
    edges = [0, 62, 63, 64, 65, 236, 250, 256, 299]
    pairs = [(query, key) for query in edges for key in edges]
    q, k, v = np.zeros((3, 1, LENGTH, len(pairs), 1), np.float32)
    for head, (query, key) in enumerate(pairs):
        q[0, query, head] = k[0, key, head] = 2
    ids = np.repeat(np.arange(len(DOCUMENTS[0])), DOCUMENTS[0])
    attend = jax.jit(partial(causal_attention_and_scores, scale=SCALE, implementation=implementation))
    _, largest = attend(q, k, v, segment_ids=jnp.asarray(ids[None]))
    seen = [key <= query and ids[key] == ids[query] for query, key in pairs]
    np.testing.assert_array_equal(largest, np.where(seen, np.float32(4 * SCALE), 0))


@pytest.mark.parametrize("queries, keys", [(40, 20), (20, 40)])
def test_a_large_score_is_told_of_queries_and_keys_at_any_places(queries, keys, monkeypatch):
    """As devices have them that share a sequence; each head has one, of any two tokens."""
    monkeypatch.setattr(attention_scores, "CHUNK", 16)
    rng, heads = np.random.default_rng(0), np.arange(queries * keys)
    places = [np.sort(rng.permutation(60)[:count]) for count in (queries, keys)]
    ids = [rng.integers(0, 2, (1, count)) for count in (queries, keys)]
    q, k = (np.zeros((1, count, heads.size, 1), np.float32) for count in (queries, keys))
    q[0, heads // keys, heads] = k[0, heads % keys, heads] = 2
    largest = attention_scores.largest_scores(q, k, SCALE, ids, places)
    seen = (places[1] <= places[0][:, None]) & (ids[1] == ids[0].T)
    np.testing.assert_array_equal(largest, np.where(seen.reshape(-1), np.float32(4 * SCALE), 0))


@pytest.mark.parametrize("documents", [DOCUMENTS, None])
def test_keys_in_two_parts_are_as_keys_together(documents):
    """As devices have them that share a sequence: of its second half, to its own keys and to those before, and gradients."""
    with jax.enable_x64(True):
        q, k, v, gradient = (x.swapaxes(1, 2) for x in arrays(LENGTH, "float64"))
        documents_of = documents or [[LENGTH]] * BATCH
        ids = jnp.asarray([np.repeat(np.arange(len(lengths)), lengths) for lengths in documents_of], jnp.int32)
        before, own = slice(0, LENGTH // 2), slice(LENGTH // 2, LENGTH)
        queries, of_queries = q[:, :, own], gradient[:, :, own]

        @jax.jit
        def both():
            parts = [(k[:, :, part], v[:, :, part], documents and (ids[:, own], ids[:, part])) for part in (own, before)]
            found = [chunked_attention.attend(queries, *part, SCALE, causal=i == 0) for i, part in enumerate(parts)]
            out, normalizer = chunked_attention.merged(*found)
            gradients = [
                chunked_attention.gradients_of(queries, *part, out, normalizer, of_queries, SCALE, causal=i == 0)
                for i, part in enumerate(parts)
            ]
            (dq, *of_own), (more, *of_before) = gradients
            return out, dq + more, *(jnp.concatenate(pair, axis=2) for pair in zip(of_before, of_own))

        out, dq, dk, dv = (x.swapaxes(1, 2) for x in both())
        alone = gradient.at[:, :, before].set(0)
        right = expected(*(x.swapaxes(1, 2) for x in (q, k, v, alone)), documents_of)
        check([out, dq, dk, dv], [right[0][:, own], right[1][:, own], *right[2:]])
        assert not np.isnan(out).any() and not right[1][:, before].any()


def test_the_check_finds_a_leak_between_documents():
    with jax.enable_x64(True):
        operands = arrays(LENGTH, "float64")
        right = expected(*operands, DOCUMENTS)
        check(right, right)
        with pytest.raises(AssertionError):
            check(expected(*operands, [[1, 62, 3, 150, 83, 1], [299, 1]]), right)


def test_chunks_need_memory_in_proportion_to_the_length():
    def temporaries(length):
        operands = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(length, "float32")]
        compiled = output_and_gradients.lower(*operands, None, "chunked").compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.1 * temporaries(2048)


@pytest.mark.parametrize("implementation, kernel", [("chunked", "scan"), ("cudnn", "dot_product_attention_fwd_wrapper")])
def test_the_forward_pass_is_not_made_again(implementation, kernel):
    """What `model.remat` keeps of attention suffices for the backward pass."""

    def times(kept):
        layer = jax.checkpoint(partial(causal_attention, scale=SCALE, implementation=implementation), policy=kept)
        return count(jax.make_jaxpr(lambda *x: jax.vjp(layer, *x[:3])[1](x[3]))(*arrays(LENGTH, "bfloat16")).jaxpr, kernel)

    assert times(policy("full")) - times(policy("attention")) == times(policy("full")) - times(policy("products")) == 1


def count(jaxpr, kernel):
    """How often a primitive of this name stands in the program."""
    inner = [
        leaf for equation in jaxpr.eqns for leaf in jax.tree.leaves(list(equation.params.values())) if hasattr(leaf, "eqns")
    ]
    here = sum(equation.primitive.name == kernel for equation in jaxpr.eqns)
    return here + sum(count(each, kernel) for each in inner)


def test_cudnn_is_called_where_it_can_be():
    """Lowered for GPUs that are not there: the kernel and its gradient, or chunks for what it does not have."""

    def kernels(dtype, segment_ids=None):
        traced = output_and_gradients.trace(*arrays(LENGTH, dtype), segment_ids, "cudnn")
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("__cudnn$fmhaSoftmax")

    assert kernels("bfloat16") == 2
    assert kernels("float32") == 0
    assert kernels("bfloat16", jnp.zeros((BATCH, LENGTH), jnp.int32)) == 0


@pytest.mark.parametrize("topology, dtype", [("v5e:2x2", "bfloat16"), ("v5e:2x2", "float32"), ("v5p:2x2x1", "bfloat16")])
def test_splash_compiles_for_tpu(topology, dtype, monkeypatch):
    """With the largest blocks and DeepSeek-V3's head sizes: forward, not made again, and two kernels for the gradients."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    from jax.experimental import topologies

    monkeypatch.undo()
    place = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    q, v = (jax.ShapeDtypeStruct((2, 2000, 2, width), dtype, sharding=place) for width in (192, 128))
    segment_ids = jax.ShapeDtypeStruct((2, 2000), "int32", sharding=place)

    @jax.jit
    def gradients(q, k, v, gradient, segment_ids):
        layer = partial(causal_attention, scale=SCALE, segment_ids=segment_ids, implementation="splash")
        kept = jax.checkpoint(layer, policy=policy("products"))
        return jax.vjp(kept, q, k, v)[1](gradient)

    text = gradients.lower(q, q, v, v, segment_ids).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize(
    "length, dtype, block",
    [(4096, "bfloat16", 1024), (4096, "float32", 512), (4000, "bfloat16", 1024), (1100, "bfloat16", 128),
     (640, "bfloat16", 128), (512, "bfloat16", 512), (5, "bfloat16", 128)],
)  # fmt: skip
def test_blocks_follow_from_the_length(length, dtype, block):
    assert block_size(length, dtype) == block


def test_auto_is_the_best_that_has_the_type(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert [resolved("auto", jnp.dtype(name)) for name in ("bfloat16", "float64")] == ["splash", "chunked"]
    assert resolved("reference", jnp.dtype("float64")) == "reference"


def test_unusable_choices_are_named():
    q, k, v, _ = arrays(4, "float32")
    with pytest.raises(UserError, match="attention=flash: choose one of auto, reference, blocked, chunked, splash, cudnn"):
        causal_attention(q, k, v, SCALE, implementation="flash")
    with jax.enable_x64(True), pytest.raises(UserError, match="splash: has no float64"):
        causal_attention(*(x.astype("float64") for x in (q, k, v)), SCALE, implementation="splash")

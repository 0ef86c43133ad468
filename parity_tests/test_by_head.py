"""Attention's operands by head, as the TPU's kernels lay them out, interpreted: those of the plain forms, gradients too."""

import dataclasses
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import load_config
from deepseek_jax.kernels import by_head
from deepseek_jax.model.attention import latent_attention
from deepseek_jax.model.products import policy
from parity_tests.emulation import emulate_splash

BATCH, LENGTH, HEADS = 2, 256, 4
MODEL = dataclasses.replace(
    load_config("tiny").model, num_attention_heads=HEADS, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
WIDTHS = HEADS * 192, HEADS * 256, 64, HEADS * 128
"""Of queries, what latents expand to, the keys' common end, and the output."""


def arrays(dtype):
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 6, (BATCH, LENGTH, 32))
    rope = jnp.asarray(np.cos(angles), "float32"), jnp.asarray(np.sin(angles), "float32")
    return [jnp.asarray(rng.standard_normal((BATCH, LENGTH, width)), dtype) for width in WIDTHS], rope


@pytest.mark.parametrize("dtype, interleave, tolerance", [("float32", True, 2e-6), ("bfloat16", False, 2e-2)])
def test_attention_of_products_is_that_of_heads_put_together(dtype, interleave, tolerance, monkeypatch):
    """Over two blocks of tokens and two of heads, whose gradients for the keys' common end add up, and documents."""
    monkeypatch.setattr(by_head, "ROWS", 128)
    monkeypatch.setattr(by_head, "WIDEST_BYTES", 2 * 256 * jnp.dtype(dtype).itemsize)
    monkeypatch.setattr(by_head.pl, "pallas_call", partial(by_head.pl.pallas_call, interpret=True))
    emulate_splash(monkeypatch)
    (*operands, gradient), rope = arrays(dtype)
    documents = jnp.asarray(np.arange(LENGTH) // 100 + np.zeros((BATCH, 1)), "int32")

    def found(attention):
        config = dataclasses.replace(MODEL, attention=attention, rope_interleave=interleave)

        @jax.jit
        def both(*operands):
            out, pull = jax.vjp(lambda *x: latent_attention(config, *x, rope, documents), *operands)
            return out, *pull(gradient.reshape(out.shape))

        return both(*operands)

    by_products = Mock(wraps=by_head.attention_of_products)
    monkeypatch.setattr(by_head, "attention_of_products", by_products)
    of_heads = found("chunked")
    by_products.assert_not_called()
    for a, b in zip(found("splash"), of_heads, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
    by_products.assert_called_once()


@pytest.mark.parametrize(
    "length, heads, width, dtype, block",
    [
        (4096, 128, 192, "bfloat16", (512, 8)), (4096, 128, 256, "bfloat16", (512, 8)), (4096, 128, 192, "float32", (512, 4)),
        (384, 2, 192, "bfloat16", (128, 2)), (300, 128, 192, "bfloat16", None), (4096, 3, 192, "bfloat16", None),
    ],
)  # fmt: skip
def test_blocks_follow_from_the_shapes(length, heads, width, dtype, block):
    """And where tiles of 128 numbers are not whole there are none, and XLA takes heads apart."""
    found = by_head.block_of(length, heads, width, jnp.dtype(dtype))
    assert found == (None if block is None else (*block, heads))


@pytest.mark.parametrize("topology, dtype", [("v5e:2x2", "bfloat16"), ("v5e:2x2", "float32"), ("v5p:2x2x1", "bfloat16")])
def test_attention_of_products_compiles_for_tpu(topology, dtype):
    """With DeepSeek-V3's head sizes: three kernels of attention, two around it, made again, and two backwards."""
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    from jax.experimental import topologies

    place = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])

    def argument(width, dtype):
        return jax.ShapeDtypeStruct((1, 2048, width), dtype, sharding=place)

    config = dataclasses.replace(MODEL, num_attention_heads=16, attention="splash")
    angles = (argument(32, "float32"),) * 2

    @jax.jit
    def gradients(q, expanded, k_rope, gradient, rope):
        layer = partial(latent_attention, config, rope=rope, segment_ids=None)
        kept = jax.checkpoint(layer, policy=policy("attention"))
        return jax.vjp(kept, q, expanded, k_rope)[1](gradient.reshape(1, 2048, 16, 128))

    operands = (argument(width, dtype) for width in (16 * 192, 16 * 256, 64, 16 * 128))
    text = gradients.lower(*operands, angles).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3 + 3 * 2

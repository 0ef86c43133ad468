"""Products with weights in the arithmetic that the config names: where float8 enters the model, and only there.

What several weights make of the same input is asked for together, so that float8 quantises and keeps
the input once. Every result is kept where others are made again.
"""

from collections.abc import Sequence

import jax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.grouped_matmul import grouped_matmul
from deepseek_jax.model.matmul import matmul
from deepseek_jax.model.panels import Panels, times
from deepseek_jax.precision.fp8_grouped_matmul import fp8_grouped_matmul
from deepseek_jax.precision.fp8_matmul import fp8_matmul

KEPT = "kept"
"""What `model.remat=products` keeps."""


def keep(x: jax.Array) -> jax.Array:
    """Name x as what `model.remat=products` keeps, since making it again would cost more than elementwise work."""
    return checkpoint_name(x, KEPT)


def products(config: ModelConfig, x: jax.Array, *weights: jax.Array | Panels) -> list[jax.Array]:
    """x [..., K] times each of the weights [K, M], whole or cut: a list of [..., M] in x's type."""
    if any(isinstance(weight, Panels) for weight in weights):
        return [times(x, weight) for weight in weights]
    if config.precision == "fp8":
        results = fp8_matmul(x, weights)
    else:
        results = matmul(x, [weight.astype(x.dtype) for weight in weights])
    return [keep(result) for result in results]


def grouped_products(config: ModelConfig, x: jax.Array, group_sizes: jax.Array, *weights: jax.Array) -> list[jax.Array]:
    """Rows x [N, K], sorted by group, times each of the weights [E, K, M]: a list of [N, M] in x's type."""
    if config.precision == "fp8":
        results = fp8_grouped_matmul(x, weights, group_sizes)
    else:
        weights = [weight.astype(x.dtype) for weight in weights]
        results = grouped_matmul(x, weights, group_sizes, config.grouped_matmul)
    return [keep(result) for result in results]


def grouped_swiglu(
    config: ModelConfig, x: jax.Array, factors: jax.Array, group_sizes: jax.Array, projections: Sequence[jax.Array]
) -> jax.Array:
    """Rows x [N, hidden_size], sorted by group, through their group's SwiGLU (gate, up, down), times factors [N, 1]."""
    gate_proj, up_proj, down_proj = projections
    gate, up = grouped_products(config, x, group_sizes, gate_proj, up_proj)
    # The factor is applied before the down projection, which is linear: its rows are the narrower ones.
    activated = jax.nn.silu(gate) * up * factors.astype(x.dtype)
    return grouped_products(config, activated, group_sizes, down_proj)[0]

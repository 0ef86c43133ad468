"""Products with weights in the arithmetic that the config names: where float8 enters the model, and only there.

What several weights make of the same input is asked for together, so that float8 quantises and keeps
the input once. Every result is kept where others are made again.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.implementations import best
from deepseek_jax.model.grouped_matmul import grouped_matmul
from deepseek_jax.model.matmul import matmul
from deepseek_jax.model.panels import Panels, times
from deepseek_jax.precision.fp8_grouped_matmul import fp8_grouped_matmul
from deepseek_jax.precision.fp8_matmul import fp8_matmul
from deepseek_jax.precision.fp8_operands import KERNELS, Operand, Prepared, prepare_rows, prepare_weight
from deepseek_jax.precision.narrow import narrow

PRODUCT, HIDDEN, ATTENDED, WAYPOINT, AGAIN = "product", "hidden", "attended", "waypoint", "again"
"""What costs more than elementwise work to make again; of that a feed-forward's hidden units, before its activation;
attention's output, with what its backward pass needs of it; the few numbers between which a layer can be made again
piece by piece; and what is made of others' tokens, which nobody keeps."""
KEPT: dict[str, tuple[str, ...]] = {
    "products": (PRODUCT, HIDDEN, ATTENDED),
    "hidden": (HIDDEN, ATTENDED, WAYPOINT),
    "attention": (ATTENDED, WAYPOINT),
    "full": (),
}
"""By `model.remat`, what is kept of a layer beside its input."""


def keep(x: jax.Array, name: str = PRODUCT) -> jax.Array:
    """Name x as one of the above, for `policy`."""
    return checkpoint_name(x, name)


def policy(remat: str) -> Callable[..., bool]:
    """For `jax.checkpoint`: keeps what KEPT says."""
    return jax.checkpoint_policies.save_only_these_names(*KEPT[remat])


def products(config: ModelConfig, x: jax.Array, *weights: jax.Array | Panels, name: str = PRODUCT) -> list[jax.Array]:
    """x [..., K] times each of the weights [K, M], whole or cut: a list of [..., M] in x's type, kept by `name`."""
    whole = tuple(weight for weight in weights if not isinstance(weight, Panels))
    if len(whole) < len(weights):
        return [times(x, weight) for weight in weights]
    ready: list[Any] = [prepared(config, x, weight) for weight in whole]
    is_fp8 = config.precision == "fp8"
    results = fp8_matmul(x, tuple(ready), _fp8_implementation(config)) if is_fp8 else matmul(x, ready)
    return [keep(result, name) for result in results]


def grouped_products(
    config: ModelConfig, x: Any, group_sizes: jax.Array, *weights: Operand, name: str = PRODUCT
) -> list[jax.Array]:
    """Rows x [N, K], sorted by group, times each of the weights [E, K, M]: a list of [N, M] in x's type, kept by `name`.

    What lies in rows of no group is anything.
    """
    ready: list[Any] = [prepared(config, x, weight) for weight in weights]
    if config.precision == "fp8":
        results = fp8_grouped_matmul(x, tuple(ready), group_sizes, _fp8_implementation(config))
    else:
        results = grouped_matmul(x, ready, group_sizes, config.grouped_matmul, all_read=False)
    return [keep(result, name) for result in results]


def prepared_rows(config: ModelConfig, x: jax.Array) -> Operand:
    """Rows [N, K] as `grouped_products` read them: in float8 they are quantised once, wherever they travel from here."""
    return prepare_rows(x, _fp8_implementation(config)) if config.precision == "fp8" else x


def prepared(config: ModelConfig, x: Operand, weight: Operand) -> Operand:
    """A master weight as products with x read it; as it is if it is so already.

    Its gradient comes in x's type: what is summed, over parts of a batch and over devices, is widened first.
    """
    if isinstance(weight, Prepared):
        return weight
    return (
        prepare_weight(weight, x.dtype, _fp8_implementation(config)) if config.precision == "fp8" else narrow(weight, x.dtype)
    )


def _fp8_implementation(config: ModelConfig) -> str:
    """Kernels where `grouped_matmul` names those for GPUs."""
    grouped = best("grouped_matmul") if config.grouped_matmul == "auto" else config.grouped_matmul
    return grouped if grouped in KERNELS else "dot_general"

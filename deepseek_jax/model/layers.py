"""The small layers everything else is made of: linear map, norm, embedding and feed-forward."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.matmul import matmul
from deepseek_jax.model.panels import PANELS
from deepseek_jax.model.products import HIDDEN, grouped_products, products
from deepseek_jax.parallel.embedding import look_up
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.precision.fp8_operands import Operand
from deepseek_jax.precision.narrow import narrow


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Type of activations; under fp8 the products with weights narrow them further."""
    return jnp.dtype("bfloat16" if config.precision == "fp8" else config.precision)


def param_dtype(config: ModelConfig) -> jnp.dtype:
    """Type of stored parameters: at least float32, whatever the compute type."""
    return widen(compute_dtype(config))


def widen(dtype: jnp.dtype) -> jnp.dtype:
    """The type for sums that must not lose digits: float32, or float64 where that is in use."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


class Linear(nn.Module):
    """`x W`, plus `bias` if it has one; `weight` is [in_features, features], or in decoding the same in `Panels`.

    Where the parameters have `lora_A` and `lora_B` beside it, [in_features, rank] and [rank, features], plus `x A B`: in the
    type of activations also in fp8, whose rounding would cost more than such narrow products gain.
    """

    config: ModelConfig
    in_features: int
    features: int
    has_bias: bool = False

    def setup(self):
        init, shape = nn.initializers.normal(self.config.initializer_range), (self.in_features, self.features)
        cut = self.get_variable(PANELS, "weight")
        self.weight = self.param("weight", init, shape, param_dtype(self.config)) if cut is None else cut
        if self.has_bias:
            self.bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype(self.config))
        self.adapter = [
            self.get_variable("params", name) for name in ("lora_A", "lora_B") if self.has_variable("params", name)
        ]  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in_features] -> [..., features]."""
        return self.completed(x, products(self.config, x, self.weight)[0])

    def completed(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """`y`, the product of x with the weight, plus what an adapter adds, plus the bias."""
        if self.adapter:
            for factor in self.adapter:
                (x,) = matmul(x, [narrow(factor, x.dtype)])
            y = y + x
        return y + self.bias.astype(y.dtype) if self.has_bias else y

    def whole_weight(self) -> jax.Array:
        """The weight with what an adapter adds, for products that have no room for another."""
        return self.weight + jnp.matmul(*self.adapter) if self.adapter else self.weight


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in at least float32."""

    config: ModelConfig
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), param_dtype(self.config))
        wide = x.astype(widen(x.dtype))
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return with_gradient_apart((wide * jax.lax.rsqrt(variance + self.eps) * weight).astype(x.dtype))


@jax.custom_vjp
def with_gradient_apart(x: jax.Array) -> jax.Array:
    """x, whose gradient is an array of its own.

    XLA for TPUs puts sums, of a norm's backward pass or attention's, behind the product that makes this gradient, which then
    takes up to twice as long (v5p, 7168 wide, by its own estimate).
    """
    return x


with_gradient_apart.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


class Embedding(nn.Module):
    """Table of token vectors; `weight` is [vocab_size, hidden_size], or on a mesh this device's rows of it."""

    config: ModelConfig
    division: Optional[Division] = None

    def setup(self):
        c = self.config
        init, given = nn.initializers.normal(c.initializer_range), self.get_variable("params", "weight")
        self.weight = self.param("weight", init, (c.vocab_size, c.hidden_size), param_dtype(c)) if given is None else given

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids [B, T] -> vectors [B, T, hidden_size]."""
        dtype = compute_dtype(self.config)
        if self.division is not None and len(self.weight) < self.config.vocab_size:
            return look_up(self.division, self.weight, tokens, dtype)
        return self.weight[tokens].astype(dtype)


class FeedForwardForm(NamedTuple):
    """What comes before a feed-forward's down projection."""

    projections: tuple[str, ...]
    """Linear maps of the input."""
    activation: Callable[..., jax.Array]
    """Of their results."""


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """A gate on every hidden unit."""
    return nn.silu(gate) * up


def gelu(up: jax.Array) -> jax.Array:
    """Without a gate; the exact function, by erf."""
    return nn.gelu(up, approximate=False)


FEED_FORWARD_FORMS = {
    "swiglu": FeedForwardForm(("gate_proj", "up_proj"), swiglu),
    "gelu": FeedForwardForm(("up_proj",), gelu),
}
"""By `ModelConfig.feed_forward`."""


def enter_experts(config: ModelConfig, x: Operand, group_sizes: jax.Array, projections: Sequence[Operand]) -> list[jax.Array]:
    """The first half of a feed-forward for each group of rows [N, hidden_size], sorted by group: up to the activation.

    Args:
        projections: of all groups, [E, in, out] each.
    """
    return grouped_products(config, x, group_sizes, *projections, name=HIDDEN)


def leave_experts(
    config: ModelConfig, entered: Sequence[jax.Array], factors: jax.Array, group_sizes: jax.Array, down_proj: Operand
) -> jax.Array:
    """The second half, times factors [N, 1]: [N, hidden_size]."""
    # The factor is applied before the down projection, which is linear: its rows are the narrower ones.
    activated = FEED_FORWARD_FORMS[config.feed_forward].activation(*entered)
    return grouped_products(config, activated * factors.astype(activated.dtype), group_sizes, down_proj)[0]


class FeedForward(nn.Module):
    """Of the dense layers and the shared experts, in the form that the config names."""

    config: ModelConfig
    width: int

    def setup(self):
        c = self.config
        for name in FEED_FORWARD_FORMS[c.feed_forward].projections:
            setattr(self, name, Linear(c, c.hidden_size, self.width))
        self.down_proj = Linear(c, self.width, c.hidden_size)

    def __call__(self, x: jax.Array, factors: Optional[jax.Array] = None) -> jax.Array:
        """[..., hidden_size] -> the same; `factors`, [..., width], act on the hidden units."""
        form = FEED_FORWARD_FORMS[self.config.feed_forward]
        entering = [getattr(self, name) for name in form.projections]
        entered = products(self.config, x, *(linear.weight for linear in entering), name=HIDDEN)
        activated = form.activation(*(linear.completed(x, y) for linear, y in zip(entering, entered)))
        return self.down_proj(activated if factors is None else activated * factors.astype(x.dtype))

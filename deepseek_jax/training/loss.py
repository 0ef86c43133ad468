"""The training loss (report 2.1.2, 2.2): next token, tokens beyond it, and the experts' balance.

Cross-entropy works on chunks of tokens and computes the gradient beside the loss, so that logits
exist for one chunk at a time and are computed once, not again in the backward pass.
"""

from typing import Any, NamedTuple, Optional

import jax
import jax.numpy as jnp

from deepseek_jax.config import MESH_AXES, Config
from deepseek_jax.data.marks import Marked, read_marks
from deepseek_jax.model.layers import widen
from deepseek_jax.model.matmul import columns
from deepseek_jax.model.segments import segments
from deepseek_jax.model.transformer import DeepseekV3
from deepseek_jax.parallel.context import devices_of_a_sequence, own_tokens
from deepseek_jax.parallel.sharding import Division
from deepseek_jax.parallel.weights import gather_unstacked
from deepseek_jax.training.adapters import scaled


class LossParts(NamedTuple):
    """What the loss is made of, and the routing statistics of its batch."""

    cross_entropy: jax.Array
    """Mean nats per token by prediction depth, [1 + D]; the first is the next token's."""
    balance_loss: jax.Array
    """Before its weight."""
    counts: dict[str, jax.Array]
    """Tokens that chose each expert, [layers, E] for each stack with experts."""
    dropped: Optional[jax.Array] = None
    """Share of the choices that found no room, where that is limited."""
    largest_scores: Optional[dict[str, jax.Array]] = None
    """Of each attention head, [layers, H] by stack, where train.qk_clip limits them."""


def training_loss(
    params: Any,
    router_state: Any,
    tokens: jax.Array,
    config: Config,
    mtp_weight: jax.Array,
    division: Optional[Division] = None,
    whole: Optional[jax.Array] = None,
) -> tuple[jax.Array, LossParts]:
    """CE_0 + lambda/D sum_k CE_k + alpha * balance.

    Args:
        tokens: [B, T + 1 + D], see `data.marks`; depth k at position i predicts token i + k + 1.
        mtp_weight: lambda.
        division: the mesh, inside `shard_map` over it; the loss is then this device's share of the mean over all.
        whole: what `targets_of_part` makes of the batch of which these tokens are a part; by default they are all of it.
    """
    model, depth = config.model, config.model.num_nextn_predict_layers
    if division is not None:
        params = gather_unstacked(division, model, params, tokens[:, :-1].size // devices_of_a_sequence(division))
    variables = {"params": scaled(params, config.lora), "router_state": router_state}
    marked = read_marks(config.data, tokens)
    tokens, ends = marked.ids, marked.ends
    module = DeepseekV3(model, division, tells_scores=config.train.qk_clip is not None)
    output = module.apply(variables, tokens[:, :-1], None if ends is None else ends[:, :-1])
    length = tokens.shape[1] - 1 - depth
    targets = jnp.stack([own_tokens(division, tokens, length, ahead=k + 1) for k in range(depth + 1)])
    dtype = widen(output.hidden.dtype)
    depth_weights = jnp.concatenate([jnp.ones((1,), dtype), jnp.full((depth,), mtp_weight.astype(dtype) / max(depth, 1))])
    counted = None
    if ends is not None:
        own = counted_targets(marked, length, depth, division)
        counted = own / at_least_one(targets_of_part(own, division) if whole is None else whole).astype(dtype)
    share = 1 / targets[0].size if counted is None else counted
    weights = jnp.broadcast_to(depth_weights[:, None, None] * share, targets.shape)
    with jax.named_scope("head"):
        weighted, nats = cross_entropy(
            output.hidden.reshape(-1, output.hidden.shape[-1]), output.head, targets.reshape(-1), weights.reshape(-1),
            config.train.loss_chunk_tokens,
        )  # fmt: skip
    by_depth = nats.reshape(depth + 1, -1).mean(axis=1)
    if counted is not None:
        by_depth = jnp.sum(nats.reshape(counted.shape) * counted, axis=(1, 2))
    loss = weighted + config.train.sequence_balance_weight * output.balance_loss
    scores = output.largest_scores or None
    return loss, LossParts(by_depth, output.balance_loss, output.counts, output.dropped, scores)


def counted_targets(marked: Marked, length: int, depth: int, division: Optional[Division]) -> jax.Array:
    """Which targets count: those of the same document as the token that predicts them, if they are marked, where some are.

    Returns:
        Booleans [1 + D, B, T], or this device's of the T.
    """
    assert marked.ends is not None
    numbers, _ = segments(marked.ends)
    own, *following = (own_tokens(division, numbers, length, ahead) for ahead in range(depth + 2))
    same = jnp.stack([own == other for other in following])
    if marked.counted is not None:
        same &= jnp.stack([own_tokens(division, marked.counted, length, ahead) for ahead in range(1, depth + 2)])
    return same


def targets_of_part(counted: jax.Array, division: Optional[Division], parts: int | jax.Array = 1) -> jax.Array:
    """How many targets of each depth count, [1 + D, 1, 1], in the mean over the parts of a batch and over devices.

    With it as denominator the mean over parts and devices is that of the batch's targets, however they are spread.

    Args:
        counted: of `counted_targets`, of all parts.
    """
    count = jnp.sum(counted, axis=(1, 2), keepdims=True)
    if division is not None:
        count = jax.lax.psum(count, MESH_AXES) / division.mesh.size
    return count / parts


def at_least_one(count: jax.Array) -> jax.Array:
    """A count to divide by, of which there may be none."""
    return jnp.where(count > 0, count, 1)


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the tokens' negative log-likelihoods, in at least float32.

    Args:
        hidden: [N, hidden_size].
        head: [hidden_size, vocab_size].
        targets: [N] token ids.
        weights: [N]; not differentiated.
        chunk: tokens whose logits exist at one time.

    Returns:
        The sum; and each token's nats [N], for reporting: no gradient flows through them.
    """
    tokens = hidden.shape[0]
    chunk = min(chunk, tokens)
    extra = -tokens % chunk

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    total, nats = _chunked(chunks(hidden), head, chunks(targets), jax.lax.stop_gradient(chunks(weights)))
    return total, nats.reshape(-1)[:tokens]


def _logits_and_nats(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits = jnp.matmul(hidden, head, preferred_element_type=widen(hidden.dtype))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    return logits, normalizer, normalizer - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


@jax.custom_vjp
def _chunked(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array):
    """`cross_entropy` on operands in chunks, [C, chunk, ...]."""
    nats = jax.lax.map(lambda args: _logits_and_nats(args[0], head, args[1])[2], (hidden, targets))
    return jnp.sum(nats * weights), nats


def _chunked_forward(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array):
    wide = widen(hidden.dtype)

    def one(head_gradient: jax.Array, args: tuple[jax.Array, jax.Array, jax.Array]):
        h, target, weight = args
        logits, normalizer, nats = _logits_and_nats(h, head, target)
        hit = jnp.arange(logits.shape[-1]) == target[:, None]
        gradient = ((jnp.exp(logits - normalizer[:, None]) - hit.astype(wide)) * weight[:, None]).astype(h.dtype)
        gradient = jax.lax.optimization_barrier(gradient)  # made once, not again within each of the products
        head_gradient += jnp.matmul(columns(h), gradient, preferred_element_type=wide)
        return head_gradient, (nats, gradient @ head.T)

    head_gradient, (nats, hidden_gradient) = jax.lax.scan(
        one, jnp.zeros(head.shape, wide), (hidden, targets, weights.astype(wide))
    )
    return (jnp.sum(nats * weights), nats), (hidden_gradient, head_gradient.astype(head.dtype))


def _chunked_backward(gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]):
    scaled = [gradient * cotangents[0].astype(gradient.dtype) for gradient in gradients]
    return *scaled, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)

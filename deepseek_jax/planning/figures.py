"""A model's figures by part: parameters, products of a training step, cache and checkpoints, from shapes alone.

Parts go by the names under which a plan books compiled operations. FLOPs are those of matrix products, two for each
multiplication and addition, per token that is trained on; parts that multiply no matrices (embedding, norms,
optimizer) have none, and the optimizer's work is the bytes that it reads and writes. Attention counts as causal: a
token meets half of its sequence, so that half of the length squared counts; a program that multiplies what the mask
voids does up to twice that.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.checkpoint.forms import FORMS, tensor_specs
from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.config.trainable import learning_part, trainable
from deepseek_jax.parallel.sharding import names
from deepseek_jax.parallel.summary import readable_bytes
from deepseek_jax.training.adapters import with_adapters
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.step import init_variables

MTP = "mtp"
PROJECTIONS, CORE = "attention/projections", "attention/core"
MAIN_PARTS = ("embedding", PROJECTIONS, CORE, "dense", "router", "experts", "shared_experts", "norms", "head")
MTP_PARTS = ("projection", PROJECTIONS, CORE, "router", "experts", "shared_experts", "norms", "head")
PARTS = (*MAIN_PARTS, *(f"{MTP}/{part}" for part in MTP_PARTS), "optimizer")
"""In the order of a step. Of the head, which MTP modules share, the parameters count once and the products each time."""

_PART_OF_MODULE = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "eh_proj": "projection",
    "proj": "projection",
    "self_attn": PROJECTIONS,
    "experts": "experts",
    "shared_experts": "shared_experts",
    "shared_expert_gate": "shared_experts",
    "gate": "router",
    "dense_layers": "dense",
}
"""The first of these modules that a weight is in, in this order, says its part."""
_LENGTHENED = (1, 8, 32)
"""Times the sequence length for which a table has the attention core: the report's stages (4.3) of 4K, 32K and 128K."""


class Parameters(NamedTuple):
    """How many numbers a part learns."""

    total: int
    active: int
    """Those a token meets: all but the routed experts, and its share of these."""


class ParameterCount(NamedTuple):
    """How many numbers a model learns."""

    total: int
    """Without MTP."""
    active: int
    """Those a token meets, as for `Parameters`."""
    mtp: int
    """Of the MTP modules, which share embedding and head with the main model."""


class Flops(NamedTuple):
    """A token's products in a training step."""

    forward: int
    backward: int
    again: int
    """What full rematerialisation adds."""


class CacheBytes(NamedTuple):
    """What generation keeps of a token in all layers, in bfloat16."""

    latent: int
    """kv_lora_rank + qk_rope_head_dim numbers a layer."""
    multi_head: int
    """Keys and values of every head, which multi-head attention with the same heads would keep."""

    @property
    def ratio(self) -> float:
        """How many times as much that is."""
        return self.multi_head / self.latent


@dataclass(frozen=True)
class Figures:
    """All that can be said of a config without a machine."""

    count: ParameterCount
    parameters: dict[str, Parameters]
    """By part; those that have none are left out, here and in `flops`."""
    flops: dict[str, Flops]
    sequence_length: int
    """Of the sequences in which the attention core was counted."""
    cache: CacheBytes
    checkpoints: dict[str, int]
    """Bytes, as `checkpoint_bytes` gives them."""
    optimizer_bytes: int


def figures(config: Config) -> Figures:
    """Count everything: seconds for 671B parameters."""
    model, length = config.model, config.train.sequence_length
    return Figures(
        count=count_parameters(model),
        parameters=parameters_by_part(model),
        flops=flops_by_part(model, length),
        sequence_length=length,
        cache=cache_bytes(model),
        checkpoints=checkpoint_bytes(config),
        optimizer_bytes=optimizer_bytes(config),
    )


def part_of(path: Iterable[str]) -> str:
    """The part that a parameter belongs to by its path, or a compiled product by its op_name cut at the slashes.

    Paths cannot tell the core of attention from its projections, and all of attention is said to be the latter. Empty
    where no module is named.
    """
    path = tuple(path)
    if any(name.endswith("norm") for name in path):
        part = "norms"
    else:
        part = next((part for module, part in _PART_OF_MODULE.items() if module in path), "")
    return f"{MTP}/{part}" if part and "mtp_layers" in path else part


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Sums of `parameters_by_part`."""
    parts = parameters_by_part(model)
    main = [count for part, count in parts.items() if not part.startswith(MTP)]
    total, active = (sum(counts) for counts in zip(*main))
    return ParameterCount(total, active, sum(count.total for count in parts.values()) - total)


def parameters_by_part(model: ModelConfig) -> dict[str, Parameters]:
    """Count from the shapes that the model itself would allocate."""
    found: dict[str, list[Parameters]] = {}
    for path, size in _weights(model):
        found.setdefault(part_of(path), []).append(Parameters(size, _active(model, path, size)))
    return {part: Parameters(*map(sum, zip(*found[part]))) for part in sorted(found, key=PARTS.index)}


def flops_by_part(model: ModelConfig, sequence_length: int) -> dict[str, Flops]:
    """Products of a training step for a token in a sequence of that length.

    Every product is made once forward and, for the gradients of its two operands, twice backward. Full
    rematerialisation makes those of the layers again, but not the last one of a main layer, whose result nothing
    multiplies (an MTP module's is normed once more). Not counted: attention that keeps no scores makes them again
    within its backward pass.
    """
    found: dict[str, list[Flops]] = {}

    def add(part: str, forward: int, is_made_again: bool, times: int = 1) -> None:
        flops = Flops(forward, 2 * forward, forward if is_made_again else 0)
        found.setdefault(part, []).extend([flops] * times)

    for path, size in _weights(model):
        part = part_of(path)
        if path[-1] != "bias" and not part.endswith(("embedding", "norms", "head")):
            is_last = "down_proj" in path and not part.startswith(MTP)
            add(part, 2 * _active(model, path, size), is_made_again=not is_last)
    in_mtp = model.num_nextn_predict_layers if model.mtp_form == "sequential" else 0
    layers = {CORE: model.num_hidden_layers, f"{MTP}/{CORE}": in_mtp}
    for part, times in layers.items():
        add(part, sequence_length * _keys_and_values(model), is_made_again=True, times=times)
    for part, times in {"head": 1, f"{MTP}/head": model.num_nextn_predict_layers}.items():
        add(part, 2 * model.hidden_size * model.vocab_size, is_made_again=False, times=times)
    return {part: Flops(*map(sum, zip(*found[part]))) for part in sorted(filter(found.get, found), key=PARTS.index)}


def cache_bytes(model: ModelConfig) -> CacheBytes:
    """Of the main model, which alone generates."""
    bytes_a_number = model.num_hidden_layers * jnp.dtype("bfloat16").itemsize
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    return CacheBytes(latent * bytes_a_number, _keys_and_values(model) * bytes_a_number)


def checkpoint_bytes(config: Config) -> dict[str, int]:
    """Bytes of a Hugging Face checkpoint's tensors in each form, and of a run's own `training state`.

    The former have MTP modules with their copies of embedding and head; the latter is parameters, both moments of those
    that learn, an average of the weights if one is kept, and the routers' biases.
    """
    forms = (form for form in FORMS if form != "float16")  # as large as bfloat16
    sizes = {form: sum(spec.nbytes for spec in tensor_specs(config.model, form)) for form in forms}
    biases = _variables(config.model)["router_state"]
    params = _bytes(_params(config))
    average = params if config.train.ema_decay else 0
    return sizes | {"training state": params + average + _bytes(biases) + _bytes(_moments(config))}


def optimizer_bytes(config: Config) -> int:
    """What all devices together must read and write in an optimizer step: what learns and its moments both, gradients once."""
    parameters = _bytes(_learning(config))
    return 2 * (parameters + _bytes(_moments(config))) + parameters


def as_dict(found: Figures) -> dict[str, Any]:
    """For JSON: bytes and FLOPs as numbers."""
    return {
        "parameters": found.count._asdict() | {"by_part": {part: of._asdict() for part, of in found.parameters.items()}},
        "flops_per_token": {
            "sequence_length": found.sequence_length,
            **_total(found.flops)._asdict(),
            "by_part": {part: of._asdict() for part, of in found.flops.items()},
        },
        "cache_bytes_per_token": found.cache._asdict() | {"ratio": found.cache.ratio},
        "checkpoint_bytes": found.checkpoints,
        "optimizer_bytes_per_step": found.optimizer_bytes,
    }


def table(found: Figures) -> str:
    """For a person, within 100 columns."""
    count, total, cached = found.count, _total(found.flops), found.cache
    unit, scale = ("GFLOP", 1e9) if _trained(total) > 1e10 else ("MFLOP", 1e6)
    no_parameters, no_flops = Parameters(0, 0), Flops(0, 0, 0)

    def row(part: str, parameters: Parameters, flops: Flops) -> str:
        numbers = "".join(f"{number:>16,}" if number else f"{'-':>16}" for number in parameters)
        products = "".join(f"{number / scale:>10,.3f}" if number else f"{'-':>10}" for number in flops)
        return f"{part:26}{numbers}{products}" + (
            f"{_trained(flops) / _trained(total):>7.1%}" if flops.forward else f"{'-':>7}"
        )

    def core_at(length: int) -> str:
        """The attention core grows with the length, and the rest does not."""
        core = sum(_trained(flops) for part, flops in found.flops.items() if part.endswith(CORE))
        longer = core * length // found.sequence_length
        return f"{longer / scale:,.1f} ({longer / (_trained(total) - core + longer):.0%}) at {length:,}"

    mtp = f"; {count.mtp:,} in MTP modules" if count.mtp else ""
    lines = [
        f"{count.total:,} parameters, {count.active:,} active per token{mtp}",
        f"products of a token in training, in {unit}, in sequences of {found.sequence_length:,}; again: by model.remat=full",
        "",
        f"{'part':26}{'parameters':>16}{'active':>16}{'forward':>10}{'backward':>10}{'again':>10}{'share':>7}",
    ]
    lines += [
        row(part, found.parameters.get(part, no_parameters), found.flops.get(part, no_flops))
        for part in PARTS if part in found.parameters or part in found.flops
    ]  # fmt: skip
    sizes = (f"{form} {readable_bytes(size)}" for form, size in found.checkpoints.items())
    return "\n".join([
        *lines,
        row("all", Parameters(*map(sum, zip(*found.parameters.values()))), total),
        "",
        f"attention core  {', '.join(core_at(found.sequence_length * times) for times in _LENGTHENED)} tokens",
        f"cache           {cached.latent:,} bytes a token in bfloat16; multi-head attention {cached.multi_head:,}, "
        f"{cached.ratio:.1f} times as much",
        f"checkpoint      {', '.join(sizes)}",
        f"optimizer       reads and writes {readable_bytes(found.optimizer_bytes)} a step",
    ])  # fmt: skip


def _total(flops: dict[str, Flops]) -> Flops:
    return Flops(*map(sum, zip(*flops.values())))


def _trained(flops: Flops) -> int:
    return flops.forward + flops.backward


@cache
def _variables(model: ModelConfig) -> dict[str, Any]:
    """Shapes of the parameters and biases."""
    return jax.eval_shape(lambda: init_variables(model, seed=0))


def _weights(model: ModelConfig) -> list[tuple[tuple[str, ...], int]]:
    """Path and size of each parameter."""
    params = _variables(model)["params"]
    return [(names(path), math.prod(leaf.shape)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _moments(config: Config) -> Any:
    """Shapes of the optimizer's state."""
    return jax.eval_shape(make_optimizer(config.train).init, _learning(config))


def _learning(config: Config) -> Any:
    """Shapes of the parameters that learn."""
    return learning_part(trainable(config), _params(config))


def _params(config: Config) -> Any:
    """Shapes of all parameters, adapters among them."""
    return jax.eval_shape(partial(with_adapters, config), _variables(config.model)["params"])


def _active(model: ModelConfig, path: Sequence[str], size: int) -> int:
    return size * model.num_experts_per_tok // model.n_routed_experts if "experts" in path else size


def _keys_and_values(model: ModelConfig) -> int:
    """Numbers in a token's keys and values of all heads of a layer."""
    return model.num_attention_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim)


def _bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

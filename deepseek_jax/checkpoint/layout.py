"""The one table between our parameters and the tensors of a Hugging Face `deepseek_v3` checkpoint.

A checkpoint holds [out, in] matrices, layer by layer and expert by expert; the JAX model holds
[in, out] matrices stacked over the layers of a kind and over experts. The PyTorch sibling's state
dict has the checkpoint's names and layout, so this table serves it too. Free of any framework.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from deepseek_jax.config import ModelConfig, stretches


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a checkpoint and where its numbers live in the JAX model's variables."""

    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Shape in the checkpoint."""
    path: tuple[str, ...]
    """Keys in the variables, from the collection down to the array."""
    index: tuple[int, ...]
    """Leading indices into that array: (), (layer,) or (layer, expert)."""
    transposed: bool
    """Whether the JAX array holds the transpose."""
    quantized: bool = False
    """Whether the FP8 form of the checkpoint stores it as float8 codes with block scales."""
    is_bias: bool = False
    """Whether it is a router's bias, which stays float32 in every form."""
    is_copy: bool = False
    """Whether it repeats the main model's embedding or head, as MTP layers of the released layout do."""


def layout(config: ModelConfig) -> list[TensorPlace]:
    """Every tensor of the checkpoint of `config`, in the order of writing."""
    return list(_tensors(config))


def _tensors(config: ModelConfig) -> Iterator[TensorPlace]:
    c = config
    table = (c.vocab_size, c.hidden_size)
    embedding = ("params", "embed_tokens", "weight")
    head = embedding if c.tie_word_embeddings else ("params", "lm_head", "weight")
    yield TensorPlace("model.embed_tokens.weight", table, embedding, (), False)
    places = [(stack, index) for stack, first, end in stretches(c) for index in range(first, end)]
    for layer, (stack, index) in enumerate(places):
        yield from _block(c, f"model.layers.{layer}", (stack,), index, moe=stack == "moe_layers")
    yield TensorPlace("model.norm.weight", (c.hidden_size,), ("params", "norm", "weight"), (), False)
    if not c.tie_word_embeddings:
        yield TensorPlace("lm_head.weight", table, head, (), True)
    for depth in range(c.num_nextn_predict_layers):
        prefix = f"model.layers.{c.num_hidden_layers + depth}"
        yield TensorPlace(f"{prefix}.embed_tokens.weight", table, embedding, (), False, is_copy=True)
        yield from (_mtp_module if c.mtp_form == "sequential" else _mtp_head)(c, prefix, depth)
        tied = c.tie_word_embeddings
        yield TensorPlace(f"{prefix}.shared_head.head.weight", table, head, (), not tied, is_copy=True)


def _mtp_module(c: ModelConfig, prefix: str, depth: int) -> Iterator[TensorPlace]:
    """What a sequential module has of its own."""
    for ours, theirs in (("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "shared_head.norm")):
        path = ("params", "mtp_layers", ours, "weight")
        yield TensorPlace(f"{prefix}.{theirs}.weight", (c.hidden_size,), path, (depth,), False)
    path = ("params", "mtp_layers", "eh_proj", "weight")
    yield TensorPlace(f"{prefix}.eh_proj.weight", (c.hidden_size, 2 * c.hidden_size), path, (depth,), True)
    yield from _block(c, prefix, ("mtp_layers", "block"), depth, moe=True)


def _mtp_head(c: ModelConfig, prefix: str, depth: int) -> Iterator[TensorPlace]:
    """What a parallel head has of its own."""
    for ours, theirs in (("hnorm", "hnorm"), ("norm", "shared_head.norm")):
        path = ("params", "mtp_layers", ours, "weight")
        yield TensorPlace(f"{prefix}.{theirs}.weight", (c.hidden_size,), path, (depth,), False)
    path = ("params", "mtp_layers", "proj", "weight")
    yield TensorPlace(f"{prefix}.proj.weight", (c.hidden_size, c.hidden_size), path, (depth,), True, quantized=True)


def _block(c: ModelConfig, prefix: str, stack: tuple[str, ...], layer: int, moe: bool) -> Iterator[TensorPlace]:
    """One transformer layer."""

    def norm(name: str, width: int) -> TensorPlace:
        path = ("params", *stack, *name.split("."), "weight")
        return TensorPlace(f"{prefix}.{name}.weight", (width,), path, (layer,), False)

    def linear(name: str, out_features: int, in_features: int, quantized: bool = True) -> TensorPlace:
        path, shape = ("params", *stack, *name.split("."), "weight"), (out_features, in_features)
        return TensorPlace(f"{prefix}.{name}.weight", shape, path, (layer,), True, quantized)

    def bias(name: str, width: int) -> Iterator[TensorPlace]:
        if c.attention_bias:
            yield TensorPlace(f"{prefix}.{name}.bias", (width,), ("params", *stack, *name.split("."), "bias"), (layer,), False)

    entering = {"swiglu": ("gate_proj", "up_proj"), "gelu": ("up_proj",)}[c.feed_forward]

    def feed_forward(name: str, width: int) -> Iterator[TensorPlace]:
        for proj in entering:
            yield linear(f"{name}.{proj}", width, c.hidden_size)
        yield linear(f"{name}.down_proj", c.hidden_size, width)

    heads = c.num_attention_heads
    q_width = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    yield norm("input_layernorm", c.hidden_size)
    if c.q_lora_rank is None:
        yield linear("self_attn.q_proj", q_width, c.hidden_size)
    else:
        yield linear("self_attn.q_a_proj", c.q_lora_rank, c.hidden_size)
        yield from bias("self_attn.q_a_proj", c.q_lora_rank)
        yield norm("self_attn.q_a_layernorm", c.q_lora_rank)
        yield linear("self_attn.q_b_proj", q_width, c.q_lora_rank)
    yield linear("self_attn.kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
    yield from bias("self_attn.kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim)
    yield norm("self_attn.kv_a_layernorm", c.kv_lora_rank)
    yield linear("self_attn.kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield linear("self_attn.o_proj", c.hidden_size, heads * c.v_head_dim)
    yield from bias("self_attn.o_proj", c.hidden_size)
    yield norm("post_attention_layernorm", c.hidden_size)
    if not moe:
        yield from feed_forward("mlp", c.intermediate_size)
        return
    width = c.moe_intermediate_size
    yield linear("mlp.gate", c.n_routed_experts, c.hidden_size, quantized=False)
    if c.topk_method == "noaux_tc":
        path = ("router_state", *stack, "mlp", "gate", "e_score_correction_bias")
        name = f"{prefix}.mlp.gate.e_score_correction_bias"
        yield TensorPlace(name, (c.n_routed_experts,), path, (layer,), False, is_bias=True)
    for expert in range(c.n_routed_experts):
        for proj in (*entering, "down_proj"):
            shape = (c.hidden_size, width) if proj == "down_proj" else (width, c.hidden_size)
            path = ("params", *stack, "mlp", "experts", proj)
            name = f"{prefix}.mlp.experts.{expert}.{proj}.weight"
            yield TensorPlace(name, shape, path, (layer, expert), True, quantized=True)
    if c.n_shared_experts:
        yield from feed_forward("mlp.shared_experts", c.n_shared_experts * width)
    if c.shared_expert_gate:
        yield linear("mlp.shared_expert_gate", c.n_shared_experts, c.hidden_size, quantized=False)

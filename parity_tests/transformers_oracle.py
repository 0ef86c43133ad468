"""Hugging Face transformers' DeepSeek-V3 with our weights, as a judge from outside.

Its module hard-codes float32 for norms, router, rotary angles and softmax, so that a float64 model of
it still rounds to 1e-7 within. `float64_islands` turns these places, and nothing else, to float64:
the modules find `torch.float32` under the global name `torch`, which for a while is a stand-in.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, modeling_rope_utils
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from deepseek_jax.config import HOW_COMPUTED, ModelConfig


class _WideTorch:
    """`torch` itself, except that its float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextmanager
def float64_islands() -> Iterator[None]:
    """Make models built and run inside compute nothing in float32 that they were asked for in float64."""
    wide = _WideTorch()
    with ExitStack() as stack:
        for module in (modeling_deepseek_v3, modeling_deepseek_v2, modeling_rope_utils):
            stack.enter_context(mock.patch.object(module, "torch", wide))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))  # V2's rotation asks for it so
        yield


def transformers_config(config: ModelConfig) -> DeepseekV3Config:
    """Our config in transformers' words, with its plainest implementations."""
    ours = (*HOW_COMPUTED, "mtp_hidden_after_norm", "rope_scaling", "rope_theta")
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name not in ours}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "yarn", **vars(config.rope_scaling)}
    return DeepseekV3Config(
        **fields, rope_parameters=rope, num_key_value_heads=config.num_attention_heads, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip


class Oracle:
    """transformers' main model, and its MTP model if the config has such modules, with a state dict of ours."""

    def __init__(self, config: ModelConfig, state_dict: Mapping[str, torch.Tensor]):
        self.config = config
        dtype = state_dict["model.norm.weight"].dtype
        self.main = DeepseekV3ForCausalLM(transformers_config(config)).to(dtype)
        main = {name: tensor for name, tensor in state_dict.items() if self._depth(name) is None}
        if config.tie_word_embeddings:
            main["lm_head.weight"] = main["model.embed_tokens.weight"]
        self.main.load_state_dict(fuse_experts(main))
        if config.num_nextn_predict_layers:
            self.mtp = MtpModel(self.main, config.num_nextn_predict_layers).to(dtype)
            modules = {self._mtp_name(name): state_dict[name] for name in state_dict if self._depth(name) is not None}
            missing, unexpected = self.mtp.load_state_dict(fuse_experts(modules), strict=False)
            assert not unexpected and set(missing) == {"embed_tokens.weight", "shared_head.weight"}

    def mtp_states(self, last_hidden: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Normed states of every depth, [B, T, hidden_size], of the main model's last [B, T, hidden_size].

        Each depth is entered by itself, for `MtpModel.forward` drafts its own tokens and raises when given labels.

        Args:
            tokens: [B, T + D].
        """
        states, length = [], last_hidden.shape[1]
        cache = MtpCache(config=self.mtp.config)
        for depth in range(self.config.num_nextn_predict_layers):
            positions = torch.arange(length)[None] + depth + 1
            ahead = tokens[:, depth + 1 : depth + 1 + length]
            last_hidden = self.mtp.forward_layer(depth, last_hidden, positions, cache, input_ids=ahead)
            states.append(last_hidden)
        return states

    def gradients(self) -> dict[str, torch.Tensor]:
        """What backward left, by our names."""
        named = {name: p.grad for name, p in self.main.named_parameters()}
        if self.config.num_nextn_predict_layers:
            shared = ("embed_tokens.", "shared_head.")
            named |= {
                self._our_name(name): p.grad
                for name, p in self.mtp.named_parameters() if not name.startswith(shared)
            }  # fmt: skip
        return split_experts(named)

    def _depth(self, name: str) -> int | None:
        """Which MTP module a tensor of ours belongs to, from 0."""
        _, found, rest = name.partition("model.layers.")
        layer = int(rest.partition(".")[0]) - self.config.num_hidden_layers if found else -1
        return layer if layer >= 0 else None

    def _mtp_name(self, name: str) -> str:
        rest = name.split(".", 3)[3]
        if rest == "shared_head.norm.weight":
            rest = "post_norm.weight"
        elif not rest.startswith(("enorm", "hnorm", "eh_proj")):
            rest = f"mtp_block.{rest}"
        return f"layers.{self._depth(name)}.{rest}"

    def _our_name(self, name: str) -> str:
        _, depth, rest = name.split(".", 2)
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        return f"model.layers.{self.config.num_hidden_layers + int(depth)}.{rest}"


def fuse_experts(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of each expert -> arrays over the experts, gate and up in one."""
    fused: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in named.items():
        prefix, found, rest = name.partition(".experts.")
        if found:
            number, proj, _ = rest.split(".")
            experts.setdefault(prefix, {}).setdefault(proj, {})[int(number)] = tensor
        else:
            fused[name] = tensor
    for prefix, projections in experts.items():
        gate, up, down = (
            torch.stack([of[number] for number in range(len(of))])
            for of in (projections["gate_proj"], projections["up_proj"], projections["down_proj"])
        )
        fused[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        fused[f"{prefix}.experts.down_proj"] = down
    return fused


def split_experts(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of `fuse_experts`."""
    split = {}
    for name, tensor in named.items():
        prefix, found, proj = name.partition(".experts.")
        if not found:
            split[name] = tensor
            continue
        parts = {"down_proj": tensor}
        if proj == "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            parts = {"gate_proj": gate, "up_proj": up}
        for part, stacked in parts.items():
            split |= {f"{prefix}.experts.{i}.{part}.weight": matrix for i, matrix in enumerate(stacked)}
    return split


def causal_loss(logits: torch.Tensor, tokens: torch.Tensor, ahead: int = 1) -> torch.Tensor:
    """Mean cross-entropy of the tokens `ahead` of each position, in the logits' own type."""
    predicted = logits[:, : tokens.shape[1] - ahead].flatten(0, 1)
    return nn.functional.cross_entropy(predicted, tokens[:, ahead : ahead + logits.shape[1]].flatten())

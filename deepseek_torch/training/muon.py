"""Muon (K. Jordan, 2024; scaled as in arXiv 2502.16982) beside AdamW, matrix by matrix.

PyTorch's own `torch.optim.Muon` computes in bfloat16 whatever the parameters are, and knows no heads.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from deepseek_jax.config import ModelConfig

STEPS, COEFFICIENTS, EPSILON = 5, (3.4445, -4.7750, 2.0315), 1e-8
ROOT_MEAN_SQUARE = 0.2


class Muon(torch.optim.AdamW):
    """AdamW, but for a group with `momentum`, whose parameters [out, in] are orthogonalised by `pieces`.

    Such a group has for each parameter the rows of each matrix in it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move all parameters; the gradients of those that are orthogonalised are used up by it."""
        for group in self.param_groups:
            if "momentum" in group:
                for parameter, pieces in zip(group["params"], group["pieces"], strict=True):
                    if parameter.grad is not None:
                        self._move(parameter, pieces, group)
                        parameter.grad = None  # AdamW leaves alone what has none
        return super().step(closure)

    def _move(self, parameter: nn.Parameter, pieces: list[int], group: dict[str, Any]) -> None:
        gradient, factor, state = parameter.grad, group["momentum"], self.state[parameter]
        assert gradient is not None
        state["momentum"] = momentum = factor * state.get("momentum", torch.zeros_like(parameter)) + gradient
        update = gradient + factor * momentum
        update = torch.cat([orthogonal(piece) for piece in update.split(pieces)])
        parameter.sub_(group["lr"] * (update + group["weight_decay"] * parameter))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrix by Newton-Schulz iterations, its entries scaled to the size of AdamW's updates."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + EPSILON)
    if x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    return x * (ROOT_MEAN_SQUARE * max(matrix.shape) ** 0.5)


def is_orthogonalised(name: str) -> bool:
    """Whether Muon moves a parameter: all but embedding, head, routers and gates, norms and biases."""
    *_, module, kind = name.split(".")
    others = ("embed_tokens", "lm_head", "gate", "shared_expert_gate")
    return kind != "bias" and module not in others and not name.endswith("norm.weight")


def pieces_of(model: ModelConfig, name: str, rows: int) -> list[int]:
    """Rows of the matrices in a weight [out, in]: a head's queries, keys and values are each a matrix."""
    module = name.split(".")[-2]
    if module in ("q_proj", "q_b_proj"):
        return [model.qk_nope_head_dim + model.qk_rope_head_dim] * model.num_attention_heads
    if module == "kv_b_proj":
        return [model.qk_nope_head_dim, model.v_head_dim] * model.num_attention_heads
    return [rows]


def muon_group(model: nn.Module, named: Iterable[tuple[str, nn.Parameter]], **settings: Any) -> dict[str, Any]:
    """The group of those of these parameters that Muon moves; `model` has its config."""
    config: ModelConfig = model.config  # type: ignore[assignment]  # as nn.Module types it
    chosen = [(name, parameter) for name, parameter in named if is_orthogonalised(name)]
    pieces = [pieces_of(config, name, len(parameter)) for name, parameter in chosen]
    return {"params": [parameter for _, parameter in chosen], "pieces": pieces, **settings}

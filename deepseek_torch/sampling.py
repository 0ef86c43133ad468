"""How the next token is chosen of the model's logits."""

import torch

from deepseek_jax.errors import UserError


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse what cannot be sampled by; raises `UserError`."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if temperature < 0:
        raise UserError(f"temperature={temperature}: must be at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be in (0, 1]")


class Sampler:
    """Chooses among the likeliest tokens that together reach `top_p`; at temperature 0 the likeliest."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        self._temperature, self._top_p = temperature, top_p
        self._random = torch.Generator().manual_seed(seed)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits [B, V], each token's chance to be chosen, up to a factor: [B, V]."""
        if self._temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
        probabilities, order = torch.softmax(logits / self._temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = probabilities.masked_fill(before >= self._top_p, 0.0)
        return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(dim=-1, keepdim=True))

    def draw(self, probabilities: torch.Tensor) -> int:
        """A token by its chance, [V]."""
        return int(torch.multinomial(probabilities, 1, generator=self._random))

    def draw_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """A token [B] for each row of logits [B, V]."""
        return torch.multinomial(self.probabilities(logits), 1, generator=self._random)[:, 0]

    def chance(self) -> float:
        """Even between 0 and 1."""
        return float(torch.rand((), generator=self._random, dtype=torch.float64))

"""Rotary position embedding, and what stretches it: YaRN above all (report 2.1.1, 4.3)."""

import math

import torch

from deepseek_jax.config import ModelConfig
from deepseek_torch.model.layers import compute_dtype, widen


def rope_angles(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every pair's angle.

    Args:
        positions: token positions, [..., T].

    Returns:
        Two tensors [..., T, qk_rope_head_dim / 2] of at least float32, YaRN's magnitude included.
    """
    dtype = widen(compute_dtype(config))
    frequencies = torch.tensor(inverse_frequencies(config), dtype=dtype, device=positions.device)
    angles = positions.unsqueeze(-1).to(dtype) * frequencies
    return angles.cos() * rope_magnitude(config), angles.sin() * rope_magnitude(config)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool = True) -> torch.Tensor:
    """Turn each pair of the last axis, (x[2i], x[2i+1]), by its angle: a multiplication of complex numbers.

    If not `interleave`, pairs are (x[i], x[R/2 + i]).

    Args:
        x: [..., T, H, R] queries or keys; H heads share a position's angle.
        cos, sin: [..., T, R / 2] from `rope_angles`.
    """
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2) if interleave else (2, -1))
    pairs = pairs if interleave else pairs.transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin).unsqueeze(-2))
    return (turned if interleave else turned.transpose(-1, -2)).flatten(-2).to(x.dtype)


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Radians per position of each of the qk_rope_head_dim / 2 pairs.

    Under YaRN a pair that turns at least beta_fast times within the original length keeps its frequency,
    one that turns at most beta_slow times has it divided by `factor`, and between the two, by the pair's
    index, the frequency passes linearly from one to the other.
    """
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    frequencies = [config.rope_theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return [frequency / scaling.factor for frequency in frequencies]

    def pair_that_turns(times: float) -> float:
        # Pair i makes length * theta^(-2i/dim) / (2 pi) turns; this is that, solved for i.
        turns_of_first_pair = scaling.original_max_position_embeddings / (2 * math.pi)
        return dim / 2 * math.log(turns_of_first_pair / times, config.rope_theta)

    kept_until = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    divided_from: float = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    if divided_from == kept_until:
        divided_from += 0.001  # the released model's remedy against a division by zero
    stretched = []
    for pair, frequency in enumerate(frequencies):
        share = min(max((pair - kept_until) / (divided_from - kept_until), 0.0), 1.0)
        stretched.append((1 - share) * frequency + share * frequency / scaling.factor)
    return stretched


def rope_magnitude(config: ModelConfig) -> float:
    """YaRN's factor on cosine and sine: the ratio of mscale to mscale_all_dim, 1 for DeepSeek-V3."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.mscale == 0 or scaling.mscale_all_dim == 0:
        return 1 + 0.1 * math.log(scaling.factor)
    growth = 0.1 * math.log(scaling.factor)
    return (1 + scaling.mscale * growth) / (1 + scaling.mscale_all_dim * growth)


def softmax_scale(config: ModelConfig) -> float:
    """Factor on the attention scores: (nope + rope)^-1/2, sharpened under YaRN."""
    scale = 1 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return scale
    return scale * (1 + 0.1 * scaling.mscale_all_dim * math.log(scaling.factor)) ** 2

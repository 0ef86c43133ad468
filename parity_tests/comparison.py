"""How far two results are from each other, and how far they may be."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

TOLERANCES = {
    "float64": 1e-10,  # rounding leaves 1e-15 to 1e-12; any difference of mathematics is far above
    "float32": 1e-4,  # 2^-24 a rounding, grown by the cancellations in gradients of small weights
    "bfloat16": 1e-1,  # 2^-9 a rounding, and the siblings round at different places inside an operation
    "fp8": 2e-1,  # the same, and one that moves a tile's largest entry moves codes of that tile by 2^-4
}
"""Largest relative difference per tensor by precision of the computation."""


class Difference(NamedTuple):
    """Between two tensors."""

    absolute: float
    """max |a - b|."""
    relative: float
    """The same over max |b|."""


def difference(actual: Any, expected: Any) -> Difference:
    """Of two tensors or arrays of either framework; infinite where shapes differ or a number is not finite."""
    a, b = as_float64(actual), as_float64(expected)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(float("inf"), float("inf"))
    absolute = float(np.abs(a - b).max(initial=0.0))
    largest = float(np.abs(b).max(initial=0.0))
    return Difference(absolute, absolute / largest if largest else (float("inf") if absolute else 0.0))


def relative_difference(actual: Any, expected: Any) -> float:
    """max |a - b| / max |b|; see `difference`."""
    return difference(actual, expected).relative


def differences(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Difference]:
    """`difference` by name; both must hold the same names."""
    assert set(actual) == set(expected), f"only one side has {sorted(set(actual) ^ set(expected))}"
    return {name: difference(actual[name], expected[name]) for name in expected}


def assert_close(actual: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    """Fail, naming the worst, unless each pair is within the relative tolerance."""
    assert_within(differences(actual, expected), tolerance)


def assert_within(apart: Mapping[str, Difference], tolerance: float) -> None:
    """Fail, naming the worst, unless every relative difference is within the tolerance."""
    worst = max(apart, key=lambda name: apart[name].relative, default=None)
    if worst is not None:
        assert apart[worst].relative <= tolerance, f"{worst}: {apart[worst].relative:.2e} > {tolerance:.0e}"


def as_float64(x: Any) -> np.ndarray:
    """NumPy array of a tensor or array of any number type."""
    if isinstance(x, torch.Tensor):
        return x.detach().to(torch.float64).numpy()
    return np.asarray(x).astype(np.float64)

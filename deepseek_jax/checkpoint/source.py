"""What every place that weights come from can tell, be it a Hugging Face directory, orbax or memory."""

from typing import Protocol

import numpy as np

from deepseek_jax.checkpoint.layout import TensorPlace
from deepseek_jax.config import ModelConfig


class Source(Protocol):
    """A whole model's weights, checked to be those of `config`, read one by one."""

    config: ModelConfig
    form: str
    """The form (see `forms.FORMS`) that loses nothing of it."""
    dtypes: dict[str, str]
    """Tensors that are stored in another dtype than the form has them in, and that dtype; they go out in it again."""
    summary: str
    """Kind, number of tensors, bytes and dtypes, as one line for people."""

    def read(self, place: TensorPlace) -> np.ndarray:
        """The weights of `place` in the checkpoint's layout, in a floating dtype that holds them exactly."""

    def scales(self, place: TensorPlace) -> np.ndarray | None:
        """The scales that these weights came with, if they came as float8."""

    def quantized(self) -> set[str] | None:
        """Names of the tensors that have scales, or None if nothing is known of any."""


def summarize(kind: str, dtypes: dict[str, int], nbytes: int) -> str:
    """One line: how many tensors of which dtype, and their bytes."""
    total = sum(dtypes.values())
    parts = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(dtypes.items()))
    return f"{kind}: {total:,} tensors ({parts}), {nbytes:,} bytes"

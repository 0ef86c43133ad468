"""The forms in which a checkpoint's tensors are written: float32, bfloat16, float16, and DeepSeek's FP8.

One table (`layout`) says which tensors there are; a form says in which dtype each goes to disk. That
takes no numbers, so what would be written for 671B parameters can be listed on paper.
"""

from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType

import numpy as np

from deepseek_jax.checkpoint.finite import count_not_finite
from deepseek_jax.checkpoint.fp8_blocks import check_scales, quantize_blocks, requantize_blocks, scale_shape
from deepseek_jax.checkpoint.layout import TensorPlace, layout
from deepseek_jax.checkpoint.tensors import DTYPES, CheckpointError, TensorSpec
from deepseek_jax.config import ModelConfig

FORMS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "fp8": "BF16"}
"""Each form and the dtype of what has none of its own: all but routers' biases and what is quantised."""

NO_OTHERS: Mapping[str, str] = MappingProxyType({})

SCALE_SUFFIX = "_scale_inv"
"""`X.weight` in float8 has its scales in `X.weight_scale_inv`."""


def tensor_specs(
    config: ModelConfig, form: str, quantized: Container[str] | None = None, dtypes: Mapping[str, str] = NO_OTHERS
) -> list[TensorSpec]:
    """Every tensor of the checkpoint of `config` in `form`, in the order of writing.

    Args:
        quantized: names of those that the fp8 form quantises; by default, those that DeepSeek's does.
        dtypes: of tensors that are stored in another dtype than the form has them in.
    """
    return [spec for place in layout(config) for spec in stored_as(place, form, quantized, dtypes)]


def stored_as(
    place: TensorPlace, form: str, quantized: Container[str] | None = None, dtypes: Mapping[str, str] = NO_OTHERS
) -> list[TensorSpec]:
    """The tensors that hold `place` in `form`: one, or codes and scales; arguments as in `tensor_specs`."""
    if form == "fp8" and (place.quantized if quantized is None else place.name in quantized):
        name = place.name + SCALE_SUFFIX
        scales = TensorSpec(name, dtypes.get(name, "F32"), scale_shape(place.shape))
        return [TensorSpec(place.name, "F8_E4M3", place.shape), scales]
    usual = "F32" if place.is_bias else FORMS[form]
    return [TensorSpec(place.name, dtypes.get(place.name, usual), place.shape)]


def encode(specs: list[TensorSpec], weights: np.ndarray, kept: np.ndarray | None) -> list[np.ndarray]:
    """The numbers of `specs`, as `stored_as` gives them for one place.

    Args:
        weights: of the checkpoint's shape, any floating dtype.
        kept: scales that the weights came with; used where they still explain every weight, so that what
            was read from codes and scales is written as the very same.

    Raises:
        CheckpointError: one line naming the tensor, if float8 is to hold NaN or infinity, or if its numbers are beyond
            the dtype.
    """
    name = specs[0].name
    if len(specs) == 1:
        return [_cast(weights, specs[0])]
    if kept is not None:
        check_scales(kept, weights.shape, name, allow_non_finite=True)  # their source has refused them, if it does
        codes = requantize_blocks(weights, kept)
        if codes is not None:
            return [codes, _cast(kept, specs[1])]
    codes, scales = quantize_blocks(weights, name, powers_of_two=specs[1].dtype == "F8_E8M0")
    return [codes, _cast(scales, specs[1])]


def _cast(weights: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The same numbers in another dtype, rounded but not lost to infinity."""
    if weights.dtype == spec.numpy_dtype:
        return weights
    with np.errstate(over="ignore"):
        cast = weights.astype(spec.numpy_dtype)
    lost = count_not_finite(cast) if cast.itemsize < weights.itemsize else 0
    if lost and lost > count_not_finite(weights):
        raise CheckpointError(f"{spec.name}: holds numbers beyond {spec.dtype}'s range; write it in a wider --dtype")
    return cast


def compare(where: str, expected: Iterable[TensorSpec], found: Mapping[str, TensorSpec]) -> None:
    """Check that `found` holds just the `expected` tensors, in dtype and shape.

    Raises:
        CheckpointError: one line that begins with `where` and names every tensor at fault.
    """
    wanted = {spec.name: spec for spec in expected}
    missing = [name for name in wanted if name not in found]
    left_over = [name for name in found if name not in wanted]
    shared = [(spec, found[name]) for name, spec in wanted.items() if name in found]
    misshaped = [f"{a.name} {list(b.shape)} for {list(a.shape)}" for a, b in shared if a.shape != b.shape]
    mistyped = [f"{a.name} {b.dtype} for {a.dtype}" for a, b in shared if a.dtype != b.dtype]
    kinds = {"missing": missing, "left over": left_over}
    kinds |= {"of the wrong shape": misshaped, "of the wrong dtype": mistyped}
    faults = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise CheckpointError(f"{where}: its tensors are not those of its config: {'; '.join(faults)}")


def dtype_name(dtype: np.dtype) -> str:
    """The name in `DTYPES` of a numpy dtype, or numpy's own name for others."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))

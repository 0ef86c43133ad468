"""FP8 (report 3.3): the quantisers, bit for bit in both siblings."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_jax.config import ConfigError
from deepseek_jax.precision import fp8
from deepseek_torch.precision import fp8 as torch_fp8

SPECIALS = [0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 1e-5, 1e-4, 448.0, 449.0, -480.0, 1e6, 3.4e38, -3.4e38,
            np.inf, -np.inf, np.nan, -np.nan]  # fmt: skip
SHAPES = [(1, 1), (3, 259), (131, 3), (2, 130, 128)]
jax_tiles = jax.jit(fp8.quantize_tiles, static_argnames=("axis", "power_of_two", "smallest_amax"))
jax_blocks = jax.jit(fp8.quantize_blocks, static_argnames="power_of_two")
jax_dequantized = jax.jit(fp8.dequantize_tiles, static_argnames="axis")


@st.composite
def awkward(draw) -> np.ndarray:
    """Numbers of any magnitude, some tiles zero, with special values planted."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(draw(st.sampled_from(SHAPES))) * 10.0 ** draw(st.integers(-42, 30))
    spread = draw(st.sampled_from([0, 1, 8]))
    x = (x * np.exp(spread * rng.standard_normal(x.shape))).astype(np.float32)
    if draw(st.booleans()):
        x[..., : x.shape[-1] // 2] = 0
    for value in draw(st.lists(st.sampled_from(SPECIALS) | st.floats(width=32), max_size=4)):
        x.flat[draw(st.integers(0, x.size - 1))] = value
    return x


def one_of_everything() -> np.ndarray:
    """A ragged matrix whose tiles are in turn zero, ordinary, beyond 448, subnormal, NaN, infinite and mixed."""
    x = np.random.default_rng(0).standard_normal((7, 300)).astype(np.float32)
    x *= np.array([0, 1, 1e6, 1e-40, 1, 1, 1e-7], np.float32)[:, None]
    x[4, 130], x[5, 140], x[5, 299], x[6, 1::7] = np.nan, np.inf, -np.inf, 448
    return x


def bits(array) -> np.ndarray:
    """Raw bits of a JAX or torch array of codes or scales."""
    if isinstance(array, torch.Tensor):
        return array.view({1: torch.uint8, 4: torch.int32}[array.element_size()]).numpy()
    array = np.asarray(array)
    return array.view({1: np.uint8, 4: np.int32}[array.itemsize])


def assert_same_bits(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(bits(mine), bits(other))


@settings(max_examples=100)
@given(awkward(), st.booleans(), st.booleans())
@example(one_of_everything(), False, False)
@example(one_of_everything(), True, True)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_quantisers_agree_bit_for_bit(x, power_of_two, is_gradient):
    axis, smallest = (-2, fp8.SMALLEST_GRADIENT_AMAX) if is_gradient else (-1, fp8.SMALLEST_AMAX)
    options = {"axis": axis, "power_of_two": power_of_two, "smallest_amax": smallest}
    ours, theirs = jax_tiles(x, **options), torch_fp8.quantize_tiles(torch.from_numpy(x), **options)
    assert_same_bits(ours, theirs)
    np.testing.assert_array_equal(jax_dequantized(*ours, axis=axis), torch_fp8.dequantize_tiles(*theirs, axis).numpy())
    ours = jax_blocks(x, power_of_two=power_of_two)
    assert_same_bits(ours, torch_fp8.quantize_blocks(torch.from_numpy(x), power_of_two))


@settings(max_examples=60)
@given(awkward(), st.booleans())
@example(one_of_everything(), False)
@example(one_of_everything(), True)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_codes_are_those_of_the_formula(x, power_of_two):
    """Against numpy and ml_dtypes, tile by tile; also that NaN and infinity stay visible."""
    codes, scales = (np.asarray(part) for part in jax_tiles(x, axis=-1, power_of_two=power_of_two))
    x[np.abs(x) < np.finfo(np.float32).tiny] = 0
    for tile in range(scales.shape[-1]):
        part = np.s_[..., 128 * tile : 128 * (tile + 1)]
        scale = np.maximum(np.abs(x[part]).max(-1), np.float32(1e-4)) / np.float32(448)
        if power_of_two:
            mantissa, exponent = np.frexp(scale)
            rounded = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
            scale = np.where(np.isfinite(scale), rounded, scale)
        np.testing.assert_array_equal(scales[..., tile], scale)
        expected = np.clip(x[part] / scale[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(codes[part].astype(np.float32), expected.astype(np.float32))
        lost = ~np.isfinite(x[part]).all(-1)
        back = codes[part].astype(np.float32) * scales[..., tile : tile + 1]
        assert np.isnan(back[lost][~np.isfinite(x[part][lost])]).all()
        # Rounding up may pass the largest float32.
        assert np.isfinite(back[~lost][np.abs(x[part][~lost]) < 3.1e38]).all()


def test_blocks_are_128_by_128_with_ragged_edges():
    w = np.random.default_rng(0).standard_normal((2, 200, 300)).astype(np.float32)
    codes, scales = jax_blocks(w)
    assert codes.shape == w.shape and codes.dtype == jnp.float8_e4m3fn
    expected = [[[np.abs(e[r : r + 128, c : c + 128]).max() for c in (0, 128, 256)] for r in (0, 128)] for e in w]
    np.testing.assert_array_equal(scales, np.array(expected, np.float32) / np.float32(448))
    np.testing.assert_allclose(fp8.dequantize_blocks(codes, scales), w, rtol=2**-4, atol=float(scales.max()) * 2**-9)


def test_require_fp8(monkeypatch):
    fp8.require_fp8()
    absent = next(platform for platform in ("gpu", "tpu") if platform != jax.default_backend())
    with pytest.raises(ConfigError, match=r"^model\.precision=fp8: .*use model\.precision=bfloat16$"):
        fp8.require_fp8(absent)

    def refuses(*args, **kwargs):
        raise NotImplementedError("no float8 here\nand a second line")

    monkeypatch.setattr(jax.lax, "dot_general", refuses)
    with pytest.raises(ConfigError, match=r"^[^\n]*no float8 here[^\n]*bfloat16$"):
        fp8.require_fp8()

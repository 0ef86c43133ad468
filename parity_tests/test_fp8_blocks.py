"""The FP8 form of checkpoints: quantising in blocks, and giving back the bytes that came."""

import numpy as np
import pytest
import safetensors

from deepseek_jax.checkpoint.fp8_blocks import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    check_scales,
    dequantize_blocks,
    quantize_blocks,
    requantize_blocks,
    scale_shape,
)
from deepseek_jax.checkpoint.hf_files import SINGLE_FILE
from deepseek_jax.checkpoint.safetensors_reader import SafetensorsDirectory, read_header
from parity_tests.safetensors_files import BF16, F8, fails, same, write

RAGGED = [(256, 384), (130, 257), (127, 1), (1, 129), (300, 128), (0, 5), (5, 0)]


def reference_quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one block at a time, with ml_dtypes' own cast."""
    codes, scales = np.zeros(w.shape, F8), np.zeros(scale_shape(w.shape), np.float32)
    for i, j in np.ndindex(scales.shape):
        block = np.s_[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
        scales[i, j] = np.maximum(np.abs(w[block]).max(), np.float32(1e-4)) / np.float32(448)
        codes[block] = np.clip(w[block] / scales[i, j], -448, 448).astype(F8)
    return codes, scales


def awkward_weights(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Blocks of many magnitudes with zeros of both signs, tiny blocks and outliers."""
    rng = np.random.default_rng(seed)
    w = (
        rng.standard_normal(shape)
        * 10.0 ** rng.integers(-12, 8, scale_shape(shape)).repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
    )
    w[rng.random(shape) < 0.02] *= 300
    w[rng.random(shape) < 0.02] = 0.0
    w[rng.random(shape) < 0.02] = -0.0
    return w.astype(np.float32)


@pytest.mark.parametrize("shape", RAGGED)
def test_quantiser_is_its_definition_bit_for_bit(shape):
    w = awkward_weights(shape, seed=sum(shape))
    for weights in (w, w.astype(BF16), np.asfortranarray(w)):
        codes, scales = quantize_blocks(weights, "w")
        expected_codes, expected_scales = reference_quantize(weights.astype(np.float32))
        assert same(codes, expected_codes) and same(scales, expected_scales)
        expanded = scales.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
        assert same(dequantize_blocks(codes, scales, "w"), codes.astype(np.float32) * expanded)


def test_rounding_is_the_casts_for_every_bfloat16_and_its_neighbours():
    """Every tie and every code's edge is within one bit of a bfloat16."""
    bits = (np.arange(2**16, dtype=np.uint32) << 16)[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF], np.uint32)
    x = bits.view(np.float32)
    x = np.append(x[np.abs(x) <= 448], np.float32(448)).reshape(1, -1)
    x = np.pad(x, ((0, 0), (0, -x.size % 127))).reshape(-1, 127)
    x = np.concatenate([np.full((len(x), 1), 448, np.float32), x], axis=1)
    codes, scales = quantize_blocks(x, "x")
    assert (scales == 1).all() and same(codes, x.astype(F8))


def every_code(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    return codes.view(F8)


@pytest.mark.parametrize("kind", [np.float32, np.float64, BF16])
@pytest.mark.parametrize("shape", RAGGED)
def test_kept_scales_give_the_same_bytes_back(shape, kind):
    """Whatever the codes, and for scales over float32's whole range."""
    rng = np.random.default_rng(5)
    codes = every_code(rng, shape)
    exponents = rng.uniform(-116, 60, scale_shape(shape))
    scales = (2.0**exponents).astype(np.float32)
    weights = dequantize_blocks(codes, scales, "w").astype(kind)
    assert same(requantize_blocks(weights, scales), codes)
    extremes = np.full_like(scales, SMALLEST_SCALE), np.full_like(scales, LARGEST_SCALE)
    for scales in extremes if kind != BF16 else extremes[:1]:
        assert same(requantize_blocks(dequantize_blocks(codes, scales, "w").astype(kind), scales), codes)


def test_recomputed_scales_need_not_be_the_ones_that_came():
    """They are for what `quantize_blocks` wrote from magnitudes above its floor, and not in general."""
    codes, scales = quantize_blocks(awkward_weights((512, 640), seed=9), "w")
    weights = dequantize_blocks(codes, scales, "w")
    again_codes, again = quantize_blocks(weights, "w")
    floored = scales == np.float32(1e-4) / np.float32(448)
    assert 0 < floored.mean() < 1 and same(again, scales) and same(again_codes, codes)
    powers = np.exp2(np.ceil(np.log2(scales)))
    codes = requantize_blocks(np.zeros_like(weights), powers)
    codes = (weights / powers.repeat(128, 0).repeat(128, 1)).astype(F8)
    weights = dequantize_blocks(codes, powers, "w")
    assert not same(quantize_blocks(weights, "w")[1], powers)
    assert same(requantize_blocks(weights, powers), codes)


def test_trained_weights_are_not_explained_by_old_scales():
    codes, scales = quantize_blocks(awkward_weights((200, 200), seed=4), "w")
    weights = dequantize_blocks(codes, scales, "w")
    assert requantize_blocks(weights, scales) is not None
    weights[150, 190] = np.nextafter(weights[150, 190], np.float32(np.inf))
    assert requantize_blocks(weights, scales) is None
    weights[150, 190] = np.nan  # a code has that, too
    assert np.isnan(requantize_blocks(weights, scales)[150, 190].astype(np.float32))
    weights[150, 190] = 3e38
    assert requantize_blocks(weights, scales) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-37, 1e37])
def test_scales_that_cannot_be(bad):
    codes, scales = quantize_blocks(np.ones((200, 300), np.float32), "w")
    scales[1, 2] = bad
    fails(lambda: dequantize_blocks(codes, scales, "f.safetensors: X"), "f.safetensors: X: scale [1, 2] is")


def test_scales_of_another_shape():
    codes, scales = quantize_blocks(np.ones((200, 300), np.float32), "w")
    for wrong in (scales[:1], scales.T, scales.astype(np.float64), scales.reshape(-1)):
        fails(lambda: dequantize_blocks(codes, wrong, "X"), "X: scales", "do not fit", "[2, 3]")
    fails(lambda: check_scales(scales, (6,), "X"), "X: scales")
    fails(lambda: quantize_blocks(np.ones(3), "X"), "X:", "only matrices")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_float8_cannot_hold(bad):
    weights = np.ones((200, 300), np.float32)
    weights[140, 299] = bad
    fails(lambda: quantize_blocks(weights, "X"), "X: NaN or infinity in block [1, 2]")


def test_a_code_that_is_nan_stays_visible():
    codes, scales = quantize_blocks(np.ones((3, 3), np.float32), "w")
    codes.view(np.uint8)[1, 1] = 0xFF
    assert np.argwhere(np.isnan(dequantize_blocks(codes, scales, "w"))).tolist() == [[1, 1]]


def test_blocks_through_a_file(tmp_path):
    codes, scales = quantize_blocks(awkward_weights((200, 300), seed=6), "w")
    ours = SafetensorsDirectory(write(tmp_path / "out", {"x.weight": codes, "x.weight_scale_inv": scales}))
    assert [entry.dtype for entry in read_header(tmp_path / "out" / SINGLE_FILE).values()] == ["F32", "F8_E4M3"]
    assert same(ours.read("x.weight"), codes) and same(ours.read("x.weight_scale_inv"), scales)
    with safetensors.safe_open(tmp_path / "out" / SINGLE_FILE, framework="pt") as opened:
        weight, scale = opened.get_tensor("x.weight").float(), opened.get_tensor("x.weight_scale_inv")
    theirs = weight * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert same(theirs.numpy(), dequantize_blocks(codes, scales, "w"))

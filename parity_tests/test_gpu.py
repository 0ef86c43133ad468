"""Kernels compiled for GPUs that are not there, by the CUDA plugin's compiler on any host; nothing runs."""

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is not installed")


def elsewhere(function):
    """What the function returns in a process of its own: the compiler's environment is read when JAX is first imported."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function).result()


def h100():
    from deepseek_jax.planning.topologies import make_devices, prepare_environment, read_topology

    topology = read_topology("h100:1")
    prepare_environment(topology)
    return make_devices(topology)[0]


def grouped_programs():
    """Forward and gradients, for the model's sizes and for some that no tile divides, in both types."""
    chip = h100()
    import jax

    from parity_tests.test_grouped_matmul import product_and_gradients

    place = jax.sharding.SingleDeviceSharding(chip)
    texts = []
    for dtype, rows, experts, width_in, width_out in [("bfloat16", 8192, 16, 512, 256), ("float32", 1000, 5, 200, 72)]:
        shapes = (rows, width_in), (experts, width_in, width_out), (rows, width_out)
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
        sizes = jax.ShapeDtypeStruct((experts,), "int32", sharding=place)
        texts.append(product_and_gradients.lower(*arguments, sizes, "triton").compile().as_text())
    return texts


def test_grouped_matmul_compiles_for_gpu():
    for text in elsewhere(grouped_programs):
        kernels = re.findall(r'custom_call_target="__gpu\$xla.gpu.triton".*?op_name="[^"]*/(\w+)/pallas_call', text)
        assert sorted(kernels) == ["grouped_matmul", "grouped_matmul_of_rows", "grouped_matmul_transposed"]
        assert " while(" not in text


def attention_program():
    """Forward and gradients with DeepSeek-V3's head sizes: its calls of kernels, and temporaries in bytes."""
    chip = h100()
    import jax

    from parity_tests.test_attention import output_and_gradients

    place = jax.sharding.SingleDeviceSharding(chip)
    q, v = (jax.ShapeDtypeStruct((1, 4096, 128, width), "bfloat16", sharding=place) for width in (192, 128))
    compiled = output_and_gradients.lower(q, q, v, v, None, "cudnn").compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def test_attention_of_cudnn_compiles_for_gpu():
    text, temporaries = elsewhere(attention_program)
    calls = re.findall(r'custom_call_target="([^"]*)"', text)
    assert calls == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert temporaries < 4e6  # the softmax' logarithms, a number for each row of scores

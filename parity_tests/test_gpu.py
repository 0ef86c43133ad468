"""Kernels compiled for GPUs that are not there, by the CUDA plugin's compiler on any host; nothing runs."""

import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import pytest

pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is not installed")


def elsewhere(function):
    """What the function returns in a process of its own: the compiler's environment is read when JAX is first imported."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function).result()


def on_an_h100(flags=""):
    """Where arguments of a program for it lie."""
    from deepseek_jax.planning.topologies import make_devices, prepare_environment, read_topology

    topology = read_topology("h100:1")
    prepare_environment(topology)
    os.environ["XLA_FLAGS"] += flags
    import jax

    device = make_devices(topology)[0]
    # Newer versions of JAX ask the mesh at hand for which GPU a kernel is lowered; this process is for nothing else.
    jax.sharding.use_abstract_mesh(jax.sharding.Mesh([device], "device").abstract_mesh).__enter__()
    return jax.sharding.SingleDeviceSharding(device)


def kernels(text):
    return sorted(re.findall(r'custom_call_target="__gpu\$xla.gpu.triton".*?op_name="[^"]*/(\w+)/pallas_call', text))


def grouped_programs():
    """Forward and gradients, for the model's sizes and for some that no tile divides, in both types."""
    place = on_an_h100()
    import jax

    from parity_tests.test_grouped_matmul import product_and_gradients

    texts = []
    for dtype, rows, experts, width_in, width_out in [("bfloat16", 8192, 16, 512, 256), ("float32", 1000, 5, 200, 72)]:
        shapes = (rows, width_in), (experts, width_in, width_out), (rows, width_out)
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
        sizes = jax.ShapeDtypeStruct((experts,), "int32", sharding=place)
        texts.append(product_and_gradients.lower(*arguments, sizes, "triton").compile().as_text())
    return texts


def test_grouped_matmul_compiles_for_gpu():
    for text in elsewhere(grouped_programs):
        assert kernels(text) == ["grouped_matmul", "grouped_matmul_of_rows", "grouped_matmul_transposed"]
        assert " while(" not in text


def float8_program():
    """An Experts' product and gradients, and all that the compiler gave to the assembler."""
    with tempfile.TemporaryDirectory() as folder:
        place = on_an_h100(f" --xla_dump_to={folder}")
        import jax

        from deepseek_jax.precision.fp8_grouped_matmul import fp8_grouped_matmul

        @jax.jit
        def product_and_gradients(x, w, dy, group_sizes):
            y, pull_back = jax.vjp(lambda x, w: fp8_grouped_matmul(x, w, group_sizes, "triton"), x, w)
            return y, *pull_back(dy)

        shapes = ((1000, 512), "bfloat16"), ((4, 512, 200), "float32"), ((1000, 200), "bfloat16"), ((4,), "int32")
        arguments = [jax.ShapeDtypeStruct(*each, sharding=place) for each in shapes]
        text = product_and_gradients.lower(*arguments).compile().as_text()
        return text, "".join(path.read_text() for path in Path(folder).glob("*.ptx"))


def test_float8_products_run_on_the_tensor_cores():
    """All three in E4M3, 128 of the contracted axis in four instructions: Triton falls back to float16 unless it is asked."""
    text, assembly = elsewhere(float8_program)
    products = ["grouped_matmul_fp8", "grouped_matmul_fp8", "grouped_matmul_of_rows_fp8"]
    assert kernels(text) == products + ["quantize"] * 3 + ["quantize_along_rows"] * 2
    assert " while(" not in text
    if not assembly and metadata.version("jax").split(".") >= ["0", "11"]:
        pytest.skip("newer compilers do not tell what they give to the assembler")
    assert set(re.findall(r"\bw?g?mma\S*\.f32\.\w+\.\w+", assembly)) == {
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"
    }
    # IEEE division, as on a CPU: the codes are the same bits. XLA's own division on GPUs is another instruction.
    assert "div.rn.f32" in assembly and "div.full.f32" not in assembly


def mosaic_program():
    """An Experts' product and gradients by the kernels for Hopper, which are assembled where they run."""
    place = on_an_h100()
    import jax

    from deepseek_jax.planning.kernels import kernel_name
    from deepseek_jax.planning.program import Program
    from deepseek_jax.precision.fp8_grouped_matmul import fp8_grouped_matmul

    @jax.jit
    def product_and_gradients(x, w, dy, group_sizes):
        y, pull_back = jax.vjp(lambda x, w: fp8_grouped_matmul(x, w, group_sizes, "mosaic"), x, w)
        return y, *pull_back(dy)

    shapes = ((1001, 500), "bfloat16"), ((4, 500, 200), "float32"), ((1001, 200), "bfloat16"), ((4,), "int32")
    arguments = [jax.ShapeDtypeStruct(*each, sharding=place) for each in shapes]
    program = Program(product_and_gradients.lower(*arguments).compile().as_text())
    return sorted(filter(None, (kernel_name(each) for part in program.computations.values() for each in part)))


def test_float8_products_of_mosaic_are_lowered_for_gpu():
    products = ["grouped_matmul_fp8", "grouped_matmul_fp8", "grouped_matmul_of_rows_fp8"]
    assert elsewhere(mosaic_program) == products + ["quantize"] * 3 + ["quantize_along_rows"] * 2


def attention_program():
    """Forward and gradients with DeepSeek-V3's head sizes: its calls of kernels, and temporaries in bytes."""
    place = on_an_h100()
    import jax

    from parity_tests.test_attention import output_and_gradients

    q, v = (jax.ShapeDtypeStruct((1, 4096, 128, width), "bfloat16", sharding=place) for width in (192, 128))
    compiled = output_and_gradients.lower(q, q, v, v, None, "cudnn").compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def test_attention_of_cudnn_compiles_for_gpu():
    text, temporaries = elsewhere(attention_program)
    calls = re.findall(r'custom_call_target="([^"]*)"', text)
    assert calls == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert temporaries < 4e6  # the softmax' logarithms, a number for each row of scores

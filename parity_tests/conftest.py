"""What every test stands on: the CPU as eight devices, and float64 where a test asks for it."""

import os

# Before anything imports jax. Compiling is most of a test's time, and what is compiled runs once or twice.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles here, so that several processes may have it

import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """What one module compiled the next does not need; thousands of programs slow all that comes after them."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def x64():
    """float64 in JAX for the length of a test; without it JAX cuts every array down to float32."""
    import jax

    with jax.enable_x64(True):
        yield

"""What every test stands on: the CPU, and float64 where a test asks for it."""

import os

# Before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest


@pytest.fixture
def x64():
    """float64 in JAX for the length of a test; without it JAX cuts every array down to float32."""
    import jax

    with jax.enable_x64(True):
        yield

"""What every test stands on: the CPU as eight devices, and float64 where a test asks for it."""

import os
import tempfile

from parity_tests.compiling import QUICKLY

# Before anything imports jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY} --xla_force_host_platform_device_count=8"
# Programs that several tests or their processes compile are compiled once, and kept for the next time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"deepseek-jax-tests-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles here, so that several processes may have it

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes depends on the machine and on what else it does; its files are overwritten by the next.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("any machine")


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


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run directory, of the model `WIDE`; to be read only."""
    from parity_tests.checkpoints import WIDE
    from parity_tests.conversions import make_run

    return make_run(tmp_path_factory.mktemp("runs") / "wide", WIDE)


@pytest.fixture(scope="session")
def exported(run):
    """The same model for Hugging Face, in float32 and several files; to be read only."""
    from deepseek_jax.convert import convert

    destination = run.parent / "exported"
    convert(run, destination, max_shard_size="300KB", verify=True)
    return destination


@pytest.fixture(scope="session")
def tokenizer():
    """Trained on `texts.TEXT`."""
    from deepseek_jax.data.tokenizer import train_tokenizer
    from parity_tests.texts import TEXT, VOCAB_SIZE

    return train_tokenizer([TEXT], VOCAB_SIZE)


@pytest.fixture
def text_file(tmp_path):
    """`texts.TEXT` in a file of its own."""
    from parity_tests.texts import TEXT

    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path

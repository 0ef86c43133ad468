"""DeepSeek-V3 training in JAX, in lockstep with the PyTorch sibling `deepseek_torch`."""

from deepseek_jax.absent_devices import keep_quiet

keep_quiet()

"""DeepSeek-V3 training in JAX, in lockstep with the PyTorch sibling `deepseek_torch`."""

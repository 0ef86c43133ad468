"""The PyTorch sibling of `deepseek_jax`: the same model and training, in the plainest code that is right."""

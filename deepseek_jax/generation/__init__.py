"""Generation: sampling, speculation, chat, and files of prompts; `deepseek_jax.generate` is the command."""

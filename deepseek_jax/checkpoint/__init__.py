"""Checkpoints as Hugging Face lays them out, in JAX and in memory, and the ways between them; never torch."""

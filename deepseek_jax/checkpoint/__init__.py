"""Checkpoint files as Hugging Face lays them out; needs numpy and ml_dtypes, no framework."""

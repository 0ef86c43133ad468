"""Both siblings side by side, and both against Hugging Face transformers."""

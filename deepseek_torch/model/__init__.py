"""The DeepSeek-V3 model as PyTorch modules, one file per idea of the report."""

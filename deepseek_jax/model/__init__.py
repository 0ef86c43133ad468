"""The DeepSeek-V3 model as Flax Linen modules, one file per idea of the report."""

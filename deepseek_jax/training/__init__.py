"""Losses, schedules, the optimizer, the step, metrics and checkpoints."""

"""Losses, schedules, the optimizer, the step and evaluation."""

"""Reduced-precision arithmetic."""

"""Kernels for accelerators, one file each, behind signatures that `model/` and `precision/` own."""

"""Kernels for one kind of device each, behind signatures that `model` and `precision` own."""

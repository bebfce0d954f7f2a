"""Tensors in, tensors out: one file an operation, the reference first."""

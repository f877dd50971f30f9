"""Kernels and array functions: pure functions on arrays. Each op has one documented face, an ordered list of
implementations that ends in plain XLA, and a slow `reference.py` that every implementation is tested against."""

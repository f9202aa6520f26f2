"""Triton kernels, one file per op. A leaf: imports torch and triton only."""

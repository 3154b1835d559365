"""Triton kernels and their launchers. Nothing here is imported before the first launch."""

"""Checks for kernels that others can use too: error yardstick, poisoned buffers, compile-only resource counts."""

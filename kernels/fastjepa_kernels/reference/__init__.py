"""Every operation in plain PyTorch: what the Triton form is compared with, and what runs on a CPU."""

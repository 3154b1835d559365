"""Other people's models on these kernels: `patch` and what it knows of timm, transformers and the public jepa code."""

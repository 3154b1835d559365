"""The verbs of `python -m fastjepa`, a file each: what it takes, what it prints, how it ends."""

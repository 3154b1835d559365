"""Where a run executes: device and precision, the processes that train together, and what they exchange."""

from fastjepa.parallel.device import DTYPES, autocast, gradient_scaler, set_up, synchronise
from fastjepa.parallel.launch import Launch, launch
from fastjepa.parallel.world import ALONE, World, join, lost_another

__all__ = [
    "ALONE", "DTYPES", "Launch", "World", "autocast", "gradient_scaler", "join", "launch", "lost_another", "set_up",
    "synchronise",
]  # fmt: skip

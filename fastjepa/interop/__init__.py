"""Weights in and out: checkpoints of the public V-JEPA code, folders in the transformers layout, runs of this library.

Reading executes nothing: `.pth.tar` and `.pt` go through torch's weights-only reader; folders and our own checkpoints
are safetensors and JSON. Loading is strict: every key and every shape, or nothing is copied. Writing is a rename.
"""

from fastjepa.fit import NETWORKS
from fastjepa.interop.folder import load_folder
from fastjepa.interop.loading import load_moments, load_weights
from fastjepa.interop.meta import PREFIX, MetaCheckpoint, load_meta_checkpoint, write_meta_checkpoint
from fastjepa.interop.own import OwnCheckpoint, load_own_checkpoint, with_optimizer
from fastjepa.interop.reading import read_weights
from fastjepa.interop.vjepa2_folder import VJEPA2Weights, load_classifier
from fastjepa.interop.weights import Weights, WeightsRefused
from fastjepa.interop.writing import write_folder

__all__ = [
    "NETWORKS",
    "PREFIX",
    "MetaCheckpoint",
    "OwnCheckpoint",
    "VJEPA2Weights",
    "Weights",
    "WeightsRefused",
    "load_classifier",
    "load_folder",
    "load_meta_checkpoint",
    "load_moments",
    "load_own_checkpoint",
    "load_weights",
    "read_weights",
    "with_optimizer",
    "write_folder",
    "write_meta_checkpoint",
]

"""Checkpoints: committed by rename, verified by checksum, resumed by default.

    checkpoints/
        step-0012000/
            shard-*.safetensors   tensors of the networks and the optimizer (torch distributed checkpoint, safetensors)
            trainer.json          step, settings, identity, versions
            manifest.json         size and CRC32 of every other file, written last
        latest                    link to the newest one
        corrupt-step-...          a damaged one, put aside with a warning

A folder counts only once it carries its final name, and its content only while it agrees with the manifest. Loading
executes no code: the tensors are safetensors, the rest is JSON.
"""

from fastjepa.checkpoint.errors import UNREADABLE, CheckpointError, NotDamaged, SaveFailed
from fastjepa.checkpoint.read import Found, entries, load, newest, verify
from fastjepa.checkpoint.saver import Outcome, Saver
from fastjepa.checkpoint.write import save

__all__ = [
    "UNREADABLE",
    "CheckpointError",
    "Found",
    "NotDamaged",
    "Outcome",
    "SaveFailed",
    "Saver",
    "entries",
    "load",
    "newest",
    "save",
    "verify",
]

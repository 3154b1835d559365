"""Which decoder a run takes, and why: settled once, before the first batch, and printed."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fastjepa.data.decoders import dali, torchcodec
from fastjepa.data.indexfile import Entry

MOST_KINDS = 4


@dataclass(frozen=True)
class Decoder:
    """A decoder by its name in `data.decoder`, and the reason for it.

    `entries`: what the index says of every video, where the decoder goes by it; `encoded`: bool [videos], those that
    it takes, the others are for PyAV. Both None for decoders of the loader's processes. `lines` tell about the split.
    """

    name: str
    reason: str
    entries: Sequence[Entry] | None = None
    encoded: np.ndarray | None = None
    lines: list[str] = field(default_factory=list)


def choose_decoder(
    wanted: str, device: torch.device, needs_frames: str, entries: Callable[[], Sequence[Entry]]
) -> Decoder:
    """The decoder of a run on `device` for the value `wanted` of data.decoder.

    `needs_frames`: the setting that needs decoded frames in the loader's processes, or empty. `entries` gives those of
    the index, one a video; it may take a while and is called only where DALI can run. Errors: ValueError where what
    was asked for cannot run here or can read none of the videos.
    """
    if wanted == "pyav":
        return Decoder("pyav", "asked for")
    if wanted == "torchcodec":
        if reason := torchcodec.why_not():
            raise ValueError(f"data.decoder: torchcodec cannot run here: {reason}")
        return Decoder("torchcodec", "asked for")
    name = "dali_gpu" if wanted == "auto" else wanted
    reason = "there is no GPU to decode on" if name == "dali_gpu" and device.type != "cuda" else ""
    if not reason and needs_frames:
        reason = f"{needs_frames} works on frames in the loader processes"
    reason = reason or dali.why_not(torch.device("cpu") if name == "dali_cpu" else device)
    found: Sequence[Entry] = ()
    if not reason:
        try:
            found = entries()
        except (OSError, RuntimeError) as error:
            reason = f"the index of the videos cannot be made: {error}"
    if not reason:
        av1 = name != "dali_gpu" or decodes_av1(torch.cuda.get_device_capability(device))
        encoded = np.array([name in one.decoders and (av1 or one.codec != "av1") for one in found], dtype=bool)
        if encoded.any():
            why = "asked for" if wanted != "auto" else "DALI and a GPU are there"
            return Decoder(name, why, found, encoded, _split(name, found, encoded))
        reason = f"it can decode none of the {len(found):,} videos: {_kinds(found)}"
    if wanted != "auto":
        raise ValueError(f"data.decoder: {name} cannot be used here: {reason}")
    return Decoder("pyav", f"not dali_gpu: {reason}")


def decodes_av1(capability: tuple[int, int]) -> bool:
    """Has the video decoder of a GPU of this compute capability AV1? Not A100 (8.0), Hopper (9.0) and what is older.

    Source: NVIDIA's video encode and decode support matrix.
    """
    return capability >= (8, 6) and capability[0] != 9


def _split(name: str, entries: Sequence[Entry], encoded: np.ndarray) -> list[str]:
    others = [entry for entry, taken in zip(entries, encoded) if not taken and entry.reason is None]
    bad = sum(entry.reason is not None for entry in entries)
    lines = [f"           {name} {encoded.sum():,} videos, pyav {len(others):,}, unreadable {bad:,}"]
    return lines + ([f"           for pyav: {_kinds(others)}"] if others else [])


def _kinds(entries: Sequence[Entry]) -> str:
    counted = Counter(
        f"{entry.codec} {entry.pixel_format} {entry.width} x {entry.height}" if entry.reason is None else "unreadable"
        for entry in entries
    )
    more = len(counted) - MOST_KINDS
    shown = ", ".join(f"{count:,} {kind}" for kind, count in counted.most_common(MOST_KINDS))
    return shown + (f" and {more:,} more kinds" if more > 0 else "")

"""Encoded files to uint8 clips on a device, a batch at a time, with NVIDIA DALI.

`fn.decoders.video` decodes the clips of a batch in parallel: with NVDEC on a GPU; on a CPU with FFmpeg, of which DALI
has VP8, VP9 and MJPEG only. The rest of the graph is that of `fastjepa.data.transforms` but for rounding: crop, resize,
mirror. Decoded colours differ from those of PyAV by a grey level in the mean, as chroma is upsampled otherwise.

Frame i is the i-th that a decode from start to end delivers, as in `fastjepa.data.decode`. DALI 2.4 never seeks in a
file in memory (its `build_index` changes nothing): a clip costs all frames from the start of `encoded` to its last one.

B: clips of a batch; T: frames of a clip; H, W: height and width of a picture as displayed.
"""

import ctypes
import re
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastjepa.data.decoders.encoded import EncodedClip
from fastjepa.data.decoders.graph import build_graph, feed, reason_of

OLDEST = (2, 2)


class DaliDecoder:
    """Decodes batches of at most `most` clips of `frames` frames, cut to `crop` x `crop` pixels, in the background.

    At most `prefetch` batches are under way. `threads` decode at the same time, on a GPU with an NVDEC session each.
    `antialias` is for pictures that are made smaller; the published transform has none. A clip that cannot be decoded
    makes DALI fail its whole batch: then all of them are decoded one by one to find it. Errors: RuntimeError with one
    sentence where the pipeline cannot be built.
    """

    def __init__(
        self,
        *,
        frames: int,
        crop: int,
        most: int,
        device: torch.device,
        threads: int,
        prefetch: int,
        antialias: bool = False,
    ) -> None:
        self.frames, self.crop, self.most, self.prefetch = frames, crop, most, prefetch
        self.device, self.threads, self.antialias = device, threads, antialias
        self._under_way: deque[list[EncodedClip]] = deque()  # also keeps the bytes alive, which DALI does not copy
        self._pipeline = self._build(most)
        self._alone: Any = None  # the pipeline for one clip, built when it is needed first
        self._unexplained = 0

    def begin(self, clips: Sequence[EncodedClip]) -> None:
        """Start to decode a batch, and return at once.

        Errors: ValueError for a batch or a clip of the wrong length, and where `prefetch` batches are under way.
        """
        if not 1 <= len(clips) <= self.most:
            raise ValueError(f"expected a batch of 1 to {self.most} clips, given {len(clips)}")
        if len(self._under_way) == self.prefetch:
            raise ValueError(f"{self.prefetch} batches are under way: finish one before the next begins")
        for clip in clips:
            if clip.frames.shape != (self.frames,):
                raise ValueError(f"{clip.path}: expected {self.frames} frame numbers, given shape {clip.frames.shape}")
        self._under_way.append(list(clips))
        unexplained = ""
        try:
            feed(self._pipeline, clips)
        except RuntimeError as error:
            unexplained = reason_of(error)
        if unexplained:
            self._restart(unexplained)

    def finish(self) -> tuple[Tensor, dict[int, str]]:
        """The oldest batch: uint8 [B, 3, T, crop, crop] on the device, and why some of its clips failed, by number.

        The pixels of those are 0. On a GPU the tensor is ready in the order of torch's current stream. It belongs to
        the caller. Errors: ValueError where no batch is under way, RuntimeError where DALI fails batch after batch
        although it decodes each of their clips alone.
        """
        if not self._under_way:
            raise ValueError("no batch is under way")
        clips = self._under_way.popleft()
        broken = ""
        try:
            batch, failed = self._collect(self._pipeline, clips)
            self._unexplained = 0
        except RuntimeError as error:
            broken = reason_of(error)
        if broken:  # not in the handler, where the traceback would keep the pipeline alive
            batch, failed = self._one_by_one(clips)
            if not failed:
                self._restart(broken)
        self._turn(batch, clips)
        for number in failed:
            batch[number] = 0
        return batch, failed

    def close(self) -> None:
        """Give up what is under way and free the pipelines."""
        self._pipeline = self._alone = None
        self._under_way.clear()

    def _build(self, most: int) -> Any:
        try:
            return build_graph(most, self.crop, self.device, self.threads, self.antialias)
        except (ImportError, RuntimeError) as error:
            raise RuntimeError(f"DALI cannot decode on {self.device}: {reason_of(error)}") from error

    def _collect(self, pipeline: Any, clips: list[EncodedClip]) -> tuple[Tensor, dict[int, str]]:
        """What a pipeline has made of the oldest batch fed to it. Errors: RuntimeError where any clip failed."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        # The current stream waits for DALI's, not the host. The memory is DALI's and not copied: with its default
        # executor an output is a buffer of its own, which goes back to DALI some time after torch has dropped it, once
        # the whole GPU has finished what it had been given by then; so it may be used on any stream.
        pictures, shapes = pipeline.outputs(stream)
        failed = {}
        for number, (clip, shape) in enumerate(zip(clips, shapes.as_array(), strict=True)):
            found = (int(shape[1]), int(shape[2]))
            if found != clip.stored_size():
                (h, w), (height, width) = found, clip.stored_size()
                failed[number] = f"DALI finds pictures of {w} x {h} pixels in it, not of {width} x {height}"
        return torch.from_dlpack(pictures.as_tensor()), failed

    def _one_by_one(self, clips: list[EncodedClip]) -> tuple[Tensor, dict[int, str]]:
        batch = torch.zeros(len(clips), 3, self.frames, self.crop, self.crop, dtype=torch.uint8, device=self.device)
        failed = {}
        for number, clip in enumerate(clips):
            if self._alone is None:
                self._alone = self._build(1)
            try:
                feed(self._alone, [clip])
                picture, wrong = self._collect(self._alone, [clip])
            except RuntimeError as error:
                failed[number] = f"DALI cannot decode it: {reason_of(error)}"
                self._alone = None  # DALI promises nothing about a pipeline that has failed
                continue
            batch[number] = picture[0]
            if wrong:
                failed[number] = wrong[0]
        return batch, failed

    def _restart(self, reason: str) -> None:
        """After a failure that no clip explains: a new pipeline for the batches under way.

        After one that a clip explains the old pipeline goes on; should it not, it ends up here with the next batch.
        """
        self._unexplained += 1
        if self._unexplained > 1:
            raise RuntimeError(f"DALI fails on whole batches whose clips it decodes alone: {reason}")
        self._pipeline = None  # frees its memory before the next one takes its own
        self._pipeline = self._build(self.most)
        for clips in self._under_way:
            feed(self._pipeline, clips)

    def _turn(self, batch: Tensor, clips: list[EncodedClip]) -> None:
        """Turn the clips of rotated videos, in place. DALI has not: it ignores the rotation, and they are few."""
        for number, clip in enumerate(clips):
            if clip.rotation:
                turned = torch.rot90(batch[number], -clip.rotation // 90, (-2, -1))
                batch[number] = turned.flip(-1) if clip.flip else turned


def why_not(device: torch.device) -> str:
    """Why DALI cannot decode on this device, one sentence; "" where it can. Imports DALI if nothing else is amiss."""
    if device.type not in ("cpu", "cuda"):
        return f"DALI decodes on NVIDIA GPUs and on the CPU, not on {device.type}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        try:
            ctypes.CDLL("libnvcuvid.so.1")
        except OSError as error:
            return (
                f"the driver's video decoder cannot be loaded ({error}); in a container it needs "
                "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
            )
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "DALI is not installed (pip install nvidia-dali-cuda130)"
    try:
        from nvidia.dali import __version__ as version
    except (ImportError, OSError) as error:
        return f"DALI cannot be imported: {reason_of(error)}"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        return f"DALI {version} is too old: {OLDEST[0]}.{OLDEST[1]} or later is needed"
    return ""

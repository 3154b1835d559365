"""Encoded files to uint8 clips on a device, a batch at a time, with NVIDIA DALI.

`fn.decoders.video` decodes the clips of a batch in parallel: with NVDEC on a GPU, on a CPU with FFmpeg, which there has
VP8, VP9 and MJPEG only. The rest of the graph is that of `fastjepa.data.transforms`: crop, resize, mirror; it equals
it but for rounding, decoded colours differ by a grey level in the mean (chroma is upsampled otherwise).

Frame i is the i-th by presentation time of the packets in the file, which is what `fastjepa.data.decode` counts where
its `VideoInfo.pts` is known.

B: clips of a batch; T: frames of a clip; H, W: height and width of a picture as displayed.
"""

import ctypes
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastjepa.data.sampling import Box

OLDEST = (2, 2)
LONGEST_REASON = 300


@dataclass(frozen=True)
class EncodedClip:
    """One clip to decode.

    `encoded`: uint8 [bytes], the whole file, not to be changed before the clip is finished; `frames`: int64 [T], frame
    numbers in any order, repeats allowed; `box`, `flip`: as in ClipDraw, of the picture as displayed, which has
    `height` x `width` pixels; `rotation`: degrees clockwise that the stored picture is turned for that
    (VideoInfo.rotation). Errors: ValueError for a box outside the picture and an angle that is no quarter turn.
    """

    path: str
    encoded: np.ndarray
    frames: np.ndarray
    box: Box
    flip: bool
    height: int
    width: int
    rotation: int = 0

    def __post_init__(self) -> None:
        if self.rotation not in (0, 90, 180, 270):
            raise ValueError(f"{self.path}: expected a rotation of 0, 90, 180 or 270 degrees, given {self.rotation}")
        top, left, height, width = self.box.top, self.box.left, self.box.height, self.box.width
        inside = 0 <= top < top + height <= self.height and 0 <= left < left + width <= self.width
        if not inside:
            raise ValueError(
                f"{self.path}: {self.box} does not lie in a picture of {self.height} x {self.width} pixels"
            )

    def stored_size(self) -> tuple[int, int]:
        """Height and width of the picture in the file, before it is turned."""
        return (self.height, self.width) if self.rotation % 180 == 0 else (self.width, self.height)

    def stored_box(self) -> Box:
        """Where the box lies in the picture of the file."""
        box = self.box
        below, right = self.height - box.top - box.height, self.width - box.left - box.width
        if self.rotation == 90:
            return Box(right, box.top, box.width, box.height)
        if self.rotation == 180:
            return Box(below, right, box.height, box.width)
        if self.rotation == 270:
            return Box(box.left, below, box.width, box.height)
        return box


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
            _feed(self._pipeline, clips)
        except RuntimeError as error:
            unexplained = _reason(error)
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
            broken = _reason(error)
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
            return _pipeline(most, self.crop, self.device, self.threads, self.antialias)
        except (ImportError, RuntimeError) as error:
            raise RuntimeError(f"DALI cannot decode on {self.device}: {_reason(error)}") from error

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
                _feed(self._alone, [clip])
                picture, wrong = self._collect(self._alone, [clip])
            except RuntimeError as error:
                failed[number] = f"DALI cannot decode it: {_reason(error)}"
                self._alone = None  # DALI promises nothing about a pipeline that has failed
                continue
            batch[number] = picture[0]
            failed |= {number: reason for reason in wrong.values()}
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
            _feed(self._pipeline, clips)

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
        return f"DALI cannot be imported: {_reason(error)}"
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        return f"DALI {version} is too old: {OLDEST[0]}.{OLDEST[1]} or later is needed"
    return ""


def _pipeline(most: int, crop: int, device: torch.device, threads: int, antialias: bool) -> Any:
    """The graph. Inputs by name, see `_feed`; outputs: clips CFHW uint8, and FHWC of the pictures as they are stored."""
    from nvidia.dali import Pipeline, fn, types

    gpu = device.type == "cuda"
    number = None
    if gpu:
        number = torch.cuda.current_device() if device.index is None else device.index
    # The depth only says how many runs the first `schedule_run` starts: more than one would find no input. Later ones
    # are queued as they come.
    pipeline = Pipeline(batch_size=most, num_threads=threads, device_id=number, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        order = fn.external_source(name="order", dtype=types.INT32, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        size = fn.external_source(name="size", dtype=types.INT32, ndim=1)
        mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
        # Threads that are pinned to cores would fall on the same cores in every process of a machine.
        clip = fn.decoders.video(
            encoded, device="mixed" if gpu else "cpu", frames=frames, pad_mode="none", affine=False
        )
        shape = clip.shape(dtype=types.INT32)
        clip = fn.slice(clip, start=start, shape=size, axis_names="HW")
        clip = fn.resize(clip, size=(crop, crop), interp_type=types.INTERP_LINEAR, antialias=antialias)
        clip = fn.sequence_rearrange(clip, new_order=order)
        clip = fn.crop_mirror_normalize(
            clip, dtype=types.UINT8, output_layout="CFHW", mirror=mirror, mean=[0.0] * 3, std=[1.0] * 3
        )
        pipeline.set_outputs(clip, shape)
    pipeline.build()
    return pipeline


def _feed(pipeline: Any, clips: Sequence[EncodedClip]) -> None:
    """Start a batch. Returns at once."""

    def feed(name: str, arrays: list[np.ndarray]) -> None:
        pipeline.feed_input(name, arrays)

    # Each frame is asked for once, in order, and the small pictures are put in their places afterwards: for a repeated
    # one DALI goes back to the key frame before it, or opens the file again after the last frame.
    distinct = [np.unique(clip.frames, return_inverse=True) for clip in clips]
    boxes = [clip.stored_box() for clip in clips]
    feed("encoded", [clip.encoded for clip in clips])
    feed("frames", [numbers.astype(np.int32) for numbers, _ in distinct])
    feed("order", [places.astype(np.int32) for _, places in distinct])
    feed("start", [np.array([box.top, box.left], np.int32) for box in boxes])
    feed("size", [np.array([box.height, box.width], np.int32) for box in boxes])
    feed("mirror", [np.array(clip.flip and not clip.rotation, np.int32) for clip in clips])
    pipeline.schedule_run()


def _reason(error: BaseException) -> str:
    """The line of DALI's message that says what is wrong, without its C++ traceback."""
    text = str(error).rpartition("encountered:")[2]
    text = re.sub(
        r"(Critical error in pipeline:|Error in thread \d+: |\[/[^\]]*\]|Assert on \".*?\" failed:)", "", text
    )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".")[:LONGEST_REASON] if lines else type(error).__name__

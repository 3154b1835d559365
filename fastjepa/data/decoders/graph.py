"""The graph that DALI runs, and what goes into it."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastjepa.data.decoders.encoded import EncodedClip

CLUTTER = r"Critical error in pipeline:|Error in thread \d+: |\[/[^\]]*\]|Assert on \".*?\" failed:"
LONGEST_REASON = 300


def build_graph(most: int, crop: int, device: torch.device, threads: int, antialias: bool) -> Any:
    """A pipeline for batches of at most `most` clips, to be fed with `feed`.

    Outputs: the clips, uint8 CFHW, cut and mirrored but not turned; the shape of each decoded one as stored, FHWC.
    Errors: ImportError where DALI is not installed, RuntimeError of DALI's.
    """
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


def feed(pipeline: Any, clips: Sequence[EncodedClip]) -> None:
    """Start a batch and return at once. The clips must be kept until it is there: their bytes are not copied."""
    # Each frame is asked for once, and the small pictures are put in their places afterwards: for a repeated one DALI
    # would decode the file again from its start.
    distinct = [np.unique(clip.frames, return_inverse=True) for clip in clips]
    boxes = [clip.stored_box() for clip in clips]
    pipeline.feed_input("encoded", [clip.encoded for clip in clips])
    pipeline.feed_input("frames", [numbers.astype(np.int32) for numbers, _ in distinct])
    pipeline.feed_input("order", [places.astype(np.int32) for _, places in distinct])
    pipeline.feed_input("start", [np.array([box.top, box.left], np.int32) for box in boxes])
    pipeline.feed_input("size", [np.array([box.height, box.width], np.int32) for box in boxes])
    pipeline.feed_input("mirror", [np.array(clip.flip and not clip.rotation, np.int32) for clip in clips])
    pipeline.schedule_run()


def reason_of(error: BaseException) -> str:
    """The line of DALI's message that says what is wrong, without its C++ traceback."""
    text = str(error).rpartition("encountered:")[2]
    text = re.sub(CLUTTER, "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".")[:LONGEST_REASON] if lines else type(error).__name__

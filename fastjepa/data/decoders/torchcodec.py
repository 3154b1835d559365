"""torchcodec in the loader processes: an optional package, faster where frames are cheap to decode (MJPEG).

It takes the tagged colour matrix where all others take BT.601, so that BT.709 files look slightly different with it.
"""

import os
from collections.abc import Sequence

import numpy as np

from fastjepa.data.decode import VideoInfo
from fastjepa.data.media import encoded, read_frames

INTRA_ONLY = ("mjpeg",)


def why_not() -> str:
    """Why torchcodec cannot be used here, one sentence; empty where it can."""
    try:
        import torchcodec.decoders  # noqa: F401
    except ImportError as error:
        return "torchcodec is not installed" if error.name == "torchcodec" else f"torchcodec does not load: {error}"
    except (RuntimeError, OSError) as error:  # it needs FFmpeg's shared libraries, and one version of torch
        return f"torchcodec does not load: {str(error).strip().splitlines()[0]}"
    return ""


def read_with_torchcodec(info: VideoInfo, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Frames with these numbers, in this order: uint8 [F, H, W, 3], RGB, as displayed.

    Where torchcodec counts other frames than `probe` did, has no times to go by (AVI with B-frames is off by one or
    two), or fails on a damaged place, PyAV reads instead: the same frames come out for every file. Images are read by
    Pillow. Errors: those of `read_frames`.
    """
    in_turn = info.codec in INTRA_ONLY  # nothing is reordered, so that no times are needed
    possible = (info.pts is not None or in_turn) and not info.still and not os.path.isdir(info.path)
    frames = _read(info, np.asarray(indices)) if possible else None
    return read_frames(info, indices) if frames is None else frames


def _read(info: VideoInfo, indices: np.ndarray) -> np.ndarray | None:
    from torchcodec.decoders import VideoDecoder

    try:
        source = info.path if os.path.isfile(info.path) else encoded(info.path).tobytes()  # a member of a shard
        decoder = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
        found = decoder.metadata
        if len(decoder) != info.frames or (found.height, found.width) != (info.height, info.width):
            return None
        return decoder.get_frames_at(indices.tolist()).data.numpy()
    except (RuntimeError, ValueError, IndexError):
        return None

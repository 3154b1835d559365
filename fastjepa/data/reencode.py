"""One video once more, as training reads it fastest: small pictures, close key frames, H.264, nothing else in the file.

What costs a decoder time is pixels and the way from a key frame to the clip. Without B-frames frames are stored in the
order in which they are shown, so that every decoder counts them alike. Pixels stay YUV on the way, with the matrix that
they have: `read_frames` sees the same colours before and after, in limited range afterwards.
"""

import os
import secrets
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from fastjepa.data import media
from fastjepa.data.decode import VideoError, VideoInfo

CLOCK = 90_000  # ticks a second in which uneven times are kept, as in most containers
ROUNDING = 0.1  # of the time of a frame: by less than this the times of a constant rate are off
UNKNOWN_RATE = 25  # frames/s of a video that does not say it
UNFINISHED = "part"  # the end of a name that nothing takes for a video


@dataclass(frozen=True)
class Recipe:
    """How videos are encoded. short_side: pixels, never more than the source has; gop: frames from one key frame to the
    next; quality: x264's constant rate factor, 1 to 51 (0 is lossless, which no GPU decodes)."""

    short_side: int = 256
    gop: int = 16
    quality: int = 23


@dataclass(frozen=True)
class Made:
    """What came of a video: frames and bytes of the new file."""

    frames: int
    size: int


def reencode(source: str, target: str, recipe: Recipe, scratch_folder: str | None = None) -> Made:
    """Write the video once more, by rename. Frames keep their number, order and times; sound goes.

    `scratch_folder`: where it lies until it is whole, on the same disk; that of the target by default. Errors:
    VideoError where the source cannot be read or the new file does not hold all of its frames; OSError.
    """
    info = media.probe(source)
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    scratch = os.path.join(scratch_folder or folder, f"{secrets.token_hex(6)}.{UNFINISHED}")
    try:
        _encode(info, scratch, recipe)
        found = media.probe(scratch)
        if found.frames != info.frames:
            raise VideoError(f"the new file has {found.frames} frames of {info.frames}", source)
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        size = os.path.getsize(scratch)
        os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return Made(info.frames, size)


def size_of(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) of the new pictures, as displayed: even, as 4:2:0 needs, and not larger than before."""
    scale = min(1.0, short_side / min(width, height))
    wide, high = (max(2, min(round(side * scale / 2) * 2, side // 2 * 2)) for side in (width, height))
    return wide, high


def _encode(info: VideoInfo, path: str, recipe: Recipe) -> None:
    # One thread: files are what is done in parallel. Without entropy coding by arithmetic and without a filter at the
    # edges of blocks (fastdecode) a processor decodes far faster, for some more bytes.
    options = {
        "preset": "veryfast",
        "tune": "fastdecode",
        "crf": str(recipe.quality),
        "threads": "1",
        "x264-params": f"keyint={recipe.gop}:min-keyint={recipe.gop}:scenecut=0:open-gop=0:bframes=0",
    }
    container = {"movflags": "+faststart", "fflags": "+bitexact"}
    width, height = size_of(info.width, info.height, recipe.short_side)
    draw = _Painter(info, width, height)
    with (
        closing(media.frames_in_order(info)) as frames,
        av.open(f"file:{path}", "w", format="mp4", container_options=container) as out,
    ):
        rate = info.rate or Fraction(UNKNOWN_RATE)
        tick = _tick(info, rate)
        stream = out.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = tick
        stream.codec_context.color_range = ColorRange.MPEG
        for number, (frame, time) in enumerate(zip(frames, _ticks(info, tick))):
            picture = draw(frame)
            if number == 0:  # the tag goes on as it was: what goes by it and what does not see the same as before
                stream.codec_context.colorspace = picture.colorspace
            picture.pts, picture.time_base = time, tick
            picture.pict_type = PictureType.NONE  # a key frame of the source would become one here
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))


def _tick(info: VideoInfo, rate: Fraction) -> Fraction:
    """The clock of the new file, in s: of a constant rate that of the frames, so that it stays exactly what it is.

    Constant is what a rounded clock (milliseconds in Matroska) makes of it, too.
    """
    even = info.times is None or np.abs(info.times * float(rate) - np.arange(info.frames)).max() < ROUNDING
    return 1 / rate if even else Fraction(1, CLOCK)


def _ticks(info: VideoInfo, tick: Fraction) -> list[int]:
    """When each frame is shown, ascending, in ticks of the new file from the first one on."""
    times = np.arange(info.frames) * float(tick) if info.times is None else info.times
    ticks = np.round(times / float(tick)).astype(np.int64)
    # Of frames that are shown at the same tick the later ones come a tick later: strictly ascending, as a file needs.
    places = np.arange(info.frames)
    return (np.maximum.accumulate(ticks - places) + places).tolist()


class _Painter:
    """From a decoded frame to yuv420p in limited range: scaled and upright, with the matrix that it has.

    What is not YUV goes by the RGB that `read_frames` shows, and back by the matrix that it assumes.
    """

    def __init__(self, info: VideoInfo, width: int, height: int) -> None:
        self.turns = -info.rotation // 90  # np.rot90 turns counterclockwise
        self.width, self.height = (width, height) if info.rotation % 180 == 0 else (height, width)
        self.scaler, self.to_rgb = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        matrix = frame.colorspace
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        if not frame.format.name.startswith("yuv"):
            frame = self.to_rgb.reformat(frame, format="rgb24", src_colorspace=Colorspace.ITU601, threads=1)
            matrix = Colorspace.ITU601
        picture = self.scaler.reformat(
            frame,
            width=self.width,
            height=self.height,
            format="yuv420p",
            # Both the same, so that no matrix is applied between YUV and YUV.
            src_colorspace=Colorspace.ITU601,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        if self.turns:
            picture = _turned(picture, self.turns)
        picture.colorspace, picture.color_range = matrix, ColorRange.MPEG
        return picture


def _turned(picture: VideoFrame, turns: int) -> VideoFrame:
    """yuv420p, turned by so many quarters, counterclockwise."""
    height, width = picture.height, picture.width
    flat = picture.to_ndarray().reshape(-1)
    y, u, v = np.split(flat, [height * width, height * width * 5 // 4])
    planes = [y.reshape(height, width), u.reshape(height // 2, width // 2), v.reshape(height // 2, width // 2)]
    turned = [np.ascontiguousarray(np.rot90(plane, turns)) for plane in planes]
    rows, columns = turned[0].shape
    return VideoFrame.from_ndarray(
        np.concatenate([plane.reshape(-1) for plane in turned]).reshape(rows * 3 // 2, columns), format="yuv420p"
    )

"""Video files on the CPU: find out what a file holds, and read chosen frames of it.

Frame `i` of a video is the i-th frame that a plain decode from start to end delivers, whatever way it is reached:

* A header may lie about the number of frames, so `probe` counts packets. Left out are those that no decoder delivers:
  packets before the start of an edit list, one cut short by the end of the file, hidden VP8 frames, and in a
  seekable file all before the first frame that can be decoded (a file cut in the middle of a group of pictures).
* Where presentation times can be trusted a frame is known by its time. This allows seeking, and in a damaged file
  everything keeps its place: a lost frame leaves a hole, which the nearest earlier frame fills as in a player.
  Elsewhere a frame is known by its turn: in a damaged file of that kind later frames move up and the last one is
  repeated.
* Damaged packets are skipped. Whether a file is readable is decided by `probe`, which has seen a frame come out.

H, W: height and width of the picture as displayed; F: number of frames asked for.
"""

import errno
import operator
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream

# Playlists (HLS, DASH, ffconcat) are formats to libav as well, whatever a file is called, and would make it open other
# files.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mxf"
# AVI stores no presentation times, and transport streams no index: libav guesses both.
SEEKABLE = {"mov", "mp4", "matroska", "webm"}
# Reasons that lie outside the file: they may be gone another time although it did not change.
NO_PERMISSION = "there is no permission to read the file"
NOT_REACHED = "the file cannot be reached"
NOT_OPENED = "it cannot be opened"


class VideoError(ValueError):
    """A file that cannot be used. `str(error)` is one sentence without the path; `path` holds the path."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason)  # one argument: pickle, and the data loader of torch, build it again from that
        self.path = path


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` found out about a file; picklable."""

    path: str
    frames: int  # counted, never the container's claim
    width: int  # as displayed, after rotation
    height: int
    rate: Fraction | None  # average, frames/s
    codec: str
    pixel_format: str
    rotation: int  # degrees clockwise that `read_frames` applies: 0, 90, 180 or 270
    duration: float | None  # seconds from the first frame to the end of the last, by the frames that were counted
    key_frames: int  # frames where decoding can start, at least 1
    pts: np.ndarray | None = field(default=None, compare=False, repr=False)
    """int64 [frames], ascending: when each frame is shown, in the stream's time base. None: read in order."""
    keys: np.ndarray | None = field(default=None, compare=False, repr=False)
    """int64, ascending: numbers of the frames where decoding can start. None where `pts` is."""
    time_base: Fraction | None = field(default=None, compare=False, repr=False)
    """Seconds of one step of `pts`. None where `pts` is."""
    still: bool = False  # a single image: a clip of it repeats its only frame
    unshown: int = 0  # packets that are references only and no frames (VP8): not every decoder leaves them out

    @property
    def times(self) -> np.ndarray | None:
        """When each frame is shown, float64 [frames] in s from the first one on; None where nothing tells.

        By the rate where there are no times, as every player has it.
        """
        if self.pts is not None and self.time_base is not None:
            return (self.pts - self.pts[0]) * float(self.time_base)
        return None if self.rate is None else np.arange(self.frames) / float(self.rate)


def probe(path: str | os.PathLike[str], content: BinaryIO | None = None) -> VideoInfo:
    """Count the frames of a video file, decode the first one, and describe it.

    Reads the whole file once without decoding it. With `content` the video is what can be read there, and `path` is
    only its name. Raises VideoError, for a missing or unreadable path too.
    """
    name = os.fspath(path)
    first: VideoFrame | None = None
    counted: list[tuple[int | None, bool]] = []  # time, key frame or not
    cut, unshown = False, 0
    with opened(name, content) as (container, stream):
        for packet in packets_of(container, stream):
            if first is None:
                first = next(iter(decode_packet(stream, packet)), None)
            unshown += is_hidden(stream, packet)
            if packet.is_discard or is_hidden(stream, packet):
                continue
            counted.append((packet.pts, packet.is_keyframe))
            cut = packet.is_corrupt
        if cut:  # the last packet is not whole; elsewhere this mark may only mean that the one before was lost
            counted.pop()
        if first is None:
            first = next(iter(decode_packet(stream, None)), None)
        if not counted:
            raise VideoError("it has a video stream without any whole frame", name)
        if first is None:
            raise VideoError("none of its frames can be decoded", name)

        frames, starts = len(counted), None
        key_frames = sum(key for _, key in counted)
        pts = _ascending([time for time, _ in counted]) if SEEKABLE & set(container.format.name.split(",")) else None
        if (
            pts is None or first.pts is None or first.pts not in pts
        ):  # if it is not there the decoder keeps another clock
            pts = None
        else:
            pts = pts[np.searchsorted(pts, first.pts) :]
            starts = np.flatnonzero(np.isin(pts, [time for time, key in counted if key and time is not None]))
            frames, key_frames = len(pts), len(starts)
        rotation = round(-first.rotation / 90) * 90 % 360  # the display matrix turns counterclockwise
        width, height = (first.width, first.height) if rotation % 180 == 0 else (first.height, first.width)
        found = stream.average_rate or stream.guessed_rate
        rate = Fraction(found.numerator, found.denominator) if found else None
        return VideoInfo(
            path=name,
            frames=frames,
            width=width,
            height=height,
            rate=rate,
            codec=stream.codec.canonical_name,
            pixel_format=first.format.name,
            rotation=rotation,
            duration=_duration(frames, rate, pts, stream),
            key_frames=max(1, key_frames),
            pts=pts,
            keys=starts,
            time_base=None if pts is None else stream.time_base,
            unshown=unshown,
        )


def read_frames(info: VideoInfo, indices: Sequence[int] | np.ndarray, content: BinaryIO | None = None) -> np.ndarray:
    """Read the frames with these numbers, in this order: uint8 [F, H, W, 3], RGB.

    Numbers may repeat. A frame that is damaged beyond decoding is replaced by the nearest earlier one, or at the
    start of the file by the next one. With `content` the video is read from there, as in `probe`. Raises ValueError
    for a number outside 0..frames-1 or an empty list, VideoError if the file is no longer what `probe` saw and nothing
    can be decoded.
    """
    wanted = frame_numbers(info, indices)
    convert = _Converter(info)
    missing = sorted(set(wanted))
    images: dict[int, np.ndarray] = {}
    if info.pts is not None and info.keys is not None:
        images = _read_by_time(info, info.pts, info.keys, missing, convert, content)
        missing = [i for i in missing if i not in images]
    if missing:
        images |= _read_in_order(info, missing, convert, content)
    return np.stack([images[i] for i in wanted])


def frame_numbers(info: VideoInfo, indices: Sequence[int] | np.ndarray) -> list[int]:
    """The numbers as a list. Errors: ValueError for none, or one outside 0..frames-1; TypeError for no whole number."""
    wanted = [operator.index(i) for i in indices]
    if not wanted:
        raise ValueError("no frame was asked for")
    for i in wanted:
        if not 0 <= i < info.frames:
            raise ValueError(f"frame {i} does not exist: the video has frames 0 to {info.frames - 1}")
    return wanted


def _read_by_time(
    info: VideoInfo,
    pts: np.ndarray,
    keys: np.ndarray,
    wanted: list[int],
    convert: "_Converter",
    content: BinaryIO | None,
) -> dict[int, np.ndarray]:
    """Seek to the frames; those that do not turn up are absent from the answer. `wanted` is ascending."""
    groups = np.maximum(np.searchsorted(keys, wanted, side="right") - 1, 0)
    # Decode straight on into the next group of pictures, but seek over groups nobody wants anything from.
    runs = np.split(np.asarray(wanted), np.flatnonzero(np.diff(groups) > 1) + 1)
    images: dict[int, np.ndarray] = {}
    with opened(info.path, content) as (container, stream):
        for run in runs:
            need = {int(pts[i]): int(i) for i in run}
            last = int(pts[run[-1]])
            group = int(np.searchsorted(keys, run[0], side="right")) - 1
            if group > 0:
                # The time of the key frame itself, not of the wanted frame: mp4 seeks by decoding time, and the next
                # key frame can be decoded before the time at which a wanted frame ahead of it is shown.
                try:
                    container.seek(int(pts[keys[group]]), stream=stream)
                except av.FFmpegError:  # no usable index: the caller reads in order
                    break
            for frame in _frames(container, stream):
                number = need.pop(frame.pts, None) if frame.pts is not None else None
                if number is not None:
                    images[number] = convert(frame)
                if not need or (frame.pts is not None and frame.pts > last):
                    break
    return images


def _read_in_order(
    info: VideoInfo, wanted: list[int], convert: "_Converter", content: BinaryIO | None
) -> dict[int, np.ndarray]:
    """Decode from the start of the file up to the last frame that is wanted."""
    images: dict[int, np.ndarray] = {}
    missing = set(wanted)
    with closing(frames_in_order(info, content)) as frames:
        for number, frame in enumerate(frames):
            if number in missing:
                images[number] = convert(frame)
                missing.remove(number)
                if not missing:
                    break
    return images


def frames_in_order(info: VideoInfo, content: BinaryIO | None = None) -> Generator[VideoFrame, None, None]:
    """All frames of a video as they are decoded, one for each number from 0 on.

    A frame that is damaged beyond decoding is replaced by the nearest earlier one, or at the start of the file by the
    next one. Raises VideoError if nothing can be decoded.
    """
    number, position = 0, -1
    previous: VideoFrame | None = None
    with opened(info.path, content) as (container, stream):
        for frame in _frames(container, stream):
            if info.pts is None:
                position += 1
            elif frame.pts is None or frame.pts < info.pts[0]:
                continue
            else:
                position = int(np.searchsorted(info.pts, frame.pts, side="right")) - 1
            while number <= position:
                yield frame if number == position or previous is None else previous
                number += 1
                if number == info.frames:
                    return
            previous = frame
        if previous is None:
            raise VideoError("none of its frames can be decoded", info.path)
        while number < info.frames:
            yield previous
            number += 1


class _Converter:
    """From a decoded frame to uint8 RGB [H, W, 3] as displayed. Keeps the scaler's tables between frames.

    The matrix is BT.601 whatever the file says: the decoder of the published code (decord, with swscale's defaults)
    and the GPU decoder (DALI) know no other, while PyAV left to itself follows the tag, so that the same BT.709 file
    would look different on a GPU and a CPU. The range is the file's own (limited unless it says full), as all of them
    have it.
    """

    def __init__(self, info: VideoInfo) -> None:
        self.turns = -info.rotation // 90  # np.rot90 turns counterclockwise
        upright = info.rotation % 180 == 0
        # A stream may change its size on the way; the answer is one array, so the size of the first frame holds.
        self.width, self.height = (info.width, info.height) if upright else (info.height, info.width)
        self.reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        picture = self.reformatter.reformat(
            frame,
            width=self.width,
            height=self.height,
            format="rgb24",
            src_colorspace=Colorspace.ITU601,
            threads=1,  # the default is a thread for each core, in each worker
        )
        return np.rot90(picture.to_ndarray(), self.turns)


@contextmanager
def opened(path: str, content: BinaryIO | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the best video stream of a regular local file, or of what `content` holds; raises VideoError."""
    if content is None:
        check_file(path)
    else:
        content.seek(0)
    try:
        # "file:" keeps a name such as "concat:a" from being taken for a protocol; bytes need no protocol at all.
        container = av.open(
            f"file:{path}" if content is None else content,
            "r",
            metadata_errors="replace",
            options={
                "protocol_whitelist": "file" if content is None else "none",
                "format_whitelist": CONTAINERS,
            },
        )
    except av.FFmpegError as error:
        raise VideoError(_opening_error(error), path) from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            raise VideoError("it has no video stream", path)
        if stream.codec_context is None:
            raise VideoError("there is no decoder for its video codec", path)
        # With frame threads the end of a damaged file is lost without an error; workers are the parallelism here.
        stream.codec_context.thread_count = 1
        yield container, stream


def check_file(path: str) -> os.stat_result:
    """Raise VideoError for all that is not a regular file with something in it, before libav could block on it."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        reason = "it is a link to a file that does not exist" if os.path.islink(path) else "the file does not exist"
        raise VideoError(reason, path) from error
    except OSError as error:
        raise VideoError(f"{NOT_REACHED}: {error.strerror}", path) from error
    except ValueError as error:  # a null byte, or a character that no file name has
        raise VideoError("this is not a possible file name", path) from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError("it is a folder, not a file", path)
    if not stat.S_ISREG(status.st_mode):
        raise VideoError("it is not a regular file", path)
    if status.st_size == 0:
        raise VideoError("the file is empty", path)
    return status


def _opening_error(error: av.FFmpegError) -> str:
    if isinstance(error, PermissionError):
        return NO_PERMISSION
    if isinstance(error, av.InvalidDataError):
        return "it is not a video file, or its header is damaged"
    if error.errno == errno.EINVAL:  # what libav says of a format outside the list
        return "it is not in a video container (a playlist, an image or a raw stream)"
    return f"{NOT_OPENED}: {error.strerror}"


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream. A file that breaks off ends there: what came before it is a video still."""
    try:
        for packet in container.demux(stream):
            if packet.size:  # an empty packet would end the decoder
                yield packet
    except av.FFmpegError:
        return


def decode_packet(stream: VideoStream, packet: av.Packet | None) -> list[VideoFrame]:
    """The frames that a packet sets free, or with None those still held back; none if the packet is damaged."""
    try:
        return stream.codec_context.decode(packet)
    except av.FFmpegError:
        return []


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for packet in packets_of(container, stream):
        yield from decode_packet(stream, packet)
    yield from decode_packet(stream, None)


def is_hidden(stream: VideoStream, packet: av.Packet) -> bool:
    """Is this a VP8 frame that only serves as a reference? WebM stores those in packets of their own."""
    return stream.codec.canonical_name == "vp8" and not memoryview(packet)[0] & 0x10


def _duration(frames: int, rate: Fraction | None, pts: np.ndarray | None, stream: VideoStream) -> float | None:
    """Seconds. By the times of the frames where there are any, as headers lie about this too; else by the rate."""
    if pts is not None and frames > 1 and stream.time_base is not None:
        return float(int(pts[-1] - pts[0]) * Fraction(stream.time_base) * Fraction(frames, frames - 1))
    return float(frames / rate) if rate else None


def _ascending(times: list[int | None]) -> np.ndarray | None:
    """Times in ascending order, int64; None if one is absent or occurs twice."""
    if None in times or len(set(times)) < len(times):
        return None
    return np.sort(np.asarray(times, dtype=np.int64))

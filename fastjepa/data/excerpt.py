"""The packets of a video that some of its frames need, as a small video of its own; nothing is decoded.

A decoder that starts at the beginning of what it is given then has only those groups of pictures to decode, and the
rest of a file of any length need not be in memory.

T: frames of a clip.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from fastjepa.data.decode import VideoInfo, decode_packet, frame_numbers, is_hidden, opened, packets_of
from fastjepa.data.media import encoded, status
from fastjepa.data.shards import opened_member, split_name

LARGEST = 256 << 20  # bytes of a piece: a loader process holds several
# A millisecond is the clock of Matroska, in which the real times of two frames may fall together. Decoders go by the
# order of the times alone.
CLOCK, STEP = Fraction(1, 1000), 40

Timed = tuple[int, av.Packet]


def excerpt(info: VideoInfo, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A piece of a video with these frames, int64 [T], in it, and their numbers there.

    Returns (uint8 [bytes], int64 [T]): a Matroska file that begins with a key frame and ends with the last packet that
    is needed, in which frame i is the i-th that a decode delivers. A video without times (AVI) is handed over whole.
    None where no piece is known to be right, or none of at most `LARGEST` bytes: such frames are to be read by
    `media.read_frames`, which looks at what is decoded. Errors: ValueError for a number outside 0..frames-1, an empty
    list or a codec that Matroska does not know, VideoError where the file can no longer be read.
    """
    wanted = frame_numbers(info, frames)
    if info.pts is None or info.keys is None:
        return (encoded(info.path), np.array(wanted)) if status(info.path)[0] <= LARGEST else None
    with _opened(info.path) as (container, stream):
        needed = _needed(container, stream, info.pts, info.keys, wanted)
        if needed is None or _discarded_between(needed, int(info.pts[max(wanted)])):
            return None
        # What an edit list discards is shown, too: the piece has no such list.
        times = sorted(time for time, packet in needed if not is_hidden(stream, packet))
        if len(set(times)) < len(times):
            return None
        return _remuxed(stream, needed), np.searchsorted(times, info.pts[wanted])


@contextmanager
def _opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    _, member = split_name(path)
    with opened_member(path) if member else nullcontext() as content, opened(path, content) as both:
        yield both


def _needed(
    container: InputContainer, stream: VideoStream, pts: np.ndarray, keys: np.ndarray, wanted: list[int]
) -> list[Timed] | None:
    """The packets from the last key frame before the wanted frames on, in decoding order; None where that fails."""
    group = int(np.searchsorted(keys, min(wanted), side="right")) - 1
    first = int(keys[group]) if group >= 0 else 0
    # Those between, too: where a wanted frame is damaged, the nearest earlier one stands for it.
    missing = set(pts[first : max(wanted) + 1].tolist())
    start, last = int(pts[first]), int(pts[max(wanted)])
    if group > 0:
        try:
            container.seek(start, stream=stream)
        except av.FFmpegError:  # no usable index
            return None
    taken: list[Timed] = []
    size = 0
    for packet in packets_of(container, stream):
        time = packet.pts
        if time is None or packet.has_sidedata("new_extradata"):  # Matroska has one header for all packets
            return None
        if not taken:
            if time > last:
                return None
            # Before the first key frame of a file stand only those that its edit list discards.
            if not packet.is_keyframe or not (packet.is_discard if group < 0 else time == start):
                continue
            if not _starts_at(stream, packet):
                return None
        elif time < taken[0][0]:  # shown before the key frame: it refers to what came before that
            continue
        taken.append((time, packet))
        size += packet.size
        if size > LARGEST:
            return None
        if not packet.is_discard and not is_hidden(stream, packet):
            missing.discard(time)
        if not missing:
            return taken
    return None


def _starts_at(stream: VideoStream, packet: av.Packet) -> bool:
    """Does this key frame give a picture? In H.264 with intra refresh it only begins to build one up."""
    if stream.codec.canonical_name != "h264":
        return True
    header, data, place = stream.codec_context.extradata or b"", memoryview(packet), 0
    if header[:1] == b"\1":
        length = (header[4] & 3) + 1  # bytes of the size in front of each unit
        while place + length < len(data):
            if data[place + length] & 31 == 5:  # an IDR slice
                return True
            place += length + int.from_bytes(data[place : place + length])
    return bool(decode_packet(stream, packet) or decode_packet(stream, None))


def _discarded_between(packets: list[Timed], last: int) -> bool:
    """Does an edit list discard anything from amidst the frames? Then times do not tell the order of the packets."""
    first = min(time for time, packet in packets if not packet.is_discard)
    return any(packet.is_discard and first < time < last for time, packet in packets)


def _remuxed(stream: VideoStream, packets: list[Timed]) -> np.ndarray:
    """uint8 [bytes]: a Matroska file of the packets, in their order. Their times are changed."""
    ranks = {time: rank for rank, time in enumerate(sorted({time for time, _ in packets}))}
    out = BytesIO()
    # Without the filters that libav adds of itself, which join a damaged VP9 packet to the next one, and without date
    # and random numbers.
    options = {"avoid_negative_ts": "disabled", "fflags": "-autobsf+bitexact"}
    with av.open(out, "w", format="matroska", options=options) as container:
        copy = container.add_stream_from_template(stream, opaque=True)  # without an encoder, which it may not have
        for place, (time, packet) in enumerate(packets, start=-len(packets)):
            # Decoding times are not stored, but must ascend and never be later than the time of showing.
            packet.dts, packet.pts, packet.time_base = place * STEP, ranks[time] * STEP, CLOCK
            packet.duration, packet.stream = STEP, copy
            container.mux(packet)
    return np.frombuffer(out.getbuffer(), np.uint8)

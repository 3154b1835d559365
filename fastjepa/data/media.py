"""What a name stands for, and how it is read: a video file, an image, a folder of frames, or a member of a shard.

A member is a video or an image (`/path/shard-000.tar::clips/a.mp4`); folders of frames are not looked for in shards.
"""

import os
from collections.abc import Generator, Sequence

import numpy as np
from av.video.frame import VideoFrame

from fastjepa.data import decode, images, shards, tables
from fastjepa.data.decode import VideoError, VideoInfo

AT_ONCE = 64  # frames of a folder that are in memory together: each call lists the folder


def probe(name: str | os.PathLike[str]) -> VideoInfo:
    """Find out what a name holds, and decode a frame of it.

    Errors: VideoError, for a missing or unreadable file too.
    """
    name = os.fspath(name)
    shard, member = shards.split_name(name)
    if member:
        with shards.opened_member(name) as content:
            return images.probe_image(name, content) if images.is_image(member) else decode.probe(name, content)
    if os.path.isdir(name):
        return images.probe_frames(name)
    if shards.is_shard(shard):
        raise VideoError(_not_a_video(shard), name)
    return images.probe_image(name) if images.is_image(name) else decode.probe(name)


def read_frames(info: VideoInfo, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Frames with these numbers, in this order: uint8 [F, H, W, 3], RGB; those of an image may share their memory.

    Errors: as `decode.read_frames`.
    """
    _, member = shards.split_name(info.path)
    if member:
        with shards.opened_member(info.path) as content:
            read = images.read_image if info.still else decode.read_frames
            return read(info, indices, content)
    if info.still:
        return images.read_image(info, indices)
    return images.read_frame_files(info, indices) if os.path.isdir(info.path) else decode.read_frames(info, indices)


def frames_in_order(info: VideoInfo) -> Generator[VideoFrame, None, None]:
    """All frames of a video as they are decoded, one for each number from 0 on. Errors: as `decode.frames_in_order`."""
    _, member = shards.split_name(info.path)
    if info.still or os.path.isdir(info.path):
        read = images.read_image if info.still else images.read_frame_files
        for first in range(0, info.frames, AT_ONCE):
            for picture in read(info, range(first, min(first + AT_ONCE, info.frames))):
                yield VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    elif member:
        with shards.opened_member(info.path) as content:
            yield from decode.frames_in_order(info, content)
    else:
        yield from decode.frames_in_order(info)


def encoded(name: str) -> np.ndarray:
    """The whole encoded video: uint8 [bytes]. Errors: VideoError, for images and folders of frames too."""
    shard, member = shards.split_name(name)
    if images.is_image(member or name):
        raise VideoError("it is an image, not an encoded video", name)
    if member:
        with shards.opened_member(name) as content:
            return np.array(np.frombuffer(content.read(), np.uint8))  # a copy, that may be written to
    if shards.is_shard(shard):
        raise VideoError(_not_a_video(shard), name)
    decode.check_file(name)
    try:
        return np.fromfile(name, np.uint8)
    except PermissionError as error:
        raise VideoError(decode.NO_PERMISSION, name) from error
    except OSError as error:
        raise VideoError(f"{decode.NOT_REACHED}: {error.strerror}", name) from error


def status(name: str) -> tuple[int, int]:
    """(size in bytes, mtime_ns), which tell whether it is the same; opens no video. Errors: VideoError.

    A member has the time of its shard, a folder of frames the sum and the latest time of its images.
    """
    if shards.split_name(name)[1]:
        return shards.member_status(name)
    if os.path.isdir(name):
        return images.frames_status(name)
    found = decode.check_file(name)
    return found.st_size, found.st_mtime_ns


def absolute(name: str) -> str:
    """The name with an absolute path."""
    return shards.on_path(os.path.abspath, name)


def _not_a_video(shard: str) -> str:
    """Why a shard itself stands among the videos: it is there only to be named, its readable members stand before it.

    Errors: VideoError.
    """
    return tables.table(shard).reason or "it is an archive, not a video"

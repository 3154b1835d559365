"""Ways of reading the frames of a clip from a video file, and whether they read the same."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import av
import numpy as np

from fastjepa.data.decode import VideoInfo, probe, read_frames
from fastjepa.data.decoders.torchcodec import read_with_torchcodec, why_not
from fastjepa.data.frames import segment_frames
from fastjepa.data.sampling import Augmentation, ClipDraw, ClipPlan

Read = Callable[[np.ndarray], np.ndarray]  # frame numbers int64 [T] to uint8 [T, H, W, 3], RGB
FRAMES, STRIDE = 16, 4
PUBLISHED = Augmentation()
SAME = 2.0  # mean grey levels of a frame: colour conversions differ by about one, neighbouring frames by several
PLAIN = "PyAV from the start"
OURS, NEW, OURS_TORCHCODEC = "fastjepa", "fastjepa, new video", "fastjepa with torchcodec"
TORCHCODEC = {"torchcodec": "exact", "torchcodec, approximate": "approximate"}
DECORD = "decord"
# Ways that must read the right frames: a wrong one is a mistake of this project.
MUST_BE_RIGHT = (OURS, NEW, OURS_TORCHCODEC, PLAIN)


class Apart(NamedTuple):
    """How a way's frames differ from ours: mean grey levels of the most different right one, share of wrong ones."""

    levels: float
    wrong: float


def draws(info: VideoInfo, count: int, augmentation: Augmentation = PUBLISHED) -> list[ClipDraw]:
    """What a training run cuts out of this video, so many times; the same in every session."""
    plan = ClipPlan(0, np.arange(1), FRAMES, STRIDE, (0.3, 1.0), (0.75, 1.35), True, augmentation)
    return [plan.clip(slot, info.frames, info.height, info.width) for slot in range(count)]


def spaced(info: VideoInfo, count: int) -> list[np.ndarray]:
    """Frame numbers of so many clips, evenly spaced over the places that a training run draws from.

    What is decoded for a clip goes by its place: clips by chance would favour one way of reading or another.
    """
    window = FRAMES * STRIDE
    ends = window + ((np.arange(count) + 0.5) / count * (info.frames - window)).astype(int)
    return [segment_frames(info.frames, FRAMES, STRIDE, int(end)) for end in ends]


def readers(info: VideoInfo) -> tuple[dict[str, Read], dict[str, str]]:
    """Ways of reading this video, by name, ours first; and by name why others cannot run here.

    A run that sees a video again knows what is in it ("fastjepa"); the first time it finds out ("fastjepa, new video").
    torchcodec finds out each time a file is opened, or with "approximate" believes its header.
    """
    ways: dict[str, Read] = {
        OURS: lambda frames: read_frames(info, frames),
        NEW: lambda frames: read_frames(probe(info.path), frames),
        PLAIN: lambda frames: read_plainly(info.path, frames),
    }
    lacking: dict[str, str] = {}
    if reason := why_not():
        lacking |= dict.fromkeys((OURS_TORCHCODEC, *TORCHCODEC), reason)
    else:
        ways[OURS_TORCHCODEC] = lambda frames: read_with_torchcodec(info, frames)
        ways |= _torchcodec(info)
    try:
        import decord
    except (ImportError, OSError) as error:
        lacking[DECORD] = f"decord does not load: {str(error).strip().splitlines()[0]}"
    else:
        ways[DECORD] = lambda frames: decord.VideoReader(info.path, num_threads=1).get_batch(frames).asnumpy()
    return ways, lacking


def _torchcodec(info: VideoInfo) -> dict[str, Read]:
    from torchcodec.decoders import VideoDecoder

    def read_with(mode: str) -> Read:
        def read(frames: np.ndarray) -> np.ndarray:
            decoder = VideoDecoder(info.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
            return decoder.get_frames_at(frames.tolist()).data.numpy()

        return read

    return {name: read_with(mode) for name, mode in TORCHCODEC.items()}


def read_plainly(path: str, frames: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3]: the loop that anyone would write, from the first frame of the file to the last one wanted."""
    wanted, images = set(frames.tolist()), {}
    with av.open(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                images[number] = frame.to_ndarray(format="rgb24")
            if len(images) == len(wanted):
                break
    return np.stack([images[number] for number in frames.tolist()])


def differences(ways: Mapping[str, Read], clips: Sequence[np.ndarray]) -> dict[str, Apart]:
    """What each way reads beside the plain decode from the start of the file, frame by frame.

    A frame that differs by more than another colour conversion explains is another frame. Errors: ValueError where a
    way has one that must be right; others are measured with their share of wrong frames.
    """
    levels: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for frames in clips:
        right = ways[PLAIN](frames).astype(np.int16)
        for name, read in ways.items():
            apart = np.abs(read(frames) - right).mean(axis=(1, 2, 3))
            if name in MUST_BE_RIGHT and apart.max() > SAME:
                raise ValueError(
                    f"{name}: frames {frames.tolist()} differ from {PLAIN} by {apart.max():.1f} grey levels"
                )
            levels[name].append(apart)
    found = {name: np.concatenate(parts) for name, parts in levels.items()}
    return {name: Apart(float(a[a <= SAME].max(initial=0.0)), float((a > SAME).mean())) for name, a in found.items()}


def frames_decoded(info: VideoInfo, frames: np.ndarray, way: str) -> int:
    """Frames that have to be decoded for a clip: from the file's first one for the plain loop, or a key frame on."""
    start = 0
    if way != PLAIN and info.keys is not None:
        start = int(info.keys[np.searchsorted(info.keys, frames.min(), side="right") - 1])
    return int(frames.max()) - start + 1

"""Ways of reading the frames of a clip from a video file, and whether they read the same."""

from collections.abc import Callable, Mapping, Sequence

import av
import numpy as np

from fastjepa.data.decode import VideoInfo, probe, read_frames
from fastjepa.data.frames import segment_frames
from fastjepa.data.sampling import Augmentation, ClipDraw, ClipPlan

Read = Callable[[np.ndarray], np.ndarray]  # frame numbers int64 [T] to uint8 [T, H, W, 3], RGB
FRAMES, STRIDE = 16, 4
PUBLISHED = Augmentation()
SAME = 2.0  # mean grey levels of a frame: colour conversions differ by about one, neighbouring frames by several
PLAIN = "PyAV from the start"
TORCHCODEC = {"torchcodec": "exact", "torchcodec, approximate": "approximate"}


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
        "fastjepa": lambda frames: read_frames(info, frames),
        "fastjepa, new video": lambda frames: read_frames(probe(info.path), frames),
        PLAIN: lambda frames: read_plainly(info.path, frames),
    }
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError:
        return ways, dict.fromkeys(TORCHCODEC, "torchcodec is not installed")
    except (RuntimeError, OSError) as error:  # it needs FFmpeg's shared libraries, and one version of torch
        return ways, dict.fromkeys(TORCHCODEC, f"torchcodec does not load: {str(error).strip().splitlines()[0]}")

    def read_with(mode: str) -> Read:
        def read(frames: np.ndarray) -> np.ndarray:
            decoder = VideoDecoder(info.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
            return decoder.get_frames_at(frames.tolist()).data.numpy()

        return read

    return ways | {name: read_with(mode) for name, mode in TORCHCODEC.items()}, {}


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


def differences(ways: Mapping[str, Read], clips: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean grey levels by which each way's most different frame differs from that of the first way.

    Errors: ValueError where that is more than another colour conversion explains: it is another frame.
    """
    first, *others = ways
    worst = dict.fromkeys(others, 0.0)
    for frames in clips:
        ours = ways[first](frames).astype(np.int16)
        for name in others:
            apart = float(np.abs(ways[name](frames) - ours).mean(axis=(1, 2, 3)).max())
            if apart > SAME:
                raise ValueError(f"{name}: frames {frames.tolist()} differ from {first}'s by {apart:.1f} grey levels")
            worst[name] = max(worst[name], apart)
    return worst


def frames_decoded(info: VideoInfo, frames: np.ndarray, way: str) -> int:
    """Frames that have to be decoded for a clip: from the file's first one for the plain loop, or a key frame on."""
    start = 0
    if way != PLAIN and info.keys is not None:
        start = int(info.keys[np.searchsorted(info.keys, frames.min(), side="right") - 1])
    return int(frames.max()) - start + 1

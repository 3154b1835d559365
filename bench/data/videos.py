"""Videos to measure with, made in a session: textures that move, with objects in front and the noise of a sensor.

Flat colours would cost next to no bits, and no time to decode. These come to about what videos of their size have on
the web; what they have is in the result file.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np

# Frames by size: 340 x 256 is the short side of a published pretraining set. Ten seconds; four of the large.
SIZES = {"340x256": 300, "640x360": 300, "1280x720": 120}
GOPS = (12, 250)  # frames from one key frame to the next: of a camera, and the most that x264 takes by default
RATE = 30
ENCODER = {"preset": "veryfast", "crf": "26", "sc_threshold": "0"}  # no further key frames
# Other codecs, as files of one size and group of pictures: encoder, its options, pixels, the end of the file's name.
CODECS = {
    "hevc": ("libx265", {"preset": "veryfast", "x265-params": "log-level=error:scenecut=0"}, "yuv420p", "mp4"),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "36", "b": "0"}, "yuv420p", "webm"),
    "av1": ("libsvtav1", {"preset": "12", "crf": "40"}, "yuv420p", "mkv"),
    "mjpeg": ("mjpeg", {"qmin": "5", "qmax": "5"}, "yuvj420p", "avi"),
}
CODED_SIZE, CODED_GOP, CODED_FRAMES = "340x256", 12, 150
OBJECTS = 3
GRAIN, MARGIN = 1.5, 64  # grey levels; pixels by which one noise is moved from frame to frame


class Shelf:
    """The videos in a folder, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, size: str, gop: int) -> Path:
        """The file of this size ("340x256") and group of pictures. Its siblings of other groups are made with it."""
        if not self._file(size, gop).exists():
            write([self._file(size, one) for one in GOPS], GOPS, pictures(size, SIZES[size]))
        return self._file(size, gop)

    def coded(self, codec: str) -> Path:
        """A file of this codec. Errors: ValueError where PyAV has no encoder for it."""
        encoder, options, pixels, ending = CODECS[codec]
        path = self.folder / f"{codec}.{ending}"
        if not path.exists():
            scratch = path.with_name(f"unfinished-{path.name}")
            with ordinary_scheduling():
                write([scratch], [CODED_GOP], pictures(CODED_SIZE, CODED_FRAMES), encoder, options, pixels)
            scratch.rename(path)
        return path

    def _file(self, size: str, gop: int) -> Path:
        return self.folder / f"{size}-gop{gop}.mp4"


def write(
    paths: Sequence[Path],
    gops: Sequence[int],
    frames: Iterator[np.ndarray],
    encoder: str = "libx264",
    options: Mapping[str, str] = ENCODER,
    pixels: str = "yuv420p",
) -> None:
    """Encode the frames, uint8 [H, W, 3], as H.264 or otherwise: a file of all of them for each group of pictures."""
    first = next(frames)
    outs = [av.open(str(path), "w") for path in paths]
    streams = []
    for out, gop in zip(outs, gops):
        stream = out.add_stream(encoder, rate=RATE, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], pixels
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, gop
        streams.append(stream)
    for picture in (first, *frames):
        for out, stream in zip(outs, streams):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    for out, stream in zip(outs, streams):
        out.mux(stream.encode(None))
        out.close()


@contextmanager
def ordinary_scheduling() -> Iterator[None]:
    """Leave this thread scheduled as it was.

    SVT-AV1's encoder makes the thread of a superuser that opens it a real-time one, and so is every process which that
    thread starts from then on: some of them computing leave the machine to nobody else.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def pictures(size: str, count: int) -> Iterator[np.ndarray]:
    """So many frames of a video of this size, uint8 [H, W, 3], always the same."""
    width, height = map(int, size.split("x"))
    rng = np.random.default_rng(0)
    far, near = texture(height * 3 // 2, width * 2, rng), texture(height // 2, height // 2, rng)
    noise = rng.normal(0, GRAIN, (height + MARGIN, width + MARGIN, 1)).round().astype(np.int16)
    side = height // 2
    y, x = np.mgrid[:side, :side] - side // 2
    disc = (np.hypot(y, x) < side // 2)[..., None]
    for number in range(count):
        t = number / RATE
        top, left = int(height / 4 * (1 + np.sin(0.3 * t))), int(width / 2 * (1 + np.sin(0.4 * t)))
        picture = far[top : top + height, left : left + width].copy()
        for k in range(OBJECTS):
            top = int((height - side) * (0.5 + 0.5 * np.cos((0.5 + 0.3 * k) * t + 2 * k)))
            left = int((width - side) * (0.5 + 0.5 * np.sin((0.7 + 0.2 * k) * t + k)))
            np.copyto(picture[top : top + side, left : left + side], near, where=disc)
        dy, dx = rng.integers(0, MARGIN, 2)
        yield np.clip(picture + noise[dy : dy + height, dx : dx + width], 0, 255).astype(np.uint8)


def texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [height, width, 3] with the spectrum of natural pictures: amplitudes that fall with the frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))

    def layer() -> np.ndarray:
        phase = np.exp(2j * np.pi * rng.random(amplitude.shape))
        plane = np.fft.irfft2(amplitude * phase, s=(height, width))
        return plane / plane.std()

    light = layer()
    planes = [128 + 40 * light + 20 * layer() for _ in range(3)]
    return np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)

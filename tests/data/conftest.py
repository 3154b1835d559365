"""Videos made on the spot, and parity cases, shared by the tests of this folder."""

import io
import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from safetensors.torch import load_file

from bench.data.videos import ordinary_scheduling

HEIGHT, WIDTH, BITS = 48, 96, 8
RENAMED = {"x264_params": "x264-params", "cpu_used": "cpu-used"}


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture whose upper half shows its number, a bar for each bit, which survives any codec. Below, things move."""
    image = np.empty((height, width, 3), np.uint8)
    for bit in range(BITS):
        image[:, bit * width // BITS : (bit + 1) * width // BITS] = 220 if number >> bit & 1 else 30
    x = np.arange(width)
    image[height // 2 :] = (128 + 80 * np.sin((x + 3 * number) / 7)).astype(np.uint8)[None, :, None]
    return image


def number_of(image: np.ndarray) -> int:
    height, width = image.shape[:2]
    bars = image[2 : height // 2 - 2].reshape(-1, BITS, width // BITS, 3).mean((0, 2, 3))
    return sum(1 << bit for bit in range(BITS) if bars[bit] > 125)


def write(path, images, codec="libx264", pixels="yuv420p", gop=12, container=None, rotation=0, size=None, **options):
    """Encode the images; `container` are options of the muxer."""
    height, width = size or images[0].shape[:2]
    with av.open(str(path), "w", container_options=container or {}) as out:
        stream = out.add_stream(codec, rate=24, options={RENAMED.get(k, k): v for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, gop
        if rotation:
            stream.set_display_rotation(rotation)
        for image in images:
            frame = image if isinstance(image, av.VideoFrame) else av.VideoFrame.from_ndarray(image, format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def video(path, frames=50, **settings):
    with ordinary_scheduling():
        return write(path, [picture(i) for i in range(frames)], **settings)


def remux(source, target, change, **container):
    """Copy the packets without decoding; `change(number, packet)` alters one and says whether to keep it."""
    with av.open(str(source)) as old, av.open(str(target), "w", container_options=container) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        number = 0
        for packet in old.demux(stream):
            if packet.size:
                if kept := change(number, packet):
                    kept.stream = copy
                    new.mux(kept)
                number += 1
    return target


def in_order(path, wanted=None):
    """What plain sequential decoding delivers, {number: image}, and how many frames: the measure of everything here."""
    images, number = {}, -1
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if wanted is None or number in wanted:
                image = frame.to_ndarray(
                    format="rgb24", src_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG
                )
                images[number] = np.rot90(image, frame.rotation // 90)
    return images, number + 1


def payloads(path):
    """Place and size of the data of each packet."""
    content = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    return [(content.index(packet), len(packet)) for packet in packets]


def spoil(path, numbers):
    """Overwrite the payload of some packets with zeros, in place."""
    places, content = payloads(path), bytearray(path.read_bytes())
    for start, size in (places[number] for number in numbers):
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return path


KINDS = {
    "b_frames.mp4": {"bf": "3"},
    "open_gop.mp4": {"bf": "3", "x264_params": "open-gop=1:keyint=12:scenecut=0:bframes=3:b-adapt=0"},
    "fragmented.mp4": {"bf": "3", "container": {"movflags": "frag_keyframe+empty_moov"}},
    "faststart.mov": {"bf": "2", "container": {"movflags": "faststart"}},
    "h264.mkv": {"bf": "3", "sc_threshold": "0"},
    "intra.mkv": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": "8"},
    "vp8.webm": {"codec": "libvpx", "deadline": "realtime", "cpu_used": "8"},
    "b_frames.avi": {"bf": "3"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2"},
    "stream.ts": {"bf": "3"},
    "flash.flv": {"bf": "2"},
}


@pytest.fixture(scope="session")
def film():
    """The helpers above: pictures that show their number, files of them, and ways to damage those."""
    helpers = (picture, number_of, write, video, remux, in_order, payloads, spoil)
    return SimpleNamespace(HEIGHT=HEIGHT, WIDTH=WIDTH, **{helper.__name__: helper for helper in helpers})


@pytest.fixture(scope="session")
def clips(tmp_path_factory, film):
    """The bytes of small videos: number n begins with picture n, and has four frames and n more."""
    folder = tmp_path_factory.mktemp("clips")
    return [film.write(folder / f"{n}.mp4", [film.picture(n + i) for i in range(4 + n)]).read_bytes() for n in range(8)]


@pytest.fixture(scope="session")
def png(film):
    out = io.BytesIO()
    Image.fromarray(film.picture(99)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {kind: video(folder / kind, **settings) for kind, settings in KINDS.items()}


@pytest.fixture(scope="session")
def recorded(shared):
    """A parity case by name: (description, tensors)."""

    def read(name):
        folder = shared / "golden" / "cases"
        return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")

    return read

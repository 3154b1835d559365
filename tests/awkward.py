"""Files that are no video although they are called so, and why: each is made by a function of (film, path)."""

import os
import random

import av
import numpy as np
from av.stream import Disposition


def sound(film, path, cover=False):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100)
        if cover:
            art = out.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = film.WIDTH, film.HEIGHT, "yuvj420p"
            art.disposition = Disposition.attached_pic
            out.mux(art.encode(av.VideoFrame.from_ndarray(film.picture(1), format="rgb24")))
            out.mux(art.encode(None))
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44100, 1024 * k
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def without_decoder(film, path):
    film.video(path)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))


def without_data(film, path):
    """All chunk offsets point past the end of the file."""
    film.video(path)
    content = bytearray(path.read_bytes())
    table = content.index(b"stco") + 8
    for k in range(int.from_bytes(content[table : table + 4], "big")):
        content[table + 4 + 4 * k : table + 8 + 4 * k] = (10**8).to_bytes(4, "big")
    path.write_bytes(content)


def with_text(text):
    """A text file next to a video that it may point to."""

    def make(film, path):
        film.video(path.parent / "real.mp4", 4)
        path.write_text(text)

    return make


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nreal.mp4\n#EXT-X-ENDLIST\n"
PROTOCOL_PLAYLIST = PLAYLIST.replace("real.mp4", "http://127.0.0.1:9/real.mp4")
CONCATENATION = "ffconcat version 1.0\nfile real.mp4\n"
NOT_VIDEO, NO_CONTAINER = "it is not a video file, or its header is damaged", "it is not in a video container"
BAD = {
    "missing.mp4": (lambda film, path: None, "the file does not exist"),
    "under_a_file.mp4": (lambda film, path: None, "the file does not exist"),
    "empty.mp4": (lambda film, path: path.touch(), "the file is empty"),
    "noise.mp4": (lambda film, path: path.write_bytes(random.Random(1).randbytes(65536)), NOT_VIDEO),
    "zeros.mp4": (lambda film, path: path.write_bytes(bytes(65536)), NOT_VIDEO),
    "text.mp4": (lambda film, path: path.write_text("hello " * 500), NOT_VIDEO),
    "page.mp4": (lambda film, path: path.write_text("<!DOCTYPE html><html><body>404</body></html>"), NOT_VIDEO),
    "half.mp4": (lambda film, path: path.write_bytes(film.video(path).read_bytes()[:2000]), NOT_VIDEO),
    "playlist.mp4": (with_text(PLAYLIST), NOT_VIDEO),
    "playlist.m3u8": (with_text(PLAYLIST), NO_CONTAINER),
    "far_playlist.m3u8": (with_text(PROTOCOL_PLAYLIST), NO_CONTAINER),
    "concatenation.mp4": (with_text(CONCATENATION), NO_CONTAINER),
    "image.mp4": (
        lambda film, path: os.replace(film.write(path.with_suffix(".png"), [film.picture(1)], "png", "rgb24"), path),
        "",
    ),
    "raw.h264": (lambda film, path: film.video(path), NO_CONTAINER),
    "queue.mp4": (lambda film, path: os.mkfifo(path), "it is not a regular file"),
    "folder.mp4": (lambda film, path: os.mkdir(path), "it is a folder, not a file"),
    "dangling.mp4": (lambda film, path: path.symlink_to("nowhere.mp4"), "it is a link to a file that does not exist"),
    "circle.mp4": (
        lambda film, path: path.symlink_to(path),
        "the file cannot be reached: Too many levels of symbolic links",
    ),
    "sound.mp4": (sound, "it has no video stream"),
    "sound_with_cover.mp4": (lambda film, path: sound(film, path, cover=True), "it has no video stream"),
    "codec.mp4": (without_decoder, "there is no decoder for its video codec"),
    "offsets.mp4": (without_data, "it has a video stream without any whole frame"),
    "spoilt.mp4": (lambda film, path: film.spoil(film.video(path), range(50)), "none of its frames can be decoded"),
}

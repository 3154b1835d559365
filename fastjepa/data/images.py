"""Images: a single one is a video of one frame, a folder of numbered ones a video of as many.

Pixels are brought to 8-bit RGB: the EXIF orientation is applied, what is transparent shows black, 16-bit grey keeps its
upper eight bits. Of a file with several pictures (TIFF, animations) the first one is read.
"""

import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastjepa.data.decode import NO_PERMISSION, NOT_REACHED, VideoError, VideoInfo, check_file, frame_numbers

EXTENSIONS = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
# A folder of numbered images with holes is a video if it has at least so many, and more than this share of its numbers.
LEAST_WITH_HOLES, LEAST_SHARE = 8, 0.9
DAMAGED = "it is not an image (JPEG, PNG, WebP, BMP, TIFF), or it is damaged"
# What Pillow raises of damaged files, beside OSError.
_DAMAGE = (SyntaxError, ValueError, TypeError, EOFError, IndexError, ArithmeticError, struct.error)
_NUMBERED = re.compile(r"(.*?)(\d+)(\.[^.]+)", re.ASCII | re.DOTALL)


def is_image(name: str) -> bool:
    """Does the name end like that of an image? Hidden files, which some systems write beside each, are none."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not os.path.basename(name).startswith(".")


def probe_image(name: str, content: BinaryIO | None = None) -> VideoInfo:
    """Decode an image, from `content` where it is given, and describe it. Errors: VideoError."""
    picture, codec, mode = _decoded(name, content)
    only = np.zeros(1, np.int64)
    return VideoInfo(
        path=name,
        frames=1,
        width=picture.shape[1],
        height=picture.shape[0],
        rate=None,
        codec=codec,
        pixel_format=mode,
        rotation=0,
        duration=None,
        key_frames=1,
        pts=only,
        keys=only,
        still=True,
    )


def read_image(info: VideoInfo, indices: Sequence[int] | np.ndarray, content: BinaryIO | None = None) -> np.ndarray:
    """The picture for every index: uint8 [F, H, W, 3]. Errors: as `decode.read_frames`."""
    count = len(frame_numbers(info, indices))
    picture = _of_size(_decoded(info.path, content)[0], info)
    # One picture in memory, however many frames a clip has: photographs are large.
    return np.lib.stride_tricks.as_strided(picture, (count, *picture.shape), (0, *picture.strides))


def sequence(names: Iterable[str]) -> list[str] | None:
    """The files of a folder of frames, one for each number from the first to the last; None for other images.

    Its images share what stands before and behind the number, and the numbers are consecutive, at least two. A few may
    be missing (at least LEAST_WITH_HOLES are there, and more than LEAST_SHARE): the nearest earlier one fills the hole.
    """
    files: dict[int, str] = {}
    kinds: set[tuple[str, str]] = set()
    images = [name for name in names if is_image(name)]
    for name in images:
        match = _NUMBERED.fullmatch(name)
        if match is None:
            return None
        kinds.add((match[1], match[3]))
        files[int(match[2])] = name
    if len(kinds) != 1 or len(files) != len(images) or len(files) < 2:
        return None
    first, last = min(files), max(files)
    total = last - first + 1
    if len(files) < total and (len(files) < LEAST_WITH_HOLES or len(files) <= LEAST_SHARE * total):
        return None
    filled, name = [], files[first]
    for number in range(first, last + 1):
        name = files.get(number, name)
        filled.append(name)
    return filled


def probe_frames(folder: str) -> VideoInfo:
    """Decode the first readable frame of a folder and describe it; its size is that of all. Errors: VideoError."""
    files = _frame_files(folder)
    for file in files:
        try:
            first = probe_image(file)
        except VideoError:  # as in a video: the next one takes its place
            continue
        numbers = np.arange(len(files))
        return replace(
            first, path=folder, frames=len(files), key_frames=len(files), pts=numbers, keys=numbers, still=False
        )
    raise VideoError("none of its frames can be decoded", folder)


def read_frame_files(info: VideoInfo, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Frames of a folder: uint8 [F, H, W, 3]. A frame that cannot be read is replaced as in `decode.read_frames`."""
    wanted = frame_numbers(info, indices)
    files = _frame_files(info.path)
    if len(files) < info.frames:
        raise VideoError(f"it had {info.frames} frames before, and has {len(files)} now", info.path)
    pictures: dict[str, np.ndarray | None] = {}

    def picture(number: int) -> np.ndarray | None:
        file = files[number]
        if file not in pictures:
            try:
                pictures[file] = _of_size(_decoded(file, None)[0], info)
            except VideoError:
                pictures[file] = None
        return pictures[file]

    def nearest(number: int) -> np.ndarray:
        for other in (*range(number, -1, -1), *range(number + 1, len(files))):
            if (found := picture(other)) is not None:
                return found
        raise VideoError("none of its frames can be decoded", info.path)

    return np.stack([nearest(number) for number in wanted])


def frames_status(folder: str) -> tuple[int, int]:
    """(size, mtime_ns) of a folder of frames: the sum, and the latest time, of its images. Errors: VideoError."""
    every = [check_file(file) for file in dict.fromkeys(_frame_files(folder))]
    return sum(status.st_size for status in every), max(status.st_mtime_ns for status in every)


def _frame_files(folder: str) -> list[str]:
    try:
        names = os.listdir(folder)
    except PermissionError as error:
        raise VideoError("there is no permission to read the folder", folder) from error
    except OSError as error:
        raise VideoError(f"the folder cannot be read: {error.strerror}", folder) from error
    files = sequence(names)
    if files is None:
        raise VideoError("it is a folder, and not one of frames with consecutive numbers", folder)
    return [os.path.join(folder, name) for name in files]


def _decoded(name: str, content: BinaryIO | None) -> tuple[np.ndarray, str, str]:
    """(uint8 [H, W, 3], codec, mode of its pixels). Errors: VideoError."""
    if content is None:
        check_file(name)
    try:
        with Image.open(name if content is None else content, formats=FORMATS) as image:
            codec = "jpeg" if image.format == "MPO" else str(image.format).lower()
            mode = image.mode
            return np.array(_rgb(ImageOps.exif_transpose(image), name)), codec, mode
    except VideoError:
        raise
    except Image.DecompressionBombError as error:
        raise VideoError(f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels", name) from error
    except UnidentifiedImageError as error:
        raise VideoError(DAMAGED, name) from error
    except PermissionError as error:
        raise VideoError(NO_PERMISSION, name) from error
    except OSError as error:  # with a number it is the system's, without one Pillow's
        raise VideoError(f"{NOT_REACHED}: {error.strerror}" if error.errno else DAMAGED, name) from error
    except _DAMAGE as error:
        raise VideoError(DAMAGED, name) from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise VideoError("its pixels are floating-point numbers, whose range is not known", name)
    if image.mode.startswith("I"):  # 16 bits, in Pillow's own modes; 32-bit integers are cut off above those
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _of_size(picture: np.ndarray, info: VideoInfo) -> np.ndarray:
    """The picture with the size of the first frame, as in a stream that changes its size."""
    if picture.shape[:2] == (info.height, info.width):
        return picture
    return np.array(Image.fromarray(picture).resize((info.width, info.height), Image.Resampling.BICUBIC))

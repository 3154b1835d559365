"""RandAugment on whole frames: operations of Pillow, drawn once for a clip and the same in all its frames.

Source: RandAugment (arXiv 1909.13719) in the form that the public V-JEPA transform asks for, `rand-m7-n4-mstd0.5-inc1`:
four operations at a magnitude around 7 of 10, where every level map grows with the magnitude.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OPS = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
DRAWN = 4
SHARE_APPLIED = 0.5
MAGNITUDE, MAGNITUDE_STD, MOST = 7.0, 0.5, 10.0
FILL = (128, 128, 128)
# Solarize-add leaves pixels from here on alone.
BRIGHT = 128


@dataclass(frozen=True)
class Op:
    """One operation. `level` is in its own unit: degrees, bits, a grey level, a factor or a share of the side."""

    name: str
    level: float = 0.0


def draw_ops(rng: np.random.Generator) -> tuple[Op, ...]:
    """The operations of one clip, in order: four drawn with replacement, each kept with probability 1/2."""
    names = rng.integers(len(OPS), size=DRAWN)
    kept = rng.random(DRAWN) < SHARE_APPLIED
    magnitudes = np.clip(rng.normal(MAGNITUDE, MAGNITUDE_STD, DRAWN), 0, MOST)
    signs = np.where(rng.random(DRAWN) < 0.5, -1, 1)
    return tuple(
        Op(OPS[n], level(OPS[n], float(m), int(s))) for n, keep, m, s in zip(names, kept, magnitudes, signs) if keep
    )


def level(name: str, magnitude: float, sign: int) -> float:
    """What a magnitude of 0..10 means to an operation, 0 where it means nothing; `sign` is +1 or -1."""
    share = magnitude / MOST
    match name:
        case "rotate":
            return sign * 30 * share
        case "color" | "contrast" | "brightness" | "sharpness":
            return 1 + sign * 0.9 * share
        case "shear_x" | "shear_y":
            return sign * 0.3 * share
        case "translate_x" | "translate_y":
            return sign * 0.45 * share
        case "posterize":
            return 4 - int(4 * share)
        case "solarize":
            return 256 - int(256 * share)
        case "solarize_add":
            return int(110 * share)
        case _:
            return 0.0


def augment(frames: np.ndarray, ops: tuple[Op, ...]) -> np.ndarray:
    """uint8 [T, H, W, 3] -> the same, after every operation in turn; the given frames are left as they are."""
    if not ops:
        return frames
    done = []
    for frame in frames:
        image = Image.fromarray(np.ascontiguousarray(frame))
        for op in ops:
            image = _PIXELS[op.name](image, op.level)
        done.append(np.asarray(image))
    return np.stack(done)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """`matrix` (a, b, c, d, e, f): the pixel (x, y) shows what was at (ax + by + c, dx + ey + f)."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    # Pillow's own refuses 0 bits, which a magnitude of 10 asks for.
    step = 1 << (8 - int(bits))
    return image.point([value // step * step for value in range(256)] * 3)


def _solarize_add(image: Image.Image, addition: float) -> Image.Image:
    table = [min(255, value + int(addition)) if value < BRIGHT else value for value in range(256)]
    return image.point(table * 3)


_PIXELS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "solarize_add": _solarize_add,
    "color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": lambda image, factor: _affine(image, 1, factor, 0, 0, 1, 0),
    "shear_y": lambda image, factor: _affine(image, 1, 0, 0, factor, 1, 0),
    "translate_x": lambda image, share: _affine(image, 1, 0, share * image.width, 0, 1, 0),
    "translate_y": lambda image, share: _affine(image, 1, 0, 0, 0, 1, share * image.height),
}

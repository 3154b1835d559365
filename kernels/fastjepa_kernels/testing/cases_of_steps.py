"""Where a training step calls the operations: the shapes of the published recipes, in the order in which they matter.

V-JEPA ViT-L and ViT-H: 24 clips of 16 frames at 224 px, 1568 tokens. V-JEPA 2 ViT-g: the same at 256 px, 2048 tokens,
with rotary positions; its width in 16 heads of 88 channels, as before, is measured too. Rows of the two mask sets are
rounded means of the published masks, cut to the shortest of 24 clips. A target encoder and what it consists of has no
backward pass.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from fastjepa_kernels.testing.case import Case, Shape
from fastjepa_kernels.testing.cases import CASES, tokens
from fastjepa_kernels.testing.cases_of_blocks import clip, heads, packed, product
from fastjepa_kernels.testing.cases_of_noise import assembled
from fastjepa_kernels.testing.cases_of_noise import tokens as rows_of_clips

CLIPS = 24


class Model(NamedTuple):
    """An encoder or a predictor. `sets`: rows of a clip in each mask set; `predicted`: target tokens in each."""

    width: int
    heads: int
    tokens: int
    sets: tuple[int, int]
    predicted: tuple[int, int]
    side: int = 224
    rotary: bool = False

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def rows(self) -> int:
        """Of both mask sets."""
        return CLIPS * sum(self.sets)


MODELS = {
    "vith": Model(1280, 16, 1568, (365, 100), (749, 1103)),
    "predictor": Model(384, 16, 1568, (1115, 1203), (749, 1103)),
    "vitl": Model(1024, 16, 1568, (365, 100), (749, 1103)),
    "vitg": Model(1408, 22, 2048, (493, 128), (973, 1440), side=256, rotary=True),
    "predictor2": Model(384, 12, 2048, (1467, 1569), (973, 1440), rotary=True),
}


class Place(NamedTuple):
    """One operation at one place of a step; the case has no gradients where there is no backward pass."""

    case: Case
    name: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.case.name}-{self.name}".replace(" ", "-")


def _encoder(model: Model) -> Iterator[tuple[str, str, Shape]]:
    """(operation, place, shape) of what an encoder has and a predictor has not."""
    width, kept, both, predicted = model.width, model.sets[0], model.rows, model.predicted
    for part, rows in (("context", kept), ("target", model.tokens)):
        yield "patch_embed_gather", part, clip(CLIPS, 16, model.side, 16, rows, width)
    for number, asked in enumerate(predicted):
        yield "target_loss", f"set{number}", tokens(CLIPS, model.tokens, asked, width)
    if model.rotary:
        turned = heads(CLIPS, model.tokens, kept, model.heads, model.head)
        whole = heads(CLIPS, model.tokens, model.tokens, model.heads, model.head)
        for part, shape in (("context", turned), ("target", whole)):
            yield "indexed_attention turned flat", part, shape
            yield "indexed_attention turned", part, shape
            yield "rope3d", part, shape
    yield "mlp", "target", product(CLIPS * model.tokens, width)
    yield "mlp", "context", product(both, width)
    yield "gather_tokens", "set1", tokens(CLIPS, model.tokens, predicted[1], width)
    yield "adamw_ema_", "block", {"rows": 12 * width**2 + 13 * width}
    yield "ema_update_", "block", {"rows": 12 * width**2 + 13 * width}


def _blocks(model: Model, target: bool) -> Iterator[tuple[str, str, Shape]]:
    """What the blocks of every model have. `target`: the encoder runs over all tokens as well, without a gradient."""
    parts = [("target", CLIPS * model.tokens, (model.tokens, 0))] if target else []
    for part, rows, lengths in [*parts, ("context" if target else "rows", model.rows, model.sets)]:
        norm = {"rows": rows, "width": model.width}
        yield "indexed_attention packed", part, packed(CLIPS, *lengths, model.heads, model.head)
        yield "layer_norm", part, norm
        yield "add_layer_norm", part, norm
        yield "linear_gelu", part, product(rows, model.width)


def _once(name: str, model: Model) -> Iterator[tuple[str, str, Shape]]:
    """Other forms of an operation, at one encoder and at one predictor."""
    if name == "vith":
        alone = heads(CLIPS, model.tokens, model.sets[0], model.heads, model.head)
        yield "indexed_attention biased", "context", alone
        yield "indexed_attention", "context", alone
        yield "linear_gelu fused", "context", product(model.rows, model.width)
        for part, rows in (("context", model.sets[0]), ("target", model.tokens)):
            yield "patch_embed_gather fused", part, clip(CLIPS, 16, model.side, 16, rows, model.width)
    if name == "vitg":
        wide = heads(CLIPS, model.tokens, model.sets[0], 16, 88)
        yield "indexed_attention turned flat", "88", wide
        yield "rope3d", "88", wide
    if name == "predictor":
        alone = heads(CLIPS, model.tokens, model.sets[1], model.heads, model.head)
        asked = rows_of_clips(CLIPS, model.tokens, model.predicted[1], model.width)
        yield "indexed_attention biased", "rows", alone
        yield "indexed_attention", "rows", alone
        yield "linear_gelu fused", "rows", product(model.rows, model.width)
        yield "philox_normal", "set1", asked
        yield "layer_norm_noise", "set1", asked
        yield "gather_norm_noise", "set1", asked


def _predictor(model: Model) -> Iterator[tuple[str, str, Shape]]:
    for number, (rows, asked) in enumerate(zip(model.sets, model.predicted)):
        yield "assemble_tokens", f"set{number}", assembled(CLIPS, model.tokens, rows - asked, asked, model.width)
    if model.rotary:
        longest = heads(CLIPS, model.tokens, model.sets[1], model.heads, model.head)
        yield "indexed_attention turned flat", "rows", longest
        yield "indexed_attention turned", "rows", longest
        yield "rope3d", "rows", longest
    yield "mlp", "rows", product(model.rows, model.width)
    yield "scatter_tokens", "set1", tokens(CLIPS, model.tokens, model.sets[1], model.width)
    yield "adamw_ema_", "block", {"rows": 12 * model.width**2 + 13 * model.width}


def places() -> list[Place]:
    """Every place, the first model's first, and in a model what costs most of a step first."""
    by_name, found = {case.name: case for case in CASES}, []
    for name, model in MODELS.items():
        encoder = name.startswith("vit")
        parts = [*_blocks(model, encoder), *(_encoder(model) if encoder else _predictor(model)), *_once(name, model)]
        for operation, part, shape in parts:
            case = by_name[operation]
            found.append(Place(replace(case, gradients=()) if part == "target" else case, f"{name}-{part}", shape))
    return found

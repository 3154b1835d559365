"""Do weights fit a model: what their shapes tell, which settings to change, and the report of what went where."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastjepa.jepa import JEPA
from fastjepa.models import VisionTransformer, VisionTransformerPredictor
from fastjepa.models.vision_transformer import SIZES

NETWORKS = ("encoder", "predictor", "target_encoder")
TABLES = {"encoder": "pos_embed", "predictor": "predictor_pos_embed", "target_encoder": "pos_embed"}
# Every predictor of the second generation that was published: twelve heads of 32.
ROTARY_PREDICTOR = {"predictor_dim": 384, "predictor_heads": 12}
Networks = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a checkpoint tell of its networks; None where the entry is absent or of another form.

    The number of heads is not among them: queries, keys and values of all heads lie in one matrix. `tubelet` is None
    for an encoder of images, `tokens` for rotary positions, which know no size. `gated` and `predictor_gated`: feed-
    forward layers are gated (SwiGLU), then `hidden` is the width of the gate. `levels` are norms of an encoder that is
    supervised at several blocks, 0 where it has the usual one; `predicts_context`: the predictor predicts context too.
    """

    width: int | None
    depth: int
    hidden: int | None
    patch: int | None
    tubelet: int | None
    tokens: int | None
    predictor_dim: int | None
    predictor_depth: int
    mask_tokens: int
    rotary: bool = False
    gated: bool = False
    predictor_hidden: int | None = None
    predictor_gated: bool = False
    levels: int = 0
    predicts_context: bool = False

    @property
    def name(self) -> str:
        """The named size with this width, depth and MLP, or "no named size".

        Where sizes differ by their heads alone, rotary positions mean that of V-JEPA 2: vit_giant_xformers.
        """
        names = [
            name
            for name, size in SIZES.items()
            if (size["embed_dim"], size["depth"]) == (self.width, self.depth)
            and _feed_forward(self.gated, self.hidden, int(size["embed_dim"] * size["mlp_ratio"])) is not None
        ]
        return "no named size" if not names else names[-1] if self.rotary else names[0]

    def settings(self) -> dict[str, Any]:
        """Dotted settings of `model`, and patch and tubelet of `data`, as far as shapes tell them.

        Rotary positions are taken for those of the published weights (rope_v2), their predictor for one of 12 heads if
        it is as wide as the published ones.
        """
        told: dict[str, Any] = {
            "model.predictor_dim": self.predictor_dim,
            "model.predictor_depth": self.predictor_depth or None,
            "data.patch": self.patch,
            "data.tubelet": self.tubelet,
        }
        if self.name in SIZES:
            size = SIZES[self.name]
            told["model.name"] = self.name
            told["model.mlp"] = _feed_forward(self.gated, self.hidden, int(size["embed_dim"] * size["mlp_ratio"]))
        if self.predictor_dim is not None:
            told["model.predictor_mlp"] = _feed_forward(
                self.predictor_gated, self.predictor_hidden, 4 * self.predictor_dim
            )
        if self.rotary:
            told["model.positions"] = "rope_v2"
            if self.predictor_dim in (None, ROTARY_PREDICTOR["predictor_dim"]):
                told["model.predictor_heads"] = ROTARY_PREDICTOR["predictor_heads"]
        return {key: value for key, value in told.items() if value is not None}


def _feed_forward(gated: bool, hidden: int | None, full: int) -> str | None:
    """The model.mlp that is this wide inside, where an ungated one has `full`; None where there is none."""
    if not gated:
        return "gelu" if hidden == full else None
    return {-(-(2 * full // 3) // 8) * 8: "swiglu", full: "swiglu_full"}.get(hidden)  # type: ignore[arg-type]


def architecture(networks: Networks) -> Architecture:
    """Constructor arguments from the shapes of bare state dicts; of the encoders `encoder` is asked first."""
    encoder = networks.get("encoder") or networks.get("target_encoder", {})
    predictor = networks.get("predictor", {})
    position, patch = _shape(encoder, "pos_embed", 3), _shape(encoder, "patch_embed.proj.weight", 5)
    image = _shape(encoder, "patch_embed.proj.weight", 4)
    mlp, embed = _shape(encoder, "blocks.0.mlp.fc1.weight", 2), _shape(predictor, "predictor_embed.weight", 2)
    embed = embed or _shape(predictor, "predictor_embed.2.weight", 2)  # of several levels, which has a hidden layer
    bias, inner = _shape(encoder, "patch_embed.proj.bias", 1), _shape(predictor, "predictor_blocks.0.mlp.fc1.weight", 2)
    return Architecture(
        width=position[2] if position else bias[0] if bias else None,
        depth=_count(encoder, r"blocks\.(\d+)\..*"),
        hidden=mlp[0] if mlp else None,
        patch=patch[4] if patch else image[3] if image else None,
        tubelet=patch[2] if patch else None,
        tokens=position[1] if position else None,
        predictor_dim=embed[0] if embed else None,
        predictor_depth=_count(predictor, r"predictor_blocks\.(\d+)\..*"),
        mask_tokens=_count(predictor, r"mask_tokens\.(\d+)"),
        rotary="pos_embed" not in encoder,
        gated="blocks.0.mlp.fc3.weight" in encoder,
        predictor_hidden=inner[0] if inner else None,
        predictor_gated="predictor_blocks.0.mlp.fc3.weight" in predictor,
        levels=_count(encoder, r"norms_block\.(\d+)\..*"),
        predicts_context="predictor_proj_context.weight" in predictor,
    )


def state_of(jepa: JEPA) -> dict[str, dict[str, Tensor]]:
    """The live tensors of the three networks under their own keys."""
    return {name: getattr(jepa, name).state_dict() for name in NETWORKS}


def heads_of(jepa: JEPA) -> tuple[int, int]:
    """(encoder, predictor) attention heads. Errors: ValueError for networks that are not this library's."""
    encoder, predictor = _networks(jepa)
    return encoder.num_heads, predictor.predictor_blocks[0].attn.num_heads  # type: ignore[union-attr, return-value]


def positions_of(jepa: JEPA) -> str:
    """The model.positions that these networks were made with. Errors: ValueError, as `heads_of`."""
    encoder, _ = _networks(jepa)
    style = encoder.blocks[0].attn.rope_style  # type: ignore[union-attr]
    return {None: "table", "v2": "rope_v2", "interleaved": "rope"}[style]  # type: ignore[index]


def _networks(jepa: JEPA) -> tuple[VisionTransformer, VisionTransformerPredictor]:
    encoder, predictor = jepa.encoder, jepa.predictor
    if not isinstance(encoder, VisionTransformer) or not isinstance(predictor, VisionTransformerPredictor):
        raise ValueError("weights are loaded into a VisionTransformer and its predictor, not into other networks")
    return encoder, predictor


def settings_to_change(jepa: JEPA, networks: Networks, heads: tuple[int, int] | None) -> Iterator[str]:
    """A sentence for every setting that the file contradicts; `heads` (encoder, predictor) are None if not known."""
    file, model, own = architecture(networks), architecture(state_of(jepa)), heads_of(jepa)
    if (file.width, file.depth, file.hidden) != (model.width, model.depth, model.hidden):
        yield f"model.name: the file has {_named(file)}, the settings {_named(model)}"
    elif heads is not None and heads[0] != own[0]:
        yield f"model.name: the file was trained with {heads[0]} heads, the settings have {own[0]}"
    elif heads is None and file.rotary and file.name in SIZES and (known := SIZES[file.name]["num_heads"]) != own[0]:
        yield f"model.name: published networks of this size have {known} heads ({file.name}), the settings {own[0]}"
    for key, gated, wanted in (
        ("model.mlp", file.gated, model.gated),
        ("model.predictor_mlp", file.predictor_gated, model.predictor_gated),
    ):
        if gated != wanted:
            words = ("is gated (swiglu or swiglu_full)", "is not gated (gelu)")
            yield f"{key}: the feed-forward layer of the file {words[not gated]}, that of the settings {words[gated]}"
    if bool(file.levels) != bool(model.levels):
        names = ["deep" if one.levels else "last" for one in (file, model)]
        yield f"model.levels: the file was trained with {names[0]}, the settings have {names[1]}"
    if file.predictor_depth and file.predicts_context != model.predicts_context:
        words = ("none", "a projection for context tokens")
        has, wants = words[file.predicts_context], words[model.predicts_context]
        yield f"loss.context: the predictor of the file has {has}, that of the settings {wants}"
    if file.patch is not None and file.tubelet is None:
        yield "data.frames: the file holds an encoder of images, the settings make one of clips"
        return
    for key, given, expected, unit in (
        ("data.patch", file.patch, model.patch, "patches of {} pixels"),
        ("data.tubelet", file.tubelet, model.tubelet, "tubelets of {} frames"),
        ("model.predictor_dim", file.predictor_dim, model.predictor_dim, "a predictor {} wide"),
        ("model.predictor_depth", file.predictor_depth, model.predictor_depth, "a predictor of {} blocks"),
    ):
        if given != expected:
            yield f"{key}: the file has {unit.format(given)}, the settings {expected}"
    if heads is not None and heads[1] != own[1]:
        yield f"model.predictor_heads: the file was trained with {heads[1]}, the settings have {own[1]}"
    known = file.settings().get("model.predictor_heads")
    if heads is None and known not in (None, own[1]):
        yield f"model.predictor_heads: published predictors of this width have {known}, the settings {own[1]}"
    if bool(file.mask_tokens) != bool(model.mask_tokens):
        kind = "mask_tokens" if file.mask_tokens else "noised"
        yield f"model.targets: the file's predictor has {file.mask_tokens} mask tokens: it needs model.targets={kind}"
    elif file.mask_tokens != model.mask_tokens and not file.rotary:  # the second generation's are told apart by length
        given, expected = file.mask_tokens, model.mask_tokens
        tube = " (mask.kind=tube always draws one)" if expected == 1 else ""
        yield (
            f"mask.sets: the file has {given} mask tokens, one for each mask set, and the settings draw {expected} "
            f"{'set' if expected == 1 else 'sets'}{tube}"
        )


@dataclass(frozen=True)
class Clip:
    """The clips that networks are made for, as far as they are known: sizes in frames and pixels."""

    tokens: int | None
    grid: tuple[int, ...] | None = None
    frames: int | None = None
    crop: int | None = None

    def __str__(self) -> str:
        return f"{self.tokens} tokens a clip" if self.frames is None else f"{self.frames} frames of {self.crop} px"


def clip_of(jepa: JEPA) -> Clip:
    """The clips of a model. Errors: ValueError for networks that are not this library's."""
    encoder, _ = _networks(jepa)
    return Clip(encoder.num_patches, encoder.grid, encoder.num_frames, encoder.grid[-1] * encoder.patch_size)


def clip_of_file(networks: Networks, settings: Mapping[str, Any] | None) -> Clip:
    """The clips of a checkpoint, by the `settings` of its run where they are known, else by its position tables."""
    sizes = [(settings or {}).get(f"data.{key}") for key in ("frames", "crop", "tubelet", "patch")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return Clip(architecture(networks).tokens)
    frames, crop, tubelet, patch = (int(str(size)) for size in sizes)
    grid = (frames // tubelet, crop // patch, crop // patch)
    return Clip(math.prod(grid), grid, frames, crop)


def tables_to_make(jepa: JEPA, networks: Networks, file: Clip) -> bool:
    """Whether the position tables of a checkpoint are whole, and for another grid of tokens than the model's."""
    live, model = state_of(jepa), clip_of(jepa)
    given = {name: _shape(networks[name], key, 3) for name, key in TABLES.items()}
    whole = all(
        shape is not None and key in live[name] and shape == (1, file.tokens, live[name][key].shape[2])
        for (name, key), shape in zip(TABLES.items(), given.values())
    )
    return whole and (file.tokens != model.tokens or file.grid not in (None, model.grid))


def _named(a: Architecture) -> str:
    kind = "gated MLPs" if a.gated else "MLPs"
    return f"an encoder {a.width} wide, {a.depth} blocks deep, with {kind} {a.hidden} wide ({a.name})"


def differences(jepa: JEPA, networks: Networks, *, tables: bool = True) -> Iterator[str]:
    """A line for every key that is missing, not expected, of another shape or not finite; `tables` of positions too."""
    for network, expected in state_of(jepa).items():
        given = networks[network]
        for key, tensor in expected.items():
            if not tables and key == TABLES[network]:
                continue
            if key not in given:
                yield f"{network}.{key}: missing, expected {list(tensor.shape)}"
            elif given[key].shape != tensor.shape:
                yield f"{network}.{key}: expected {list(tensor.shape)}, given {list(given[key].shape)}"
            elif not given[key].isfinite().all():
                yield f"{network}.{key}: its values are not finite"
        for key, tensor in given.items():
            if key not in expected:
                yield f"{network}.{key[:100]}: not expected, given {list(tensor.shape)}"


def loaded_lines(networks: Networks) -> list[str]:
    """What was loaded into what, with shapes: numbered blocks as one, weight and bias side by side."""
    lines = []
    for name, state in networks.items():
        values = sum(tensor.numel() for tensor in state.values()) / 1e6
        line = f"{name} into {name}: all of its {len(state)} entries, {values:.4g} M values"
        if name == "target_encoder" and "encoder" in networks:
            lines.append(f"{line}, shapes as in encoder")
        else:
            lines += [line, *(f"  {folded}" for folded in _folded({key: list(t.shape) for key, t in state.items()}))]
    return lines


def _folded(shapes: Mapping[str, list[int]]) -> list[str]:
    numbers: dict[str, list[int]] = {}
    parts: dict[str, list[str]] = {}
    for key, shape in shapes.items():
        layer, dot, kind = key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "")
        found = re.search(r"\.(\d+)(?=\.|$)", layer)
        pattern = layer
        if found:
            pattern = f"{layer[: found.start(1)]}*{layer[found.end(1) :]}"
            numbers.setdefault(pattern, []).append(int(found[1]))
        part = f"{dot}{kind} {shape}"
        if part not in parts.setdefault(pattern, []):
            parts[pattern].append(part)
    return [f"{p.replace('*', _span(numbers.get(p, [])))}{', '.join(found)}" for p, found in parts.items()]


def _span(numbers: list[int]) -> str:
    return "-".join(str(n) for n in sorted({min(numbers), max(numbers)})) if numbers else ""


def _shape(state: Mapping[str, Tensor], key: str, ndim: int) -> torch.Size | None:
    tensor = state.get(key)
    return None if tensor is None or tensor.ndim != ndim else tensor.shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found.group(1) for key in state if (found := re.fullmatch(pattern, key))})

"""Cases of what a transformer block is made of: patches, attention, rotary positions, the feed-forward half."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastjepa_kernels as ours
from fastjepa_kernels.testing.case import Call, Case, Shape, random

GRID = (8, 16, 16)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def _attention_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    clips, tokens, heads, head = shape["clips"], shape["tokens"], shape["heads"], shape["width"]
    return random(clips, tokens, 3, heads, head, like=(device, dtype), seed=1), _some(shape, device)


def _some(shape: Shape, device: torch.device) -> Tensor:
    """index [B, K] of kept tokens, in no order."""
    generator = torch.Generator(device).manual_seed(7)
    order = torch.rand(shape["clips"], shape["tokens"], generator=generator, device=device).argsort(dim=-1)
    return order[:, : shape["kept"]].contiguous()


def _attention(impl: Any, x: Tensor, index: Tensor) -> tuple[Tensor]:
    return (ours.indexed_attention(x, q_index=index, kv_index=index, impl=impl),)


def _attention_eager(x: Tensor, index: Tensor) -> tuple[Tensor]:
    q, k, v = _rows(x, index)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return ((scores.softmax(dim=-1) @ v).transpose(1, 2),)


def _attention_library(x: Tensor, index: Tensor) -> tuple[Tensor]:
    q, k, v = _rows(x, index)
    return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2),)


def _rows(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    places = index[:, :, None, None, None].expand(-1, -1, *x.shape[2:])
    return tuple(part.transpose(1, 2) for part in x.gather(1, places).unbind(2))


def _a_clip_at_a_time(call: Call, clips: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor]:
    """The rows of all clips, where the scores of one clip are there at a time, also in the backward pass."""
    parts = [checkpoint(call, *clip, use_reentrant=False, preserve_rng_state=False) for clip in clips]
    return (torch.cat([rows for (rows,) in parts]),)


def _attention_exact(x: Tensor, index: Tensor) -> tuple[Tensor]:
    return _a_clip_at_a_time(_attention_eager, zip(x.split(1), index.split(1)))


def _packed_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of the clips of two mask sets after another, where clips begin, and one empty tensor a set."""
    clips, lengths = shape["clips"], (shape["first"], shape["second"])
    sets = [torch.empty(clips, length, 0, device=device, dtype=dtype) for length in lengths]
    kept = torch.tensor([0, *(length for length in lengths if length for _ in range(clips))], device=device)
    x = random(clips * sum(lengths), 3, shape["heads"], shape["width"], like=(device, dtype), seed=1)
    return x, kept.cumsum(0).to(torch.int32), *sets


def _packed(impl: Any, x: Tensor, starts: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor]:
    longest = max(first.shape[1], second.shape[1])
    return (ours.indexed_attention(x, cu_seqlens=starts, max_length=longest, impl=impl),)


def stretches(x: Tensor, *sets: Tensor) -> list[Tensor]:
    """Rows [R, ...] of the packed case as [B, K, ...] of each mask set that has rows."""
    parts = x.split([one.shape[0] * one.shape[1] for one in sets])
    return [part.unflatten(0, one.shape[:2]) for part, one in zip(parts, sets) if one.shape[1]]


def _dense_eager(x: Tensor) -> tuple[Tensor]:
    """Attention of packed rows [B, K, 3, H, d] -> [B * K, H, d]."""
    q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return ((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(0, 1),)


def _packed_eager(x: Tensor, starts: Tensor, *sets: Tensor) -> tuple[Tensor]:
    return (torch.cat([_dense_eager(part)[0] for part in stretches(x, *sets)]),)


def _packed_exact(x: Tensor, starts: Tensor, *sets: Tensor) -> tuple[Tensor]:
    return _a_clip_at_a_time(_dense_eager, ((clip,) for part in stretches(x, *sets) for clip in part.split(1)))


def _packed_library(x: Tensor, starts: Tensor, *sets: Tensor) -> tuple[Tensor]:
    parts = []
    for part in stretches(x, *sets):
        q, k, v = (one.transpose(1, 2) for one in part.unbind(2))
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return (torch.cat(parts),)


def _biased_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of clips of one length after another, the bias in float32, and where the clips begin."""
    clips, kept, heads, head = shape["clips"], shape["kept"], shape["heads"], shape["width"]
    x = random(clips * kept, 3, heads, head, like=(device, dtype), seed=1)
    bias = random(3, heads, head, like=(device, torch.float32), seed=2)
    return x, bias, torch.arange(clips + 1, dtype=torch.int32, device=device) * kept


def _biased(impl: Any, x: Tensor, bias: Tensor, starts: Tensor) -> tuple[Tensor]:
    longest = len(x) // (len(starts) - 1)
    return (ours.indexed_attention(x, cu_seqlens=starts, max_length=longest, qkv_bias=bias, impl=impl),)


def _biased_eager(x: Tensor, bias: Tensor, starts: Tensor) -> tuple[Tensor]:
    q, k, v = _biased_rows(x, bias, starts)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return ((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(0, 1),)


def _biased_library(x: Tensor, bias: Tensor, starts: Tensor) -> tuple[Tensor]:
    q, k, v = _biased_rows(x, bias, starts)
    return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1),)


def _biased_rows(x: Tensor, bias: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
    rows = (x + bias).to(x.dtype).unflatten(0, (len(starts) - 1, -1))
    return tuple(part.transpose(1, 2) for part in rows.unbind(2))


def _biased_exact(x: Tensor, bias: Tensor, starts: Tensor) -> tuple[Tensor]:
    rows = x.split(len(x) // (len(starts) - 1))
    return _a_clip_at_a_time(_biased_eager, ((clip, bias, starts[:2]) for clip in rows))


def _turned(impl: Any, x: Tensor, index: Tensor) -> tuple[Tensor]:
    return (ours.indexed_attention(x, q_index=index, kv_index=index, rope=ours.Rope(GRID), impl=impl),)


def _turned_eager(x: Tensor, index: Tensor) -> tuple[Tensor]:
    q, k, v = (part.transpose(1, 2) for part in _rows(x, index))
    q, k = _turn(q, index).to(x.dtype), _turn(k, index).to(x.dtype)
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    return ((scores.softmax(dim=-1) @ v.transpose(1, 2)).transpose(1, 2),)


def _turned_exact(x: Tensor, index: Tensor) -> tuple[Tensor]:
    return _a_clip_at_a_time(_turned_eager, zip(x.split(1), index.split(1)))


def _turned_library(x: Tensor, index: Tensor) -> tuple[Tensor]:
    q, k, v = _rows(x, index)
    q, k = (_turn(part.transpose(1, 2), index).to(x.dtype).transpose(1, 2) for part in (q, k))
    return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2),)


def _turn(x: Tensor, ids: Tensor) -> Tensor:
    """[B, K, H, d] in float32 at least."""
    part = 2 * (x.shape[-1] // 3 // 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    frequency = 1e4 ** (-torch.arange(part // 2, device=x.device, dtype=wide) / (part / 2))
    pieces = []
    for axis, place in enumerate((ids // (GRID[1] * GRID[2]), ids // GRID[2] % GRID[1], ids % GRID[2])):
        angle = (place.unsqueeze(-1).to(wide) * frequency).unsqueeze(-2)
        first, second = values[..., axis * part : (axis + 1) * part].unflatten(-1, (-1, 2)).unbind(-1)
        turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
        pieces.append(torch.stack(turned, -1).flatten(-2))
    return torch.cat([*pieces, values[..., 3 * part :]], -1)


def _flat_turned_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As `_biased_inputs`, and the token numbers of the rows."""
    return *_biased_inputs(shape, device, dtype), _some(shape, device).flatten()


def _flat_turned(impl: Any, x: Tensor, bias: Tensor, starts: Tensor, ids: Tensor) -> tuple[Tensor]:
    longest, rope = len(x) // (len(starts) - 1), ours.Rope(GRID)
    named: dict[str, Any] = {"cu_seqlens": starts, "max_length": longest, "rope": rope, "ids": ids, "impl": impl}
    return (ours.indexed_attention(x, qkv_bias=bias, **named),)


def _flat_turned_rows(x: Tensor, bias: Tensor, starts: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (part.transpose(1, 2) for part in _biased_rows(x, bias, starts))
    number = ids.unflatten(0, (len(starts) - 1, -1))
    q, k = (_turn(part, number).to(x.dtype) for part in (q, k))
    return tuple(part.transpose(1, 2) for part in (q, k, v))


def _flat_turned_eager(x: Tensor, bias: Tensor, starts: Tensor, ids: Tensor) -> tuple[Tensor]:
    q, k, v = _flat_turned_rows(x, bias, starts, ids)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return ((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(0, 1),)


def _flat_turned_library(x: Tensor, bias: Tensor, starts: Tensor, ids: Tensor) -> tuple[Tensor]:
    q, k, v = _flat_turned_rows(x, bias, starts, ids)
    return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1),)


def _flat_turned_exact(x: Tensor, bias: Tensor, starts: Tensor, ids: Tensor) -> tuple[Tensor]:
    clips = len(starts) - 1
    rows = zip(x.unflatten(0, (clips, -1)), ids.unflatten(0, (clips, -1)))
    return _a_clip_at_a_time(_flat_turned_eager, ((clip, bias, starts[:2], number) for clip, number in rows))


def _rope_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    size = shape["clips"], shape["kept"], shape["heads"], shape["width"]
    return random(*size, like=(device, dtype), seed=1), _some(shape, device)


def _rope(impl: Any, x: Tensor, ids: Tensor) -> tuple[Tensor]:
    return (ours.rope3d(x, ids, ours.Rope(GRID), impl=impl),)


def _gelu_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    like, width = (device, dtype), shape["width"]
    hidden = shape["hidden"]
    return (
        random(shape["rows"], width, like=like, seed=1),
        random(hidden, width, like=like, seed=2, scale=width**-0.5),
        random(hidden, like=like, seed=3),
    )


def _gelu_eager(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (F.gelu(F.linear(x, weight, bias)),)


def _mlp_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden = shape["hidden"]
    w2 = random(shape["width"], hidden, like=(device, dtype), seed=4, scale=hidden**-0.5)
    return *_gelu_inputs(shape, device, dtype), w2


def _mlp_eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor]:
    return (F.linear(F.gelu(F.linear(x, w1, b1)), w2),)


def _patch_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    side, patch, clips = shape["side"], shape["patch"], shape["clips"]
    generator = torch.Generator(device).manual_seed(1)
    size = clips, 3, shape["frames"], side, side
    video = torch.randint(256, size, generator=generator, device=device, dtype=torch.uint8)
    values, like = 3 * 2 * patch * patch, (device, dtype)
    return (
        video,
        random(shape["width"], 3, 2, patch, patch, like=like, seed=2, scale=values**-0.5),
        random(shape["width"], like=like, seed=3),
        _some(shape, device),
        random(shape["tokens"], shape["width"], like=(device, torch.float32), seed=4),
    )


def _patch(form: Any) -> Any:
    def run(impl: Any, video: Tensor, weight: Tensor, bias: Tensor, index: Tensor, position: Tensor) -> tuple[Tensor]:
        sizes: dict[str, Any] = {
            "tubelet": 2,
            "patch": weight.shape[-1],
            "position": position,
            "mean": MEAN,
            "std": STD,
        }
        named: Any = form if impl == "triton" else "auto"
        return (ours.patch_embed_gather(video, weight, bias, index, **sizes, form=named, impl=impl),)

    return run


def _patch_eager(video: Tensor, weight: Tensor, bias: Tensor, index: Tensor, position: Tensor) -> tuple[Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    level, spread = (torch.tensor(x, device=video.device, dtype=wide).view(-1, 1, 1, 1) for x in (MEAN, STD))
    pixels = ((video.to(wide) / 255 - level) / spread).to(weight.dtype)
    tokens = F.conv3d(pixels, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    whole = (tokens + position).to(weight.dtype)
    return (whole.gather(1, index.unsqueeze(-1).expand(-1, -1, whole.shape[2])),)


def _patch_library(video: Tensor, weight: Tensor, bias: Tensor, index: Tensor, position: Tensor) -> tuple[Tensor]:
    """A product of the kept patches alone."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    clips, channels, depth, patch = len(video), *weight.shape[1:4]
    cut = video.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(2, (-1, depth))
    patches = cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(clips, -1, channels * depth * patch * patch)
    kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[2])).to(wide)
    level, spread = (torch.tensor(x, device=video.device, dtype=wide).view(-1, 1) for x in (MEAN, STD))
    values = ((kept.unflatten(-1, (channels, -1)) / 255 - level) / spread).flatten(2).to(weight.dtype)
    return ((F.linear(values, weight.flatten(1), bias) + position[index]).to(weight.dtype),)


def heads(clips: int, tokens: int, kept: int, heads: int, head: int) -> Shape:
    """Attention among the kept tokens of each clip."""
    return {"clips": clips, "tokens": tokens, "kept": kept, "heads": heads, "width": head, "rows": kept}


def packed(clips: int, first: int, second: int, heads: int, head: int) -> Shape:
    """Clips of two mask sets that keep so many rows each, or of one."""
    rows = max(first, second)
    return {"clips": clips, "first": first, "second": second, "heads": heads, "width": head, "rows": rows}


def clip(clips: int, frames: int, side: int, patch: int, kept: int, width: int) -> Shape:
    """Clips of which so many patches are kept."""
    tokens = frames // 2 * (side // patch) ** 2
    return {"clips": clips, "frames": frames, "side": side, "patch": patch, "tokens": tokens, "kept": kept,
            "width": width, "rows": clips * kept}  # fmt: skip


def product(rows: int, width: int) -> Shape:
    """Rows of a feed-forward layer."""
    return {"rows": rows, "width": width, "hidden": 4 * width}


_ATTENTION = {"small": heads(2, 40, 33, 2, 32), "odd": heads(1, 9, 7, 1, 88)}
_PRODUCTS = {"small": product(33, 48), "odd": product(7, 40), "encoder": product(24 * 560, 1280),
             "predictor": product(24 * 1400, 384)}  # fmt: skip
_CLIPS = {"small": clip(2, 4, 32, 8, 11, 48), "odd": clip(1, 2, 24, 8, 7, 40),
          "encoder": clip(24, 16, 224, 16, 560, 1280)}  # fmt: skip

BLOCK_CASES = (
    Case(
        "indexed_attention", _attention_inputs, _attention, _attention_eager,
        {**_ATTENTION, "encoder": heads(24, 1568, 560, 16, 80), "predictor": heads(24, 1568, 1400, 16, 24)},
        {"indexed_attention": "forward", "indexed_attention_query": "backward", "indexed_attention_key": "backward"},
        (0,), _attention_library, _attention_exact,
    ),
    Case(
        "indexed_attention packed", _packed_inputs, _packed, _packed_eager,
        {"small": packed(2, 33, 7, 2, 32), "odd": packed(1, 9, 0, 1, 88), "encoder": packed(24, 365, 100, 16, 80)}, {},
        (0,), _packed_library, _packed_exact,
    ),
    Case(
        "indexed_attention biased", _biased_inputs, _biased, _biased_eager,
        {**_ATTENTION, "encoder": heads(24, 1568, 560, 16, 80), "predictor": heads(24, 1568, 1400, 16, 24)},
        {"indexed_attention_biased": "forward", "indexed_attention_query_biased": "backward",
         "indexed_attention_key_biased": "backward"}, (0, 1), _biased_library, _biased_exact,
    ),
    Case(
        "indexed_attention turned", _attention_inputs, _turned, _turned_eager,
        {**_ATTENTION, "encoder": heads(24, 2048, 560, 16, 80)}, {"indexed_attention_ready": "forward"}, (0,),
        _turned_library, _turned_exact,
    ),
    Case(
        "indexed_attention turned flat", _flat_turned_inputs, _flat_turned, _flat_turned_eager,
        {**_ATTENTION, "v2 encoder": heads(24, 2048, 410, 16, 64), "v2 giant": heads(24, 2048, 410, 22, 64),
         "giant": heads(24, 2048, 410, 16, 88), "v2 predictor": heads(24, 2048, 1700, 12, 32)},
        {}, (0, 1), _flat_turned_library, _flat_turned_exact,
    ),
    Case(
        "rope3d", _rope_inputs, _rope, lambda x, ids: (_turn(x, ids).to(x.dtype),),
        {**_ATTENTION, "encoder": heads(24, 2048, 560, 16, 80), "v2 encoder": heads(24, 2048, 410, 16, 64),
         "giant": heads(24, 2048, 410, 16, 88), "v2 predictor": heads(24, 2048, 1700, 12, 32)},
        {"rope3d": "forward"}, (0,),
    ),
    Case(
        "linear_gelu", _gelu_inputs,
        lambda impl, *inputs: (ours.linear_gelu(*inputs, form="library", impl=impl),), _gelu_eager, _PRODUCTS,
        {"bias_gelu": "forward", "bias_gelu_backward": "backward"}, (0, 1, 2),
    ),
    Case(
        "linear_gelu fused", _gelu_inputs,
        lambda impl, *inputs: (ours.linear_gelu(*inputs, form="fused", impl=impl),), _gelu_eager, _PRODUCTS,
        {"linear_gelu": "forward"}, (0, 1, 2),
    ),
    Case(
        "mlp", _mlp_inputs, lambda impl, *inputs: (ours.mlp(*inputs, impl=impl),), _mlp_eager,
        {"small": product(33, 48), "odd": product(7, 40), "vitl": product(11160, 1024),
         "vith": product(11160, 1280), "predictor": product(55608, 384)},
        {"gelu_product_backward": "backward"}, (0, 1, 2, 3),
    ),
    Case("patch_embed_gather", _patch_inputs, _patch("cut"), _patch_eager, _CLIPS, {}, (1, 2), _patch_library),
    Case(
        "patch_embed_gather fused", _patch_inputs, _patch("fused"), _patch_eager, _CLIPS,
        {"patch_embed_gather": "forward"}, (1, 2), _patch_library,
    ),
)  # fmt: skip

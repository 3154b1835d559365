"""Attention over rows named by an index, in plain PyTorch: products and softmax in float32 at least."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjepa_kernels.attention_inputs import Inputs
from fastjepa_kernels.precision import as_given


class _Rows(NamedTuple):
    """Which rows take part: clip [B, 1], row [B, K], whether it is there [B, K], its token number [B, K]."""

    clip: Tensor
    row: Tensor
    present: Tensor
    token: Tensor


def attention(*given: Any) -> tuple[Tensor, Tensor]:
    """Inputs in order -> result as `out_shape`, log2 of the sum of exp, wide, as `lse_shape` (inf: nothing to see)."""
    case = Inputs(*given)
    with as_given(case.q):
        return _attention(case)


def _attention(case: Inputs) -> tuple[Tensor, Tensor]:
    queries, keys = _places(case)
    q, k, v, _ = _read(case, queries, keys)
    scores = _scores(case, q, k, keys)
    # A clip without keys gives zeros.
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill((lse == -math.inf) | ~queries.present[:, None], math.inf)
    out = ((scores - lse.unsqueeze(-1)).exp() @ v).transpose(1, 2).to(case.q.dtype)
    out = out.masked_fill(~queries.present[:, :, None, None], 0)
    if case.starts is None:
        return out.contiguous(), lse / math.log(2)
    lse = lse / math.log(2)
    flat_lse = lse.new_full(case.lse_shape(), math.inf)
    flat_lse[:, queries.row[queries.present]] = lse.transpose(0, 1)[:, queries.present]
    return _scatter(out, queries, case.views()[0].squeeze(0)), flat_lse


def attention_backward(
    gradient: Tensor, out: Tensor, lse: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes (of packed q alone, then [0] twice), and of the bias in the wide dtype.

    The last flag says whether the bias' gradient is wanted; it is [0] where not.
    """
    *rest, bias_wanted = given
    case = Inputs(*rest)
    with as_given(case.q):
        return _attention_backward(gradient, out, lse, case, bias_wanted)


def _attention_backward(
    gradient: Tensor, out: Tensor, lse: Tensor, case: Inputs, bias_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, keys = _places(case)
    q, k, v, wide = _read(case, queries, keys)
    if case.starts is not None:
        lse = lse[:, queries.row].transpose(0, 1).masked_fill(~queries.present[:, None], math.inf)
        gradient, out = gradient[queries.row], out[queries.row]
    # What stands in rows that are not there is not read, NaN included.
    hidden = ~queries.present[:, :, None, None]
    gradient, out = (x.to(wide).masked_fill(hidden, 0).transpose(1, 2) for x in (gradient, out))
    share = (_scores(case, q, k, keys) - lse.unsqueeze(-1) * math.log(2)).exp()
    delta = (gradient * out).sum(-1, keepdim=True)
    dscores = share * (gradient @ v.transpose(-1, -2) - delta) * case.scale
    dq, dk = (dscores @ k).transpose(1, 2), (dscores.transpose(-1, -2) @ q).transpose(1, 2)
    dv = (share.transpose(-1, -2) @ gradient).transpose(1, 2)
    if case.grid:
        dq, dk = rotate(dq, queries.token, case, back=True), rotate(dk, keys.token, case, back=True)
    parts = [(dq, queries), (dk, keys), (dv, keys)]
    parts = [(x.masked_fill(~rows.present[:, :, None, None], 0), rows) for x, rows in parts]
    dbias = case.q.new_empty(0, dtype=wide)
    if bias_wanted:
        dbias = torch.stack([x.sum((0, 1)) for x, _ in parts])
    if case.packed:
        one = torch.stack([_scatter(x, rows, case.q.select(-3, 0)) for x, rows in parts], dim=-3)
        return one, case.q.new_empty(0), case.q.new_empty(0), dbias
    dq, dk, dv = (_scatter(x, rows, like) for (x, rows), like in zip(parts, (case.q, case.k, case.v)))
    return dq, dk, dv, dbias


def rotate(x: Tensor, token: Tensor, case: Inputs, back: bool = False) -> Tensor:
    """x [B, K, H, d] with the first three segments of channels turned by the places of `token` [B, K] in the grid."""
    half = case.segment // 2
    if not half:
        return x
    _, height, width = case.grid
    wide = torch.promote_types(x.dtype, torch.float32)
    place = torch.stack([token // (height * width), token // width % height, token % width], dim=-1).to(wide)
    pace = case.theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = place.unsqueeze(-1) * pace
    angle = torch.cat([angle, angle], -1) if case.compat else angle.repeat_interleave(2, -1)
    angle = angle.flatten(-2).unsqueeze(-2)
    turned, rest = x.to(wide).split([3 * case.segment, case.head - 3 * case.segment], dim=-1)
    # The transpose of the map, which `compat` makes no rotation: its sines go with the values before they swap places.
    swapped = _swap(turned * angle.sin()) * -1 if back else _swap(turned) * angle.sin()
    return torch.cat([turned * angle.cos() + swapped, rest], -1)


def _swap(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for neighbouring channels."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)


def _places(case: Inputs) -> tuple[_Rows, _Rows]:
    device = case.q.device
    if case.starts is not None:
        starts = case.starts.long()
        place = torch.arange(case.longest, device=device).expand(case.clips, -1)
        present = place < starts.diff().unsqueeze(1)
        row = (starts[:-1, None] + place).masked_fill(~present, 0)
        clip = torch.zeros(case.clips, 1, dtype=torch.long, device=device)
        queries, keys = (
            _Rows(clip, row, present, place if ids is None else ids.long()[row]) for ids in (case.q_ids, case.kv_ids)
        )
        return queries, keys
    clip = torch.arange(case.clips, device=device).unsqueeze(1)

    def side(index: Tensor | None, lengths: Tensor | None, ids: Tensor | None, most: int) -> _Rows:
        place = torch.arange(most, device=device).expand(case.clips, -1)
        present = torch.ones_like(place, dtype=torch.bool) if lengths is None else place < lengths.unsqueeze(1)
        row = (place if index is None else index.long()).masked_fill(~present, 0)
        return _Rows(clip, row, present, row if ids is None else ids.long()[clip, row])

    return (
        side(case.q_index, case.q_lengths, case.q_ids, case.queries),
        side(case.kv_index, case.kv_lengths, case.kv_ids, case.keys),
    )


def _read(case: Inputs, queries: _Rows, keys: _Rows) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """q, k and v [B, H, K, d] in the wide dtype, which is the last: chosen, biased, turned; zeros where none is."""
    wide = torch.promote_types(case.q.dtype, torch.float32)
    found = []
    for part, (x, rows) in enumerate(zip(case.views(), (queries, keys, keys))):
        values = x[rows.clip, rows.row].to(wide)
        if case.bias is not None:
            values = (values + case.bias[part].to(wide)).to(x.dtype).to(wide)
        if case.grid and part < 2:
            values = rotate(values, rows.token, case).to(x.dtype).to(wide)
        found.append(values.masked_fill(~rows.present[:, :, None, None], 0).transpose(1, 2))
    q, k, v = found
    return q, k, v, wide


def _scores(case: Inputs, q: Tensor, k: Tensor, keys: _Rows) -> Tensor:
    """[B, H, Kq, Kk], with -inf where there is no key."""
    return ((q @ k.transpose(-1, -2)) * case.scale).masked_fill(~keys.present[:, None, None], -math.inf)


def _scatter(x: Tensor, rows: _Rows, like: Tensor | None) -> Tensor:
    """x [B, K, H, d] into the rows of a tensor of zeros like `like`; what is not there adds zeros to some row."""
    assert like is not None
    total = x.new_zeros(like.shape)
    view = total if total.ndim == 4 else total.unsqueeze(0)
    view.index_put_((rows.clip, rows.row), x, accumulate=True)
    return total.to(like.dtype)

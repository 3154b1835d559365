"""Bytes to normalised floats, and the objective on both: the same numbers, in either execution."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa.fused import Fused
from fastjepa.models.operations import LIBRARY
from fastjepa.pixels import MEAN, STD, as_floats, normalise
from tests.small_jepa import assert_same, byte_clips, gradients, make, masks

LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3, 1, 16, 16)


# From bytes to floats


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_level_of_every_channel_is_rounded_once(dtype):
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1, 1) for value in (MEAN, STD))
    exact = (LEVELS.double() / 255 - mean) / std
    floats = as_floats(LEVELS, dtype)
    assert (floats.dtype, floats.shape) == (dtype, LEVELS.shape)
    # Half a step of the dtype, beside what the sum in at least float32 is off.
    slack = 1e-14 if dtype == torch.float64 else 1e-6
    assert ((floats.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all()


def test_it_is_the_normalisation_of_the_float_path():
    torch.testing.assert_close(as_floats(LEVELS), normalise(LEVELS.float()), rtol=1e-6, atol=1e-6)
    batch = torch.stack([LEVELS, LEVELS.flip(-1)])
    assert torch.equal(as_floats(batch), torch.stack([as_floats(clip) for clip in batch]))


def test_channels_may_be_any_dimension():
    assert torch.equal(as_floats(LEVELS[:, 0], channel=0), as_floats(LEVELS)[:, 0])
    rows = LEVELS.reshape(3, -1).unsqueeze(0)
    assert torch.equal(as_floats(rows, channel=-2), as_floats(LEVELS).reshape(1, 3, -1))
    assert torch.equal(as_floats(LEVELS.movedim(0, -1), channel=-1), as_floats(LEVELS).movedim(0, -1))


def test_floats_pass_unchanged():
    clip = torch.randn(3, 2, 4, 4, dtype=torch.float16)
    assert as_floats(clip) is clip


def test_other_integers_and_channels_are_refused():
    with pytest.raises(ValueError, match=r"clips: expected uint8 or normalised floats, given torch\.int32"):
        as_floats(LEVELS.int())
    with pytest.raises(ValueError, match=r"clips: expected uint8 of 3 channels, given \[1, 1, 16, 16\]"):
        as_floats(LEVELS[:1])


# The objective


def passes(video, lengths, execution="packed", operations=LIBRARY, noised=False, dtype=torch.float64, count=6):
    """(loss, gradients) of one pass; networks with 32 and 48 channels, which the kernels take."""
    jepa = make(execution, noised, widths=(32, 48)).to(dtype)
    jepa.operations = operations
    groups = {"dense": {}, "grouped": {"group": 2}, "ragged": {"truncation": "none"}}
    context, target = masks(count, **groups[lengths])
    draws = None
    if noised:
        generator = torch.Generator().manual_seed(5)
        draws = []
        for token_set in target:
            rows = token_set if isinstance(token_set, torch.Tensor) else token_set.index
            noise = torch.randn(*rows.shape, 48, dtype=torch.float64, generator=generator)
            draws.append((torch.randint(6, (count,), generator=generator), noise.to(dtype)))
    loss = jepa(video, context, target, draws).loss
    loss.backward()
    return loss, gradients(jepa)


@pytest.mark.parametrize("operations", [LIBRARY, Fused("reference")], ids=["library", "fused"])
@pytest.mark.parametrize("noised", [False, True], ids=["mask_tokens", "noised"])
@pytest.mark.parametrize("lengths", ["dense", "grouped", "ragged"])
def test_both_executions_agree_on_bytes(lengths, noised, operations):
    video = byte_clips(6)
    (want, expected), (loss, got) = (
        passes(video, lengths, "reference", noised=noised), passes(video, lengths, "packed", operations, noised)
    )  # fmt: skip
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    assert_same(got, expected, rel=1e-9)


@pytest.mark.parametrize("operations", [LIBRARY, Fused("reference")], ids=["library", "fused"])
def test_both_executions_agree_on_bytes_in_float32(operations):
    video = byte_clips(6)
    want, expected = passes(video, "grouped", "reference", dtype=torch.float32)
    loss, got = passes(video, "grouped", "packed", operations, dtype=torch.float32)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    assert_same(got, expected, rel=1e-3)


@pytest.mark.parametrize(
    ("execution", "operations"),
    [("reference", LIBRARY), ("packed", LIBRARY), ("packed", Fused("reference"))],
    ids=["reference", "library", "fused"],
)
@pytest.mark.parametrize("lengths", ["dense", "grouped", "ragged"])
def test_bytes_give_what_their_floats_give(lengths, execution, operations):
    video = byte_clips(6)
    want, expected = passes(as_floats(video, torch.float64), lengths, execution, operations)
    loss, got = passes(video, lengths, execution, operations)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert_same(got, expected, rel=1e-10)


@pytest.mark.parametrize("execution", ["reference", "packed"])
def test_targets_of_bytes_are_those_of_their_floats(execution):
    jepa, video = make(execution), byte_clips(2)
    torch.testing.assert_close(jepa.target_features(video), jepa.target_features(as_floats(video, torch.float64)))


@pytest.mark.parametrize("operations", [LIBRARY, Fused("reference")], ids=["library", "fused"])
def test_under_autocast_bytes_stay_as_near_to_full_precision_as_floats(operations):
    jepa, video, sets = make(widths=(32, 48)), byte_clips(4), masks(4)
    exact = jepa(video, *sets).loss
    jepa.float()
    jepa.operations = operations
    with torch.autocast("cpu", torch.bfloat16):
        bytes_away, floats_away = ((jepa(v, *sets).loss - exact).abs().item() for v in (video, as_floats(video)))
    assert bytes_away <= 2 * floats_away + 1e-3 * exact.item()


class Wide(TorchDispatchMode):
    """The most values of a floating result, and the dtypes that gathers return."""

    def __init__(self):
        super().__init__()
        self.largest, self.gathered = {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest[result.dtype] = max(self.largest.get(result.dtype, 0), result.numel())
            if function._opname == "index_select" and result.ndim == 2 and result.dtype == torch.uint8:
                self.gathered.add(result.dtype)
        return result


def test_the_packed_pass_gathers_bytes_and_makes_no_float_copy_of_the_clip():
    jepa, video = make().float(), byte_clips(2)
    context, _ = masks(2)
    with Wide() as seen, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        patches = LIBRARY.cut(jepa.encoder, video)
        LIBRARY.embed_sets(jepa.encoder, patches, context[:1])
    assert patches.pixels.dtype == torch.uint8
    assert seen.gathered == {torch.uint8}
    kept = context[0].numel() * patches.pixels.shape[-1]
    assert kept < video.numel()
    assert seen.largest[torch.bfloat16] == kept
    # A CPU widens the kept bytes by themselves, never those of the clip.
    assert seen.largest[torch.float32] == kept


def test_an_encoder_alone_asks_for_floats():
    encoder = make().encoder
    with pytest.raises(ValueError, match=r"VisionTransformer: expected normalised floats, given torch\.uint8 \(fastj"):
        encoder(byte_clips(1))
    with pytest.raises(ValueError, match=r"given torch\.uint8"):
        encoder.forward_sets(byte_clips(1), masks(1)[0])


def test_clips_of_other_integers_are_refused():
    for execution in ("reference", "packed"):
        with pytest.raises(ValueError, match=r"clips: expected uint8 or normalised floats, given torch\.int16"):
            make(execution)(byte_clips(2).short(), *masks(2))

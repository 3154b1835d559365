"""Frame numbers of the published sampler: every recorded call, with the integers that it drew."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from fastjepa.data.dataset import ClipDataset
from fastjepa.data.frames import clip_frames, clip_stride, segment_frames
from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.data.sampling import ClipPlan


class Recorded:
    """In place of a random generator: gives the recorded numbers, and notes the ranges that were asked for."""

    def __init__(self, numbers):
        self.numbers, self.asked = list(numbers), []

    def integers(self, low, high):
        self.asked.append([low, high])
        return self.numbers.pop(0)


@pytest.fixture(scope="module")
def calls(case):
    golden = case("10_frame_sampling")
    return [(call, golden.group(call["prefix"])) for call in golden.info["calls"]]


def rule(call):
    """(frames, stride, clips, overlap) of a call."""
    args = call["args"]
    frames = args["frames_per_clip"]
    stride = clip_stride(frames, args.get("frame_step", 0), args.get("duration"), call["fps"])
    return frames, stride, args["num_clips"], args.get("allow_clip_overlap", False)


def test_the_case_covers_every_way_to_sample(calls):
    assert len(calls) == 36
    assert len({json.dumps(call["args"]) for call, _ in calls}) == 10
    assert {"duration", "allow_clip_overlap", "random_clip_sampling", "filter_short_videos"} <= {
        key for call, _ in calls for key in call["args"]
    }
    assert not any(call["error"] for call, _ in calls)


def test_frame_numbers_are_those_of_the_published_code(calls):
    """Exact, with the recorded ends of the windows handed in."""
    for call, tensors in calls:
        if call["rejected"]:
            continue
        frames, stride, clips, overlap = rule(call)
        length, ends = call["n"], iter(tensors["drawn"].tolist())
        drawn = length // clips > frames * stride
        for number, wanted in enumerate(tensors["indices"].tolist()):
            end = None
            if drawn:
                end = next(ends) if call["args"].get("random_clip_sampling", True) else frames * stride
            got = segment_frames(length, frames, stride, end, clip=number, clips=clips, overlap=overlap)
            assert got.dtype == np.int64
            assert got.tolist() == wanted, call
        assert next(ends, None) is None, call


def test_draws_are_made_in_the_published_ranges_and_order(calls):
    for call, tensors in calls:
        if call["rejected"]:
            continue
        frames, stride, clips, overlap = rule(call)
        rng = Recorded(tensors["drawn"].tolist()) if call["args"].get("random_clip_sampling", True) else None
        got = [
            clip_frames(
                call["n"], frames, stride, rng, clip=number, clips=clips, overlap=overlap, fixed="start"
            ).tolist()
            for number in range(clips)
        ]
        assert got == tensors["indices"].tolist(), call
        assert call["draw_ranges"] == ([] if rng is None else rng.asked), call


class Blank:
    """A reader of one black video of this length."""

    paths = ("one.mp4",)

    def __init__(self, length):
        self.length = length

    def info(self, video):
        return SimpleNamespace(still=False, frames=self.length, height=8, width=8, rate=None)

    def read(self, video, frames):
        return np.zeros((len(frames), 8, 8, 3), dtype=np.uint8)


def test_videos_are_refused_for_their_length_where_the_published_code_does(calls):
    for call, _ in calls:
        frames, stride, _, _ = rule(call)
        plan = ClipPlan(0, np.arange(1), frames, stride, (0.3, 1.0), (0.75, 1.35), True)
        filtered = call["args"].get("filter_short_videos", False)
        with pytest.raises(TooManyBadFiles) if call["rejected"] else nullcontext():
            ClipDataset(Blank(call["n"]), plan, 8, filter_short=filtered)[0]
    assert sum(call["rejected"] for call, _ in calls) == 2

from fractions import Fraction
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.data.frames import clip_frames, clip_stride, rate_stride, segment_frames, timed_frames
from fastjepa.data.sampling import CROP_TRIES, Box, ClipPlan, central_box, random_box

SCALE, ASPECT = (0.3, 1.0), (0.75, 1.35)
sides = st.integers(1, 3000)


class Recorded:
    """In place of a random generator: gives recorded numbers, and notes what was asked for."""

    def __init__(self, *numbers):
        self.numbers, self.asked = list(numbers), []

    def integers(self, low, high):
        self.asked.append([low, high])
        return self.numbers.pop(0)

    uniform = integers


def plan(videos=range(7), seed=1, flip=True, scale=SCALE, aspect=ASPECT, **rule):
    return ClipPlan(seed, np.array(videos), 4, 2, scale, aspect, flip, **rule)


# -- frames -----------------------------------------------------------------------------------------------------------


def test_frame_numbers_are_those_of_the_published_code(recorded):
    info, tensors = recorded("10_frame_sampling")
    plain = [c for c in info["calls"] if c["args"] == {"frames_per_clip": 16, "frame_step": 4, "num_clips": 1}]
    assert len(plain) == 14
    for call in plain:
        rng = Recorded(*tensors[f"{call['prefix']}drawn"].tolist())
        numbers = clip_frames(call["n"], 16, 4, rng)
        assert numbers.dtype == np.int64
        assert numbers.tolist() == tensors[f"{call['prefix']}indices"][0].tolist(), call
        assert rng.asked == call["draw_ranges"]


def test_the_first_clip_of_a_long_video_is_the_one_in_the_specification():
    expected = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    assert clip_frames(65, 16, 4, Recorded(64)).tolist() == expected
    assert clip_frames(1000, 16, 4, Recorded(700)).tolist() == [636 + number for number in expected]


def test_a_video_of_exactly_one_window_is_read_like_a_shorter_one():
    rng = Recorded()
    assert clip_frames(64, 16, 4, rng).tolist() == [*(int(x) for x in np.linspace(0, 64, 16)[:-1]), 63]
    assert rng.asked == []


@given(st.integers(1, 2000), st.integers(2, 64), st.integers(1, 16), st.integers(0, 99))
def test_frames_lie_inside_the_video_in_order(length, frames, stride, seed):
    rng = np.random.default_rng(seed)
    for numbers in (clip_frames(length, frames, stride, rng), clip_frames(length, frames, stride, None)):
        assert numbers.shape == (frames,)
        assert numbers.dtype == np.int64
        assert numbers.min() >= 0
        assert numbers.max() <= length - 1
        assert (np.diff(numbers) >= 0).all()


@pytest.mark.parametrize(("length", "expected"), [(1, [0] * 8), (3, [0, *[2] * 7]), (9, [0, 3, 6, *[8] * 5])])
def test_a_short_video_is_spread_and_its_last_frame_repeated(length, expected):
    assert clip_frames(length, 8, 2, None).tolist() == expected
    assert clip_frames(length, 8, 2, Recorded()).tolist() == expected


def test_without_a_generator_the_clip_is_the_middle_one():
    numbers = clip_frames(164, 16, 4, None)
    assert (numbers[0], numbers[-1]) == (50, 113)


def test_every_window_of_a_video_can_be_drawn_except_the_last():
    """The end of the window is drawn below the length, so the very last frame is never seen, as published."""
    rng = np.random.default_rng(0)
    clips = [clip_frames(12, 4, 2, rng) for _ in range(300)]
    assert {int(clip[0]) for clip in clips} == {0, 1, 2, 3}
    assert max(int(clip[-1]) for clip in clips) == 10


def test_a_clip_at_rest_is_taken_from_the_middle_or_from_the_start():
    assert clip_frames(164, 16, 4, None, fixed="middle").tolist() == clip_frames(164, 16, 4, None).tolist()
    start = clip_frames(164, 16, 4, None, fixed="start")
    assert (start[0], start[-1]) == (0, 63)
    second = clip_frames(164, 16, 4, None, fixed="start", clip=1, clips=2)
    assert (second[0], second[-1]) == (82, 145)


@given(st.integers(1, 500), st.integers(2, 32), st.integers(1, 8), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_several_clips_lie_inside_the_video_each_in_its_own_segment(length, frames, stride, clips, overlap, seed):
    rng, room = np.random.default_rng(seed), length // clips
    for clip in range(clips):
        numbers = clip_frames(length, frames, stride, rng, clip=clip, clips=clips, overlap=overlap)
        assert numbers.shape == (frames,)
        assert numbers.dtype == np.int64
        assert (np.diff(numbers) >= 0).all()
        assert numbers.min() >= 0
        assert numbers.max() <= length - 1
        if room and not overlap:
            assert clip * room <= numbers.min()
            assert numbers.max() < (clip + 1) * room


def test_a_video_of_fewer_frames_than_clips_gives_still_clips_from_all_over_it():
    """The public code asks for frame -1 here."""
    clips = [clip_frames(3, 4, 1, None, clip=clip, clips=6).tolist() for clip in range(6)]
    assert clips == [[0] * 4, [0] * 4, [1] * 4, [1] * 4, [2] * 4, [2] * 4]
    assert clip_frames(1, 4, 1, None, clips=2, clip=1, overlap=True).tolist() == [0] * 4


@pytest.mark.parametrize(
    "wrong", [{"length": 0}, {"frames": 0}, {"stride": 0}, {"clips": 0}, {"clip": 2}, {"clip": -1}]
)
def test_a_clip_that_cannot_be_is_refused(wrong):
    right = {"length": 10, "frames": 4, "stride": 4, "end": None, "clip": 0, "clips": 2}
    assert len(segment_frames(**right)) == 4
    with pytest.raises(ValueError, match=r"^no clip -?\d of \d with \d frames at stride \d in a video of \d+ frames$"):
        segment_frames(**{**right, **wrong})


@pytest.mark.parametrize(("length", "end"), [(40, None), (40, 7), (40, 20), (16, 8)])
def test_an_end_that_is_not_of_the_segment_is_refused(length, end):
    with pytest.raises(ValueError, match=f"segment of {length // 2} frames .*{end}"):
        segment_frames(length, 4, 2, end, clips=2)
    assert len(segment_frames(40, 4, 2, 8, clips=2)) == 4


@pytest.mark.parametrize(
    ("duration", "rate", "stride"),
    [
        (None, None, 3),
        (3.0, Fraction(30000, 1001), 5),  # of the parity case
        (2.0, Fraction(24), 3),
        (2.0, 30.0, 3),
        (4.0, 30.0, 7),
        (0.5, 24.0, 1),  # 0 in the public code
    ],
)
def test_the_stride_of_a_duration_follows_from_the_frame_rate(duration, rate, stride):
    assert clip_stride(16, 3, duration, rate) == stride


def test_a_duration_needs_a_frame_rate():
    with pytest.raises(ValueError, match=r"^the stride of a clip of 2\.5 s follows from the frame rate, "):
        clip_stride(16, 4, 2.5, None)


def test_a_plan_with_a_duration_ignores_its_stride():
    by_time, by_stride = plan(duration=0.5), plan()
    for one, rate, window in ((by_time, Fraction(24), 12), (by_time, Fraction(60), 28), (by_stride, None, 8)):
        assert one.too_short(window, rate) == ""
        assert one.too_short(window - 1, rate) == (
            f"it has {window - 1} frames, fewer than the {window} that a clip spans"
        )
    for rate, stride in ((Fraction(24), 3), (Fraction(60), 7)):
        fixed = ClipPlan(1, np.arange(7), 4, stride, SCALE, ASPECT, True)
        assert by_time.clip(5, 100, 48, 64, rate).frames.tolist() == fixed.clip(5, 100, 48, 64).frames.tolist()


# -- frames per second ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "fps", "stride"), [(30, 7.5, 4), (24, 24, 1), (25, 5, 5), (60, 4, 15)])
def test_at_a_constant_rate_frames_per_second_are_a_stride(rate, fps, stride):
    times = np.arange(500) / rate
    for seed in range(50):
        numbers = timed_frames(times, 16, fps, np.random.default_rng(seed))
        assert np.diff(numbers).tolist() == [stride] * 15
        assert 0 <= numbers[0] <= numbers[-1] < 500


def test_frames_are_those_that_are_shown_at_the_time_whatever_the_rate_does():
    # Ten frames/s, then a still of two seconds, then forty frames/s.
    times = np.concatenate([np.arange(20) / 10, [2.0], 4 + np.arange(80) / 40])
    numbers = timed_frames(times, 24, 4, rng=None)
    begin = times[numbers[0]] + 0.0
    middle = (times[-1] + times[-1] / 100 - 6) / 2
    for k, number in enumerate(numbers.tolist()):
        shown = [i for i, time in enumerate(times) if time <= middle + k / 4 + 1e-6]
        assert number == max(shown, default=0)
    assert begin == 0
    assert (numbers == 20).sum() == 8, "what stands still for two seconds is in eight frames"


@given(
    st.lists(st.floats(0.001, 3), min_size=0, max_size=60), st.integers(1, 40), st.floats(0.1, 90), st.integers(1, 4)
)
def test_timed_frames_lie_inside_the_video_in_order(gaps, frames, fps, clips):
    times = np.cumsum([0.0, *gaps])
    for clip in range(clips):
        numbers = timed_frames(times, frames, fps, np.random.default_rng(0), clip=clip, clips=clips)
        assert numbers.shape == (frames,)
        assert numbers.dtype == np.int64
        assert numbers.min() >= 0
        assert numbers.max() < len(times)
        assert (np.diff(numbers) >= 0).all()


@pytest.mark.parametrize("rate", [24, 25, 30, 60, 24000 / 1001, 30000 / 1001, 60000 / 1001])
@pytest.mark.parametrize("stride", [1, 2, 4, 7])
def test_a_frame_whose_time_is_met_exactly_is_taken_whatever_rounding_does(rate, stride):
    times = np.arange(16 * stride) / rate
    assert timed_frames(times, 16, rate / stride, np.random.default_rng(0)).tolist() == list(
        range(0, 16 * stride, stride)
    )
    later = 1e4 + times  # hours into a recording
    assert timed_frames(later, 16, rate / stride, None).tolist() == list(range(0, 16 * stride, stride))


def test_each_clip_of_a_video_comes_from_its_part_of_the_time():
    times = np.arange(100) / 10
    for clip in range(4):
        for seed in range(20):
            numbers = timed_frames(times, 4, 5, np.random.default_rng(seed), clip=clip, clips=4)
            assert 25 * clip <= numbers[0] <= numbers[-1] < 25 * (clip + 1)


def test_a_video_shorter_than_the_clip_ends_with_its_last_frame_repeated():
    assert timed_frames(np.arange(4) / 10, 6, 10, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 3, 3]


def test_timed_clips_begin_anywhere_and_reach_the_end():
    times = np.arange(100) / 10
    clips = [timed_frames(times, 4, 5, np.random.default_rng(seed)) for seed in range(2000)]
    assert {int(clip[0]) for clip in clips} == set(range(92)), "0.8 of 10 s are the clip"
    assert max(int(clip[-1]) for clip in clips) == 97


@pytest.mark.parametrize("wrong", [{"clip": 2, "clips": 2}, {"frames": 0}, {"fps": 0.0}, {"clips": 0}])
def test_timed_frames_that_cannot_be_are_refused(wrong):
    clip = {"times": np.arange(9.0), "frames": 4, "fps": 2.0, "rng": None} | wrong
    with pytest.raises(ValueError, match=r"^no clip \d of \d with \d frames at "):
        timed_frames(**clip)


def test_a_plan_by_frames_per_second_needs_times_and_knows_what_is_too_short():
    by_fps = plan(fps=8.0)
    times = np.arange(60) / 24
    assert np.diff(by_fps.clip(3, 60, 48, 64, None, times).frames).tolist() == [3, 3, 3]
    assert by_fps.too_short(12, None, times[:12]) == ""
    assert by_fps.too_short(11, None, times[:11]) == "it lasts 0.458 s, less than the 0.5 s that a clip spans"
    with pytest.raises(ValueError, match="only where the times of the frames are known"):
        by_fps.clip(3, 60, 48, 64)


def test_a_whole_stride_goes_by_the_frame_rate_rounded_as_published_in_place_of_times():
    whole = plan(fps=8.0, whole_stride=True)
    rate = Fraction(30000, 1001)
    assert [rate_stride(fps, rate) for fps in (8.0, 5)] == [3, 6]
    assert [rate_stride(4, given) for given in (30, 23.976, 60, 12.5, 3)] == [7, 6, 15, 3, 1]
    by_stride = ClipPlan(1, np.arange(7), 4, 3, SCALE, ASPECT, True)
    for slot in range(5):
        assert whole.clip(slot, 60, 48, 64, rate).frames.tolist() == by_stride.clip(slot, 60, 48, 64).frames.tolist()
    assert whole.too_short(12, rate) == ""
    assert whole.too_short(11, rate) == "it has 11 frames, fewer than the 12 that a clip spans"
    assert not whole.shapes[0].by_times
    with pytest.raises(ValueError, match="at 8 frames/s follows from the frame rate, which is not known"):
        whole.clip(3, 60, 48, 64)


def test_clips_of_one_video_come_from_its_segments_in_order_with_draws_of_their_own():
    two, one = plan(clips_per_video=2), plan()
    for video_slot in range(20):
        first, second = (two.clip(2 * video_slot + number, 60, 48, 64) for number in range(2))
        assert first.frames.max() < 30 <= second.frames.min()
        assert first.frames.tolist() != (second.frames - 30).tolist() or first.box != second.box
        # Boxes and flips are those of the clip slot, whatever the number of clips.
        for number, draw in enumerate((first, second)):
            alone = one.clip(2 * video_slot + number, 60, 48, 64)
            assert (draw.box, draw.flip) == (alone.box, alone.flip)


# -- boxes ------------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(sides, sides, st.integers(0, 999))
def test_a_box_lies_inside_the_frame_with_area_and_aspect_in_range(height, width, seed):
    box = random_box(height, width, SCALE, ASPECT, np.random.default_rng(seed))
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width
    # Rounding moves a side by half a pixel at most.
    low, high = (box.width - 0.5) / (box.height + 0.5), (box.width + 0.5) / (box.height - 0.5)
    assert low <= ASPECT[1]
    assert high >= ASPECT[0] or box.height == 1
    if ASPECT[0] <= width / height <= ASPECT[1]:
        assert (box.height + 0.5) * (box.width + 0.5) >= SCALE[0] * height * width


def test_a_box_is_made_of_the_draws_in_the_published_order():
    rng = Recorded(0.5, log(1.2), 7, 9)
    area = 100 * 200 * 0.5
    height, width = round((area / 1.2) ** 0.5), round((area * 1.2) ** 0.5)
    assert random_box(100, 200, SCALE, ASPECT, rng) == Box(7, 9, height, width)
    assert rng.asked == [[0.3, 1.0], [log(0.75), log(1.35)], [0, 100 - height + 1], [0, 200 - width + 1]]


def test_a_draw_that_does_not_fit_is_repeated():
    too_wide = [1.0, log(1.35)]
    rng = Recorded(*too_wide, *too_wide, 0.25, 0.0, 1, 2)
    assert random_box(100, 100, SCALE, ASPECT, rng) == Box(1, 2, 50, 50)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (100, 1000, Box(0, (1000 - 135) // 2, 100, 135)),
        (1000, 75, Box(450, 0, 100, 75)),
        (100, 120, Box(0, 0, 100, 120)),
        (1, 1, Box(0, 0, 1, 1)),
        (1, 9, Box(0, 4, 1, 1)),
        (9, 1, Box(4, 0, 1, 1)),
    ],
)
def test_after_ten_draws_that_do_not_fit_the_box_is_the_central_one_of_allowed_aspect(height, width, expected):
    rng = Recorded(*([100.0, 0.0] * CROP_TRIES))
    assert CROP_TRIES == 10
    assert random_box(height, width, SCALE, ASPECT, rng) == expected
    assert rng.numbers == []


@pytest.mark.parametrize(("height", "width", "aspect"), [(9, 1, (3.0, 4.0)), (1, 9, (0.1, 0.2))])
def test_a_box_that_the_aspect_would_make_thinner_than_a_pixel_has_one(height, width, aspect):
    box = random_box(height, width, SCALE, aspect, Recorded(*([100.0, 0.0] * CROP_TRIES)))
    assert (box.height, box.width) == (1, 1)


def test_boxes_reach_all_edges_and_spread_over_the_range_of_areas():
    rng = np.random.default_rng(0)
    boxes = [random_box(40, 40, SCALE, ASPECT, rng) for _ in range(500)]
    assert {box.top == 0 for box in boxes} == {box.top + box.height == 40 for box in boxes} == {True, False}
    assert {box.left == 0 for box in boxes} == {box.left + box.width == 40 for box in boxes} == {True, False}
    areas = np.array([box.height * box.width / 1600 for box in boxes])
    assert 0.28 < areas.min() < 0.33
    assert areas.max() > 0.9
    ratios = np.log([box.width / box.height for box in boxes])
    assert ratios.min() < log(0.8)
    assert ratios.max() > log(1.25)


@given(sides, sides)
def test_the_central_box_is_the_largest_square(height, width):
    box = central_box(height, width)
    assert box.height == box.width == min(height, width)
    assert abs(2 * box.top + box.height - height) <= 1
    assert abs(2 * box.left + box.width - width) <= 1
    assert min(box.top, box.left) == 0


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_each_pass_takes_every_video_once_in_an_order_of_its_own():
    videos = [3, 5, 8, 13, 21, 34, 55]
    one = plan(videos)
    passes = [tuple(one.order.video(slot) for slot in range(7 * n, 7 * n + 7)) for n in range(20)]
    assert all(sorted(order) == videos for order in passes)
    assert len(set(passes)) == 20


def same(a, b):
    return np.array_equal(a.frames, b.frames) and (a.box, a.flip) == (b.box, b.flip)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=6), st.integers(0, 2**63 - 1))
def test_every_draw_depends_on_seed_and_slot_alone(slots, seed):
    used = plan(seed=seed)
    for slot in slots:
        fresh = plan(seed=seed)
        assert used.order.video(slot) == fresh.order.video(slot)
        assert same(used.clip(slot, 99, 48, 64), fresh.clip(slot, 99, 48, 64))
        for attempt in (0, 1, 15):
            assert used.order.replacement(slot, attempt) == fresh.order.replacement(slot, attempt)


def test_seeds_and_slots_give_other_draws():
    videos = range(100)
    clips = [plan(videos, seed).clip(slot, 500, 480, 640) for seed in range(3) for slot in range(10)]
    assert len({clip.frames.tobytes() for clip in clips}) > 25
    assert len({clip.box for clip in clips}) > 25
    assert {clip.flip for clip in clips} == {True, False}
    orders = {tuple(plan(videos, seed).order.video(slot) for slot in range(100)) for seed in range(3)}
    assert len(orders) == 3


def test_replacements_come_from_the_train_videos_and_differ_by_slot_and_attempt():
    videos = [3, 5, 8, 13, 21, 34, 55]
    drawn = [plan(videos).order.replacement(slot, attempt) for slot in range(20) for attempt in range(16)]
    assert set(drawn) == set(videos)
    assert len({tuple(drawn[16 * slot : 16 * slot + 16]) for slot in range(20)}) == 20


def test_half_of_the_clips_are_mirrored_or_none():
    flips = [plan().clip(slot, 50, 40, 40).flip for slot in range(400)]
    assert 150 < sum(flips) < 250
    still = [plan(flip=False).clip(slot, 50, 40, 40) for slot in range(50)]
    assert not any(clip.flip for clip in still)
    for slot, clip in enumerate(still):  # the setting moves nothing else
        assert same(clip, plan(flip=True).clip(slot, 50, 40, 40)) or plan(flip=True).clip(slot, 50, 40, 40).flip


def test_a_plan_keeps_to_its_ranges():
    whole = plan(scale=(1.0, 1.0), aspect=(1.0, 1.0))
    assert all(whole.clip(slot, 50, 40, 40).box == Box(0, 0, 40, 40) for slot in range(20))

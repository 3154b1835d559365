"""The probe measures what features know and nothing else."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fastjepa import probe
from fastjepa.data.dataset import Reader
from fastjepa.data.frames import clip_frames
from fastjepa.data.sampling import central_box
from fastjepa.data.source import open_videos
from fastjepa.data.transforms import cut
from fastjepa.probe import Accuracy, Cut, ProbeStopped, Protocol, linear_accuracy

CUT = Cut(frames=8, stride=1, crop=32)

# Linear accuracy


def split(train: int, validation: int, test: int) -> dict[str, torch.Tensor]:
    parts = torch.arange(train + validation + test).split([train, validation, test])
    return dict(zip(("train", "validation", "test"), parts))


def clusters(number: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around a centre for each of four classes, and the labels."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (number,), generator=rng)
    centres = torch.randn(4, 10, generator=rng, dtype=torch.float64)
    return centres[labels] + spread * torch.randn(number, 10, generator=rng, dtype=torch.float64), labels


def test_separable_classes_are_told_apart():
    features, labels = clusters(200, spread=0.1)
    assert linear_accuracy(features, labels, split(100, 40, 60), 4) == 1.0


def test_noise_is_at_chance():
    _, labels = clusters(1000, spread=0.1)
    noise = torch.randn(1000, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert 0.15 < linear_accuracy(noise, labels, split(300, 100, 600), 4) < 0.35


def test_harder_classes_score_between():
    features, labels = clusters(600, spread=2.0)
    assert 0.4 < linear_accuracy(features, labels, split(300, 100, 200), 4) < 0.95


def test_scale_offset_and_constant_features_do_not_matter():
    features, labels = clusters(300, spread=1.5)
    parts = split(150, 50, 100)
    scaled = features * torch.logspace(-4, 4, 10, dtype=torch.float64) + 1000.0
    constant = torch.full((300, 2), 3.7, dtype=torch.float64)
    want = linear_accuracy(features, labels, parts, 4)
    assert linear_accuracy(torch.cat([scaled, constant], dim=1), labels, parts, 4) == pytest.approx(want, abs=0.011)


def test_labels_of_validation_and_test_teach_nothing():
    """Features that name the class in the training split only are worth nothing."""
    _, labels = clusters(400, spread=0.1)
    parts = split(200, 50, 150)
    features = torch.nn.functional.one_hot(labels, 4).double()
    rng = torch.Generator().manual_seed(1)
    features[200:] = features[200:][torch.randperm(200, generator=rng)]
    assert linear_accuracy(features, labels, parts, 4) < 0.4


def test_the_penalty_is_chosen_on_validation_and_reported_on_test(monkeypatch):
    """Each penalty has its own fixed classifier, right on a given number of validation and test clips."""
    right = {1e-4: (3, 10), 1e-3: (8, 4), 1e-2: (6, 9), 1e-1: (8, 7)}
    labels = torch.cat([torch.arange(10) % 2, torch.ones(20, dtype=torch.int64)])
    # A column a penalty; positive says class 1, which is right for every clip of validation and test.
    features = torch.ones(30, 4, dtype=torch.float64)
    for column, (validation, test) in enumerate(right.values()):
        features[10 + validation : 20, column] = -1
        features[20 + test :, column] = -1
    features[:10] = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(5)[:, None]  # mean 0

    def fixed(x, y, classes, penalty, axes):
        assert torch.equal(y, labels[:10])
        weight = torch.zeros(4, 2, dtype=torch.float64)
        weight[list(right).index(penalty), 1] = 1.0
        return weight, torch.zeros(2, dtype=torch.float64)

    monkeypatch.setattr(probe.linear, "softmax_regression", fixed)
    assert list(right) == list(probe.linear.PENALTIES)
    assert linear_accuracy(features, labels, split(10, 10, 10), 2) == 0.4


def test_a_larger_penalty_gives_smaller_weights():
    features, labels = clusters(100, spread=1.0)
    norms = [probe.linear.softmax_regression(features, labels, 4, p)[0].norm().item() for p in probe.linear.PENALTIES]
    assert all(large > 1.2 * small for large, small in pairwise(norms))


# The probe of an encoder


class Stub(torch.nn.Module):
    """An encoder whose features are a given function of the clips; remembers their shapes."""

    def __init__(self, features) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))
        self.features, self.shapes = features, []

    def forward(self, clips):
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(clips.shape))
        return self.features(clips)


def go_on() -> bool:
    return False


def probed(trained, untrained, videos, reader, cut_out, stopped) -> list[Accuracy]:
    """The linear probe of two encoders."""
    how = Protocol(("linear",), cut_out)
    found = probe.probe(lambda: trained, lambda: untrained, videos, reader, how, stopped, folder=Path())
    return found.get("linear", [])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_videos("synthetic://moving-shapes?videos=48&size=48&frames=10", 0)


@pytest.fixture(scope="module")
def knowing(videos):
    """Features that name motion and shape of a clip, known by its pixels; the tokens differ, their mean counts."""
    known = {}
    everything = {"all": np.arange(len(videos.paths))}
    for numbers, clips in probe.features.read_clips(everything, Reader(videos.paths, 2), CUT, go_on):
        known.update({clip.numpy().tobytes(): number for number, clip in zip(numbers, clips)})
    assert len(known) == 48
    names = np.concatenate([np.eye(len(t.classes))[t.labels] for t in videos.tasks.values()], axis=1)

    def features(clips):
        rows = torch.from_numpy(names[[known[clip.numpy().tobytes()] for clip in clips]]).float()
        other = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        return torch.stack([rows + other, rows - other], dim=1)

    return features


def ignorant(clips):
    return torch.randn(len(clips), 2, 5, generator=torch.Generator().manual_seed(len(clips)))


@pytest.fixture
def few_pixels(monkeypatch):
    """The baseline on pixels takes most of the time, and most tests do not look at it."""
    monkeypatch.setattr(probe.features, "coarse_pixels", lambda clips: clips.mean(dim=(2, 3, 4)))


def test_features_that_know_beat_features_that_do_not(videos, knowing):
    trained, untrained = Stub(knowing), Stub(ignorant)
    results = probed(trained, untrained, videos, Reader(videos.paths, 2), CUT, go_on)
    assert [r.task for r in results] == ["motion", "shape"]
    for r in results:
        assert r.trained == 1.0
        assert r.untrained < 0.6
        assert r.pixels < 0.6
        assert r.chance < 0.5
        assert r.videos == 12
    assert trained.shapes == untrained.shapes == [(16, 3, 8, 32, 32)] * 3


def test_the_two_encoders_are_not_exchanged(videos, knowing, few_pixels):
    results = probed(Stub(ignorant), Stub(knowing), videos, Reader(videos.paths, 2), CUT, go_on)
    assert all(r.untrained == 1.0 and r.trained < 0.6 for r in results)


def test_the_clip_is_the_middle_of_the_video_and_the_centre_of_the_frame(videos):
    reader = Reader(videos.paths, 2)
    shape = Cut(frames=4, stride=2, crop=24)
    everything = {"all": np.arange(len(videos.paths))}
    numbers, clips = next(probe.features.read_clips(everything, reader, shape, go_on))
    assert numbers == list(range(16))
    frames = clip_frames(10, 4, 2, rng=None)
    assert frames.tolist() == [1, 3, 6, 8]
    assert torch.equal(clips[3], cut(reader.read(3, frames), central_box(48, 48), False, 24))


def test_a_duration_gives_the_clip_the_stride_of_its_video(videos):
    """10 frames at 24 frames/s, 4 frames over 0.35 s: a stride of 2."""
    reader = Reader(videos.paths, 2)
    by_time, by_stride = (
        next(probe.features.read_clips({"all": np.arange(16)}, reader, shape, go_on))[1]
        for shape in (Cut(4, 4, 24, duration=0.35), Cut(4, 2, 24))
    )
    assert torch.equal(by_time, by_stride)
    assert not torch.equal(
        by_time, next(probe.features.read_clips({"all": np.arange(16)}, reader, Cut(4, 4, 24), go_on))[1]
    )


def test_pixels_are_a_coarse_copy_of_the_clip():
    clips = torch.arange(2 * 3.0).view(2, 3, 1, 1, 1).expand(2, 3, 8, 24, 24)
    assert torch.equal(probe.features.coarse_pixels(clips), clips[:, :, :4, :12, :12].flatten(1))
    assert probe.features.coarse_pixels(clips[:, :, :2]).shape == (2, 3 * 2 * 12 * 12)


def test_unreadable_videos_are_left_out_and_the_others_keep_their_labels(videos, knowing, few_pixels, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    bad = {int(videos.splits["test"][0]), int(videos.splits["train"][3]), 0}
    paths = [str(tmp_path / "bad.mp4") if n in bad else path for n, path in enumerate(videos.paths)]
    encoder = Stub(knowing)
    results = probed(encoder, Stub(ignorant), replace(videos, paths=paths), Reader(paths, 2), CUT, go_on)
    assert sum(shape[0] for shape in encoder.shapes) == 48 - len(bad)
    tested = len(set(videos.splits["test"].tolist()) - bad)
    assert tested < 12
    assert [(r.trained, r.videos) for r in results] == [(1.0, tested)] * 2


@pytest.mark.parametrize("lost", ["train", "validation", "test", "all"])
def test_there_is_no_result_where_a_split_cannot_be_read(videos, knowing, few_pixels, lost):
    bad = range(48) if lost == "all" else videos.splits[lost].tolist()
    paths = ["absent.mp4" if n in bad else path for n, path in enumerate(videos.paths)]
    assert probed(Stub(knowing), Stub(ignorant), replace(videos, paths=paths), Reader(paths, 2), CUT, go_on) == []


def test_a_request_to_stop_ends_the_probe_at_the_next_batch(videos, knowing):
    encoder = Stub(knowing)
    answers = iter([False, False, True])
    with pytest.raises(ProbeStopped):
        probed(encoder, Stub(ignorant), videos, Reader(videos.paths, 2), CUT, lambda: next(answers))
    assert len(encoder.shapes) == 2


@pytest.mark.parametrize("lost", [[], [0, 20, 40]])
def test_chance_is_the_majority_class_of_train_on_test(videos, knowing, few_pixels, lost):
    """Also where videos in between cannot be read: the splits name videos, not rows."""
    labels = np.zeros(48, dtype=np.int64)
    labels[videos.splits["train"][:20]] = 2
    labels[videos.splits["test"][:5]] = 2
    labels[videos.splits["test"][5:]] = 1  # the majority of test, which must not count
    tasks = {"label": replace(videos.tasks["shape"], labels=labels)}
    paths = ["absent.mp4" if n in lost else path for n, path in enumerate(videos.paths)]
    (result,) = probed(
        Stub(knowing), Stub(ignorant), replace(videos, tasks=tasks, paths=paths), Reader(paths, 2), CUT, go_on
    )
    tested = [n for n in videos.splits["test"].tolist() if n not in lost]
    assert result.chance == pytest.approx(np.mean(labels[tested] == 2))
    assert result.videos == len(tested)


# What is reported


RESULTS = [Accuracy("motion", 0.9, 0.25, 0.125, 0.1, 480), Accuracy("shape", 1.0, 0.3, 0.2, 1 / 6, 480)]


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_the_table_has_a_line_a_task_in_columns(kind):
    head, *lines = probe.table(RESULTS, kind)
    assert head.split() == [kind, "probe", "trained", "untrained", "pixels", "chance", "test", "videos"]
    assert [line.split() for line in lines] == [
        ["motion", "90.0%", "25.0%", "12.5%", "10.0%", "480"],
        ["shape", "100.0%", "30.0%", "20.0%", "16.7%", "480"],
    ]
    for word, value in (("untrained", "25.0%"), ("chance", "10.0%")):  # right-aligned under their heads
        assert head.index(word) + len(word) == lines[0].index(value) + len(value)


def test_the_results_are_kept_as_json(tmp_path):
    probe.write(RESULTS, 3000, tmp_path / "run" / "probe")
    content = json.loads((tmp_path / "run" / "probe" / "step-0003000.json").read_text())
    assert (content["step"], content["probe"]) == (3000, "linear")
    assert [Accuracy(**r) for r in content["results"]] == RESULTS

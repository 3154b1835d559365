"""A probe as a whole: several clips and views of a video, one encoder after the other, what it costs and remembers."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastjepa import evaluation, probe
from fastjepa.build import build_jepa, draw_encoder
from fastjepa.config import Data, Mask, MaskSet, Model, Settings
from fastjepa.data.dataset import Reader
from fastjepa.data.frames import clip_frames
from fastjepa.data.source import open_videos
from fastjepa.data.views import views
from fastjepa.log import Log
from fastjepa.models import VisionTransformer
from fastjepa.probe import Baselines, Cut, Protocol, features
from fastjepa.probe.baselines import Baseline

CPU = torch.device("cpu")
LINEAR = Protocol(("linear",), Cut(4, 1, 16))


def go_on() -> bool:
    return False


def settings(**compat) -> Settings:
    s = Settings(
        model=Model(name="vit_nano", predictor_depth=1, predictor_dim=16),
        mask=Mask(sets=(MaskSet(num_blocks=2, spatial_scale=(0.3, 0.3), temporal_scale=(0.5, 0.5)),), group=1),
        data=Data(frames=4, stride=1, crop=16, patch=8),
    )
    return s.model_copy(update={"compat": s.compat.model_copy(update=compat)})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_videos("synthetic://moving-shapes?videos=24&size=32&frames=12", 0)


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch):
    monkeypatch.setattr(features, "coarse_pixels", lambda clips: clips.mean(dim=(2, 3, 4)))


# Several clips and views


def test_rows_are_the_views_of_a_video_and_its_segments_in_time_order(videos):
    reader, cut = Reader(videos.paths, 2), Cut(4, 1, 16, segments=3, views=2)
    members = {"train": np.array([5]), "test": np.array([2])}
    ((numbers, clips), *more) = features.read_clips(members, reader, cut, go_on)
    assert not more
    assert numbers == [2, 2, 5]  # two views of a test video, one of a video that is learned from
    assert clips.shape == (3 * 3, 3, 4, 16, 16)
    frames = [clip_frames(12, 4, 1, None, clip=number, clips=3, overlap=True) for number in range(3)]
    want = views(reader.read(2, np.concatenate(frames)), 16, 2)
    for view in range(2):
        for segment in range(3):
            assert torch.equal(clips[3 * view + segment], want[view][:, 4 * segment : 4 * segment + 4])
    rows = features.rows_of(
        {"train": np.array([5, 6]), "validation": np.array([7]), "test": np.array([2])}, [2, 2, 5, 6, 7, 7]
    )
    assert {name: row.tolist() for name, row in rows.items()} == {
        "train": [[2], [3]],
        "validation": [[4, 5]],
        "test": [[0, 1]],
    }


def test_tokens_of_the_segments_are_one_sequence(videos, tmp_path):
    encoder = draw_encoder(settings()).eval()
    cut, members = Cut(4, 1, 16, segments=2), {"train": np.arange(3)}
    with probe.tokens.TokenFile(tmp_path) as file:
        seen = features.encode(encoder, members, Reader(videos.paths, 2), cut, go_on, tokens=file)
        assert file.row_shape == (2 * encoder.num_patches, encoder.embed_dim)
    ((_, clips),) = features.read_clips(members, Reader(videos.paths, 2), cut, go_on)
    with torch.no_grad():
        want = encoder(clips).unflatten(0, (3, 2)).flatten(1, 2).mean(dim=1)
    assert torch.allclose(torch.cat(seen.means), want, atol=1e-5)


def test_all_three_classifiers_take_segments_and_views(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(probe.attentive, "EPOCHS", 1)
    s = settings()
    how = Protocol(probe.KINDS, Cut(4, 1, 16, segments=2, views=2), heads=2)
    encoder = evaluation.untrained_encoder(s, CPU)
    found = probe.probe(lambda: encoder, None, videos, Reader(videos.paths, 2), how, go_on, folder=tmp_path)
    assert list(found) == ["knn", "linear", "attentive"]
    for rows in found.values():
        assert [(r.task, r.videos, r.untrained) for r in rows] == [("motion", 6, None), ("shape", 6, None)]
        assert all(r.confusion[0].sum() == 6 for r in rows)
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_a_clip_that_stands_still(tmp_path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    ((_, clips),) = features.read_clips(
        {"train": np.array([0])}, Reader([str(tmp_path / "a.png")], 2), Cut(4, 1, 16, segments=2), go_on
    )
    assert clips.shape == (2, 3, 4, 16, 16)
    assert torch.equal(clips, clips[:1, :, :1].expand_as(clips))


# One encoder after the other


@pytest.mark.parametrize("reinit", [False, True])
def test_the_untrained_encoder_is_what_a_run_begins_with_to_the_bit(reinit):
    s = settings(reinit=reinit)
    want = build_jepa(s).target_encoder.state_dict()
    state = torch.get_rng_state()
    have = evaluation.untrained_encoder(s, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert want.keys() == have.state_dict().keys()
    assert all(torch.equal(have.state_dict()[name], value) for name, value in want.items())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_probe_holds_one_encoder_beside_those_of_the_run(videos, tmp_path, monkeypatch, sharded):
    """Encoders are counted at every pass of one; in a sharded run the weights that were gathered are let go, too."""
    s = settings()
    jepa = build_jepa(s)
    state = {name: value.clone() for name, value in jepa.target_encoder.state_dict().items()} if sharded else None
    alive: list[weakref.ref] = []
    made, most = VisionTransformer.__init__, 0

    def counted(self, *arguments, **named):
        made(self, *arguments, **named)
        alive.append(weakref.ref(self))

    def look(*_):
        nonlocal most
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))

    monkeypatch.setattr(VisionTransformer, "__init__", counted)
    real = features.encode

    def encode(encoder, *arguments, **named):
        look()
        seen = real(encoder, *arguments, **named)
        look()
        return seen

    monkeypatch.setattr(features, "encode", encode)
    evaluation.run_probe(s, jepa, videos, Log(tmp_path), 3, go_on, state)
    assert most == 1
    look()
    gc.collect()
    assert sum(one() is not None for one in alive) == 0  # and nothing afterwards
    assert not state


# What is remembered


def test_what_needs_no_training_is_measured_once(videos, tmp_path):
    s, drawn = settings(), []
    encoder = evaluation.untrained_encoder(s, CPU)

    def untrained():
        drawn.append(1)
        return encoder

    def go(how=LINEAR, of=videos):
        known = evaluation.baselines(s, of, how, tmp_path)
        return probe.probe(
            lambda: encoder, untrained, of, Reader(of.paths, 2), how, go_on, folder=tmp_path, known=known
        )

    first = go()
    assert go() == first
    assert len(drawn) == 1
    go(Protocol(("linear", "knn"), Cut(4, 1, 16)))  # the second kind is not known yet
    assert len(drawn) == 2
    go(Protocol(("linear",), Cut(4, 2, 16)))
    assert len(drawn) == 3
    go(of=replace(videos, splits={**videos.splits, "test": videos.splits["test"][:4]}))
    assert len(drawn) == 4
    (tmp_path / "untrained.json").write_text("half a li")
    assert go() == first
    assert len(drawn) == 5


def test_a_figure_without_the_untrained_encoder_is_not_taken_for_one_with_it(tmp_path):
    known = Baselines("key", tmp_path / "untrained.json")
    known.put("knn", {"motion": Baseline(None, None, 0.5)})
    assert known.get("knn", ["motion"], untrained=False)["motion"].pixels == 0.5
    assert known.get("knn", ["motion"], untrained=True) == {}
    assert known.get("knn", ["motion", "shape"], untrained=False) == {}
    assert Baselines("other", tmp_path / "untrained.json").get("knn", ["motion"], untrained=False) == {}


# What is reported


def test_one_kind_of_probe_never_takes_the_place_of_another(tmp_path):
    rows = [probe.Accuracy("motion", 0.5, None, 0.2, 0.1, 4, confusion=(np.eye(2), ("a", "b")))]
    for kind in probe.KINDS:
        probe.write(rows, 7, tmp_path, kind)
    probe.write(rows, 7, tmp_path, "knn", variant="8x3")
    probe.write(rows, None, tmp_path, "linear")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-0000007-attentive.json",
        "step-0000007-knn-8x3.json",
        "step-0000007-knn.json",
        "step-0000007.json",
        "weights.json",
    ]
    assert "confusion" not in json.loads((tmp_path / "weights.json").read_text())["results"][0]


@pytest.mark.parametrize("classes", [2, 8, 30, 400])
def test_the_confusion_picture_shows_shares_of_rows_and_as_many_names_as_can_be_read(classes, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shown, texts = [], []
    imshow, text = Axes.imshow, Axes.text
    monkeypatch.setattr(
        Axes, "imshow", lambda self, image, **named: shown.append(image) or imshow(self, image, **named)
    )
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, words, **named: texts.append((x, y, words)) or text(self, x, y, words, **named)
    )
    table = np.zeros((classes, classes), np.int64)
    table[0, 0], table[0, 1] = 3, 1  # the other rows have no videos
    path = tmp_path / "picture.png"
    probe.confusion_picture(table, tuple(f"class {number}" for number in range(classes)), "a title", path)
    (image,) = shown
    assert image[0, :2].tolist() == [0.75, 0.25]
    assert np.isnan(image[1:]).all()
    assert texts == ([(0, 0, "75%"), (1, 0, "25%")] if classes <= 15 else [])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_curves_get_a_figure_a_kind_and_task():
    rows = {
        "knn": [probe.Accuracy("motion", 0.5, 0.25, 0.2, 0.1, 4)],
        "linear": [probe.Accuracy("shape", 1.0, None, 0, 0, 4)],
    }
    assert probe.numbers(rows) == {
        "probe/knn/motion": 0.5,
        "probe/knn/motion/untrained": 0.25,
        "probe/linear/shape": 1.0,
    }

"""The probe and the pictures of a run: when they are made, what they leave behind, and what they must not touch."""

import json
from dataclasses import replace

import pytest
import torch

from fastjepa import pictures, probe, viz
from fastjepa.build import build_dataset, build_jepa, build_masks
from fastjepa.config import Data, Eval, Log, Mask, MaskSet, Model, Settings
from fastjepa.data.source import open_videos
from fastjepa.evaluation import draw_pictures, run_probe, should_probe
from fastjepa.log import RunLog
from fastjepa.probe import Accuracy, ProbeStopped, Protocol


def settings(wanted: str = "auto") -> Settings:
    return Settings(
        model=Model(name="vit_nano", predictor_depth=1, predictor_dim=16),
        mask=Mask(sets=(MaskSet(num_blocks=2, spatial_scale=(0.3, 0.3), temporal_scale=(0.5, 0.5)),), group=1),
        data=Data(frames=4, stride=1, crop=32, patch=8),
        eval=Eval(probe=wanted),
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_videos("synthetic://moving-shapes?videos=48&size=32&frames=6", 0)


@pytest.fixture
def run_log(tmp_path):
    with RunLog(tmp_path, Log(), "tiny", 10) as log:
        yield log


def said(run_log: RunLog) -> list[str]:
    return [line.split("  ", 1)[1] for line in (run_log.folder / "train.log").read_text().splitlines()]


# Whether


def test_labels_are_probed_unless_that_is_switched_off(videos):
    assert should_probe(settings("auto"), videos) == (True, "")
    assert should_probe(settings("linear"), videos) == (True, "")
    assert should_probe(settings("attentive"), videos) == (True, "")
    assert should_probe(settings("none"), videos) == (False, "")


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_without_labels_auto_says_why_not_and_a_given_probe_is_refused(videos, kind):
    unlabelled = replace(videos, tasks={}, splits={})
    wanted, why_not = should_probe(settings("auto"), unlabelled)
    assert not wanted
    assert "no labels" in why_not
    with pytest.raises(ValueError, match=rf"^eval\.probe: {kind} needs labels, and data\.path has none"):
        should_probe(settings(kind), unlabelled)
    assert should_probe(settings("none"), unlabelled) == (False, "")


# The probe


RESULTS = [Accuracy("motion", 0.9, 0.25, 0.125, 0.1, 12)]


def test_the_target_encoder_is_probed_beside_the_weights_that_the_run_began_with(videos, run_log, monkeypatch):
    s = settings()
    jepa = build_jepa(s)
    start = {name: value.clone() for name, value in jepa.target_encoder.state_dict().items()}
    with torch.no_grad():
        for p in jepa.target_encoder.parameters():
            p += 1
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    calls = []

    def watched(trained, untrained, videos_, reader, protocol, stopped, **named):
        assert trained() is jepa.target_encoder
        assert not trained().training
        assert not untrained().training
        assert all(torch.equal(value, start[name]) for name, value in untrained().state_dict().items())
        calls.append((videos_, reader.paths, protocol, stopped(), named["folder"]))
        return {"linear": RESULTS}

    monkeypatch.setattr(probe, "probe", watched)
    jepa.train()
    run_probe(s, jepa, videos, run_log, 30, lambda: False)
    protocol = Protocol(("knn", "linear"), probe.Cut(4, 1, 32), heads=2, seed=s.optim.seed)
    assert calls == [(videos, videos.paths, protocol, False, run_log.folder)]
    assert jepa.training
    assert jepa.encoder.training
    assert not jepa.target_encoder.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert said(run_log) == ["probing the features of step 30 ...", *probe.table(RESULTS)]
    content = json.loads((run_log.folder / "probe" / "step-0000030.json").read_text())
    assert content["results"][0]["trained"] == 0.9


@pytest.mark.parametrize("rule", [{"duration": 0.5}, {"fps": 6.0}], ids=str)
def test_the_probe_cuts_clips_by_the_rule_of_the_run(videos, run_log, monkeypatch, rule):
    s = settings()
    s = s.model_copy(update={"data": s.data.model_copy(update={"stride": 4, **rule})})
    calls = []

    def watched(trained, untrained, videos_, reader, protocol, stopped, **named):
        calls.append((reader, protocol.cut))
        return {"linear": RESULTS}

    monkeypatch.setattr(probe, "probe", watched)
    run_probe(s, build_jepa(s), videos, run_log, 30, lambda: False)
    ((reader, cut_out),) = calls
    assert cut_out == probe.Cut(4, 4, 32, **rule)
    assert reader.needs_rate == f"data.{next(iter(rule))}"


def test_a_probe_of_a_real_model_changes_nothing_in_it(videos, run_log, monkeypatch):
    monkeypatch.setattr(probe.features, "coarse_pixels", lambda clips: clips.mean(dim=(2, 3, 4)))
    s = settings()
    jepa = build_jepa(s)
    before = {name: value.clone() for name, value in jepa.state_dict().items()}
    run_probe(s, jepa, videos, run_log, 7, lambda: False)
    assert all(torch.equal(value, before[name]) for name, value in jepa.state_dict().items())
    results = json.loads((run_log.folder / "probe" / "step-0000007.json").read_text())["results"]
    assert [r["task"] for r in results] == ["motion", "shape"]
    assert all(r["trained"] == r["untrained"] for r in results)  # both have the first weights


def test_too_few_readable_videos_are_a_line_and_no_result(videos, run_log):
    lost = replace(videos, paths=["absent.mp4"] * 48)
    run_probe(settings(), build_jepa(settings()), lost, run_log, 7, lambda: False)
    assert said(run_log)[1:] == ["no probe: too few of the labelled videos can be read"]
    assert not (run_log.folder / "probe").exists()


def test_a_request_to_stop_ends_it_without_a_result(videos, run_log):
    with pytest.raises(ProbeStopped):
        run_probe(settings(), build_jepa(settings()), videos, run_log, 7, lambda: True)
    assert not (run_log.folder / "probe").exists()


# Pictures

FILES = ["loss.png", "curves.png", "pca.png", "pca.webp", "similarity.png", "masks.png", "clips.png", "index.html"]


@pytest.mark.parametrize("clips_per_video", [1, 2])
def test_the_pictures_are_drawn_of_the_first_step(videos, run_log, monkeypatch, clips_per_video):
    s = settings()
    s = s.model_copy(update={"data": s.data.model_copy(update={"clips_per_video": clips_per_video})})
    drawn, clips = [], []
    mask_picture, clip_picture = viz.mask_picture, viz.clip_picture

    def watched(*arguments):
        drawn.append(arguments)
        mask_picture(*arguments)

    monkeypatch.setattr(viz, "mask_picture", watched)
    monkeypatch.setattr(viz, "clip_picture", lambda *a: clips.append(a) or clip_picture(*a))
    run_log.metrics({"step": 1, "loss": 0.5, "loss_ratio": float("nan"), "rank": 3.0})
    folder = run_log.folder / "viz"
    assert draw_pictures(s, build_jepa(s), videos, run_log, 1) == [folder / name for name in FILES]
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))
    assert said(run_log) == [f"pictures   {folder}: {', '.join(FILES)}"]
    ((clip, context, target, tubelet, patch, _),) = drawn
    assert torch.equal(clip, build_dataset(s, videos)[0].clips[0])
    ((shown, titles, clip_tubelet, _),) = clips
    assert titles == ["clip 0", "clip 1", "clip 2", "clip 3"]
    for slot, have in enumerate(shown):
        video, number = divmod(slot, clips_per_video)
        assert torch.equal(have, build_dataset(s, videos)[video].clips[number])
    assert clip_tubelet == 2
    wanted = build_masks(s).draw(0, [0])
    assert all(torch.equal(a, b) for have, want in zip((context, target), wanted) for a, b in zip(have, want))
    assert (tubelet, patch) == (2, 8)


def test_the_features_are_those_of_the_target_encoder_or_of_the_gathered_weights(videos, run_log, monkeypatch):
    s, found = settings(), []
    fit = viz.fit
    monkeypatch.setattr(viz, "fit", lambda tokens: found.append(tokens) or fit(tokens))
    jepa, other = build_jepa(s), build_jepa(s).target_encoder
    with torch.no_grad():
        for p in [*jepa.encoder.parameters(), *other.parameters()]:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    jepa.train()
    modes = [module.training for module in jepa.modules()]
    draw_pictures(s, jepa, videos, run_log, 1)
    draw_pictures(s, jepa, videos, run_log, 1, dict(other.state_dict()))
    assert [module.training for module in jepa.modules()] == modes
    clips = pictures.clips_of(s, videos, pictures.Wanted()).clips
    for tokens, encoder in zip(found, (jepa.target_encoder, other)):
        with torch.no_grad():
            assert torch.allclose(tokens, viz.content(encoder(clips)), atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_a_run_without_rows_has_no_curves(videos, run_log):
    assert [p.name for p in draw_pictures(settings(), build_jepa(settings()), videos, run_log, 1)] == FILES[2:]


def test_what_goes_wrong_is_said_and_ends_nothing(videos, run_log, monkeypatch):
    def broken(*_):
        raise KeyError("a defect")

    monkeypatch.setattr(viz, "mask_picture", broken)
    files = draw_pictures(settings(), build_jepa(settings()), videos, run_log, 1)
    assert [p.name for p in files] == FILES[2:5]  # what had been made by then
    text = (run_log.folder / "train.log").read_text()
    assert f"warning: pictures: 'a defect' (details in train.log); python -m fastjepa viz {run_log.folder} dr" in text
    assert "Traceback" in text


def test_videos_that_have_vanished_leave_the_curves_and_the_page(videos, run_log):
    run_log.metrics({"step": 1, "loss": 0.5, "loss_ratio": 0.9, "rank": 3.0})
    lost = replace(videos, paths=["absent.mp4"] * len(videos.paths))
    files = draw_pictures(settings(), build_jepa(settings()), lost, run_log, 1)
    assert [p.name for p in files] == ["loss.png", "curves.png", "index.html"]
    features, masks = said(run_log)[:2]
    assert "no pictures of features: none of 42 videos that were tried can be read, absent.mp4" in features
    assert "no pictures of masks and clips: none of the " in masks
    assert "none of 42 videos that were tried can be read" in files[-1].read_text()

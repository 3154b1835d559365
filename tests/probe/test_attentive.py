"""The attentive probe: what it can tell, what it chooses on, what it leaves behind and what it must not move."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastjepa import evaluation, probe
from fastjepa.data.dataset import Reader
from fastjepa.data.source import open_videos
from fastjepa.exits import Exit
from fastjepa.models.clip_aggregation import mean_probabilities
from fastjepa.probe import Cut, ProbeStopped, Protocol, attentive, linear_accuracy, probing
from fastjepa.probe.scores import accuracy
from fastjepa.probe.tokens import TokenFile

CPU = torch.device("cpu")
CUT = Cut(frames=4, stride=1, crop=16)


def go_on() -> bool:
    return False


def parts(train: int, validation: int, test: int) -> dict[str, torch.Tensor]:
    rows = torch.arange(train + validation + test).split([train, validation, test])
    return dict(zip(("train", "validation", "test"), rows))


@pytest.fixture
def quick(monkeypatch):
    """A small grid and a small baseline: most tests do not look at how good the best is."""
    monkeypatch.setattr(probe.features, "coarse_pixels", lambda clips: clips.mean(dim=(2, 3, 4)))
    monkeypatch.setattr(attentive, "GRID", ((3e-3, 0.01), (1e-2, 0.1)))
    monkeypatch.setattr(attentive, "EPOCHS", 3)


# What it can tell and what it chooses on


def test_it_reads_one_token_among_many_which_a_linear_probe_on_the_mean_cannot(tmp_path, monkeypatch):
    """One token, at a random place and with a mark, names the class; all others name classes at random."""
    monkeypatch.setattr(attentive, "GRID", ((3e-3, 0.01), (1e-2, 0.1)))
    rng = torch.Generator().manual_seed(0)
    clips, tokens, classes = 700, 24, 4
    named = torch.randint(classes, (clips, tokens), generator=rng)
    x = 0.1 * torch.randn(clips, tokens, 16, generator=rng)
    x[:, :, :classes] += torch.nn.functional.one_hot(named, classes)
    place = torch.randint(tokens, (clips,), generator=rng)
    x[torch.arange(clips), place, 8:] += 1.0
    labels = named[torch.arange(clips), place]
    rows = parts(400, 100, 200)
    assert linear_accuracy(x.mean(dim=1).double(), labels, rows, classes) < 0.5
    with TokenFile(tmp_path) as file:
        file.append(x)
        found = attentive.classify(file, labels, rows, classes, 2, (0, 0), CPU, go_on)
    assert accuracy(found.probabilities, labels[rows["test"]]) > 0.95
    assert found.choice["validation"] > 0.95
    assert (found.choice["lr"], found.choice["weight_decay"]) in attentive.GRID


def test_the_choice_is_made_on_validation_and_reported_on_test(tmp_path, monkeypatch):
    """Each entry of the grid is right on a given number of validation and test clips; training is left out."""
    right = {(1e-4, 0.0): (3, 10), (1e-3, 0.1): (8, 4), (1e-2, 0.2): (6, 9), (1e-1, 0.3): (8, 7)}
    monkeypatch.setattr(attentive, "GRID", tuple(right))
    rows = parts(2, 10, 20)
    labels = torch.ones(32, dtype=torch.int64)
    verdict = torch.ones(32, 1, 4)  # the one token of a clip: 1 where an entry is right, else -1
    for entry, (validation, test) in enumerate(right.values()):
        verdict[2 + validation : 12, 0, entry] = -1
        verdict[12 + test :, 0, entry] = -1

    def fixed(tokens, labels, train, *_):
        assert torch.equal(train, rows["train"])
        return lambda x: torch.stack([-x[:, 0], x[:, 0]], dim=-1).transpose(0, 1)

    monkeypatch.setattr(attentive, "train_heads", fixed)
    with TokenFile(tmp_path) as file:
        file.append(verdict)
        monkeypatch.setattr(file, "read", lambda rows, device: verdict[rows])
        found = attentive.classify(file, labels, rows, 2, 2, (0, 0), CPU, go_on)
    assert accuracy(found.probabilities, labels[rows["test"]]) == 4 / 20
    assert found.choice == {"lr": 1e-3, "weight_decay": 0.1, "validation": 0.8}


def test_the_probabilities_of_a_video_are_the_mean_over_its_views(tmp_path, monkeypatch):
    """Three views of each of five videos, in batches that do not divide them, beside the published prediction."""
    monkeypatch.setattr(attentive, "BATCH", 7)
    logits = torch.randn(15, 2, 4, generator=torch.Generator().manual_seed(0))  # of each row by two classifiers
    rows = torch.randperm(15, generator=torch.Generator().manual_seed(1)).view(5, 3)
    with TokenFile(tmp_path) as file:
        monkeypatch.setattr(file, "read", lambda numbers, device: logits[numbers])
        have = attentive.probabilities(lambda x: x.transpose(0, 1), file, rows, CPU, go_on)
    want = [mean_probabilities([logits[rows[:, view], head] for view in range(3)]) for head in range(2)]
    assert torch.allclose(have, torch.stack(want))


# The probe of encoders


class Stub(torch.nn.Module):
    """An encoder with given tokens; counts its clips."""

    def __init__(self, tokens) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))
        self.tokens, self.clips = tokens, 0

    def forward(self, clips):
        assert not torch.is_grad_enabled()
        self.clips += len(clips)
        return self.tokens(clips)


def ignorant(clips):
    return torch.randn(len(clips), 5, 16, generator=torch.Generator().manual_seed(len(clips)))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_videos("synthetic://moving-shapes?videos=48&size=32&frames=6", 0)


@pytest.fixture(scope="module")
def knowing(videos):
    """Tokens that name motion and shape of a clip, known by its pixels, one among five."""
    known = {}
    everything = {"all": np.arange(len(videos.paths))}
    for numbers, clips in probe.features.read_clips(everything, Reader(videos.paths, 2), CUT, go_on):
        known.update({clip.numpy().tobytes(): number for number, clip in zip(numbers, clips)})
    names = [np.eye(len(task.classes))[task.labels] for task in videos.tasks.values()]
    names = torch.from_numpy(np.concatenate(names, axis=1)).float()

    def tokens(clips):
        rows = names[[known[clip.numpy().tobytes()] for clip in clips]]
        x = torch.zeros(len(clips), 5, 16)
        x[:, 3, : rows.shape[1]] = 5 * rows
        return x

    return tokens


@pytest.fixture
def go(videos, tmp_path, monkeypatch):
    """Probe two encoders; the files of tokens that were opened are in `go.files`."""
    files = []

    class Watched(TokenFile):
        def __init__(self, folder):
            super().__init__(folder)
            files.append(self)

    monkeypatch.setattr(probing, "TokenFile", Watched)

    def call(trained, untrained, stopped=go_on, videos_=videos, **more):
        reader = Reader(videos_.paths, 2)
        how = Protocol(("attentive",), CUT, heads=2, **more)
        found = probing.probe(lambda: trained, lambda: untrained, videos_, reader, how, stopped, folder=tmp_path)
        return found.get("attentive", [])

    call.files, call.folder = files, tmp_path
    return call


def closed(go) -> bool:
    return bool(go.files) and all(file._file.closed for file in go.files) and list(go.folder.iterdir()) == []


def test_features_that_know_beat_features_that_do_not(videos, knowing, go, monkeypatch):
    for name, value in (("GRID", ((1e-2, 0.01),)), ("EPOCHS", 40), ("BATCH", 8)):
        monkeypatch.setattr(attentive, name, value)
    trained, untrained = Stub(knowing), Stub(ignorant)
    results = go(trained, untrained)
    assert [r.task for r in results] == ["motion", "shape"]
    for r in results:
        assert r.trained > 0.9
        assert r.untrained < 0.6
        assert r.videos == 12
        assert r.trained_choice["validation"] > 0.9 > r.untrained_choice["validation"]
    assert trained.clips == untrained.clips == 48  # encoded once
    how = Protocol(("linear",), CUT)
    reader = Reader(videos.paths, 2)
    linear = probing.probe(lambda: Stub(ignorant), None, videos, reader, how, go_on, folder=go.folder)["linear"]
    assert [(r.pixels, r.chance) for r in results] == [(r.pixels, r.chance) for r in linear]
    assert closed(go)


def test_unreadable_videos_and_those_above_the_limit_are_left_out(videos, go, quick):
    bad = {int(videos.splits["test"][0]), int(videos.splits["train"][3])}
    lost = replace(videos, paths=["absent.mp4" if n in bad else path for n, path in enumerate(videos.paths)])
    encoder = Stub(ignorant)
    assert [r.videos for r in go(encoder, Stub(ignorant), videos_=lost)] == [11, 11]
    assert encoder.clips == 46
    encoder = Stub(ignorant)
    assert [r.videos for r in go(encoder, Stub(ignorant), most=24)] == [6, 6]
    assert encoder.clips == 24
    assert go(Stub(ignorant), Stub(ignorant), videos_=replace(videos, paths=["absent.mp4"] * 48)) == []


def test_a_result_is_the_same_twice_whatever_the_global_generators_say(knowing, go, quick):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        results.append(go(Stub(knowing), Stub(ignorant)))
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert results[0] == results[1]


def test_another_seed_trains_other_classifiers(videos, go, quick, tmp_path):
    labels = torch.arange(20) % 2
    with TokenFile(tmp_path) as file:
        file.append(ignorant(labels))
        one, same, seed, task = (
            attentive.train_heads(file, labels, torch.arange(20), 2, 2, key, CPU, go_on).decayed[0]
            for key in ((0, 0), (0, 0), (1, 0), (0, 1))
        )
    assert torch.equal(one, same)
    assert not torch.equal(one, seed)
    assert not torch.equal(one, task)


def test_a_request_to_stop_is_heard_between_batches_of_encoding_training_and_scoring(knowing, go, quick):
    asked = []
    go(Stub(ignorant), Stub(ignorant), stopped=lambda: asked.append(list(go.folder.iterdir())) or False)
    assert not any(asked)  # nothing to see while it runs either
    # Per encoder 3 batches of clips; per task one batch of 30 in each of 3 epochs, one of validation and one of test.
    assert len(asked) == 2 * (3 + 2 * (3 + 1 + 1))
    for last in range(len(asked)):
        go.files.clear()
        answers = iter([False] * last + [True])
        with pytest.raises(ProbeStopped):
            go(Stub(ignorant), Stub(ignorant), stopped=lambda answers=answers: next(answers))
        assert closed(go)


def test_files_are_closed_after_an_error(go, quick):
    def broken(clips):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        go(Stub(ignorant), Stub(broken))
    assert closed(go)


# In a run


def weights(folder):
    (shard,) = (folder / "checkpoints" / "step-0000010").glob("shard-*")
    return load_file(shard)


def test_a_run_with_attentive_probes_ends_with_the_same_weights(run, quick, capsys):
    _, plain = run(folder="plain")
    code, probed = run("eval.every=4", "eval.probe=attentive", folder="probed")
    assert code == Exit.DONE
    want, have = weights(plain), weights(probed)
    assert want.keys() == have.keys()
    assert all(torch.equal(have[name], value) for name, value in want.items())
    files = sorted((probed / "probe").glob("step-*"))
    assert [p.name for p in files] == [f"step-{step:07d}-attentive.json" for step in (4, 8, 10)]
    content = json.loads(files[-1].read_text())
    assert (content["step"], content["probe"]) == (10, "attentive")
    assert [r["task"] for r in content["results"]] == ["motion", "shape"]
    assert all(
        (r["trained_choice"]["lr"], r["trained_choice"]["weight_decay"]) in attentive.GRID for r in content["results"]
    )
    assert capsys.readouterr().out.count("attentive probe") == 3


def test_a_run_says_how_many_videos_are_probed_where_the_disk_holds_no_more(run, quick, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(evaluation.probe, "most_clips", lambda *row: asked.append(row) or 24)
    code, folder = run("eval.probe=attentive", "runtime.stop_at=1")
    assert code == Exit.DONE
    assert asked == [(2 * 4 * 4, 64, folder)]
    assert "probe of only 24 videos: the tokens of more do not fit" in capsys.readouterr().out
    (result, _) = json.loads((folder / "probe" / "step-0000001-attentive.json").read_text())["results"]
    assert result["videos"] == 6


def test_a_disk_that_holds_next_to_nothing_is_the_reason_that_is_given(run, monkeypatch, capsys):
    monkeypatch.setattr(evaluation.probe, "most_clips", lambda *_: 0)
    code, folder = run("eval.probe=attentive", "runtime.stop_at=1")
    assert code == Exit.DONE
    said = capsys.readouterr().out
    assert "probe of only 0 videos: the tokens of more do not fit" in said
    assert "no probe: those of 0 videos are too few" in said
    assert not (folder / "probe").exists()

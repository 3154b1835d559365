"""Pictures of runs as people have them, and what the verb says of mistakes."""

import shutil

import pytest
import torch

from fastjepa import pictures, viz
from fastjepa.__main__ import main
from fastjepa.build import build_jepa
from fastjepa.config import Settings
from fastjepa.data.source import open_videos
from fastjepa.exits import Exit
from fastjepa.fit import state_of
from fastjepa.interop import PREFIX
from fastjepa.pictures import Wanted, draw

MASKS = ["masks.png", "clips.png"]
FEATURES = ["pca.png", "pca.webp", "similarity.png"]
CURVES = ["loss.png", "curves.png"]


@pytest.fixture
def made(run):
    """The folder of a run of two steps."""
    code, folder = run("optim.steps=2")
    assert code == Exit.DONE
    return folder


def names(drawn):
    return [path.name for path in drawn.files]


def test_a_run_has_everything_in_its_folder(made, capsys):
    assert main(["viz", str(made)]) == Exit.DONE
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("made")] == [
        str(made / "viz" / name) for name in (*CURVES, *FEATURES, *MASKS, "index.html")
    ]
    assert "note" not in out


def test_a_checkpoint_of_a_run_leaves_the_pictures_of_the_run_alone(made):
    drawn = draw(made / "checkpoints" / "step-0000002")
    assert names(drawn) == [*CURVES, *FEATURES, *MASKS, "index.html"]
    assert {path.parent for path in drawn.files} == {made / "viz" / "step-0000002"}


def test_a_run_without_a_checkpoint_or_rows_has_masks_and_a_page(made, tmp_path):
    shutil.rmtree(made / "checkpoints")
    for name in ("metrics.jsonl", "status.json", "env.json", "train.log"):
        (made / name).unlink()
    drawn = draw(made, out=tmp_path / "out")
    assert names(drawn) == [*MASKS, "index.html"]
    assert "no pictures of features" in drawn.notes[0]
    assert {path.parent for path in drawn.files} == {tmp_path / "out"}


def test_videos_that_have_vanished_are_one_note_and_other_ones_take_their_place(made, run, tmp_path):
    videos = open_videos("synthetic://moving-shapes?videos=48&size=48&frames=8", 0)
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(3):
        shutil.copy(videos.paths[number], folder / f"<b>{number}$x_{{$.mp4")
    code, own = run(f"data.path={folder}", "optim.steps=2", folder="own")
    assert code == Exit.DONE
    moved = folder.rename(tmp_path / "moved")
    drawn = draw(own)
    assert names(drawn) == [*CURVES, "index.html"]
    assert drawn.notes == [f"no pictures of videos: data.path: no such folder or file: {folder}"]
    drawn = draw(own, data=str(moved))
    assert names(drawn) == [*CURVES, *FEATURES, *MASKS, "index.html"]
    assert drawn.notes == []
    drawn = draw(own, wanted=Wanted(videos=(str(moved / "<b>1$x_{$.mp4"),)))
    assert names(drawn) == [*CURVES, *FEATURES, "index.html"]
    assert "features of one clip alone" in drawn.notes[-1]


def test_weights_without_a_run_need_videos_and_have_pictures_of_features(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    data = {"frames": 16, "tubelet": 2, "patch": 16, "crop": 32}
    s = Settings.model_validate(
        {"model": {"name": "vit_tiny", "predictor_dim": 96, "predictor_depth": 1}, "data": data}
    )
    states = state_of(build_jepa(s)).items()
    path = tmp_path / "weights.pth.tar"
    torch.save({name: {PREFIX + k: v for k, v in state.items()} for name, state in states}, path)
    assert main(["viz", str(path)]) == Exit.WRONG_INPUT
    assert "is no run and names no videos: give a folder, a list or a video with --data PATH" in capsys.readouterr().err
    drawn = draw(path, data="synthetic://moving-shapes?videos=48&size=48&frames=8", wanted=Wanted(clips=2))
    assert names(drawn) == [*FEATURES, "index.html"]
    assert drawn.files[0].parent == tmp_path / "weights-viz"


def test_chosen_videos_come_first_and_the_chosen_patch_is_the_one(made, monkeypatch):
    asked = []
    picture = viz.similarity_picture
    monkeypatch.setattr(viz, "similarity_picture", lambda *a: asked.append(a) or picture(*a))
    draw(made, wanted=Wanted(videos=("5", "2"), patch=(1, 3, 2)))
    ((clips, maps, chosen, titles, *_),) = asked
    videos = open_videos("synthetic://moving-shapes?videos=48&size=48&frames=8", 0)
    assert [title[:6] for title in titles] == ["000005", "000002"]
    assert len(clips) == len(maps) == 2
    assert chosen == (1, 3, 2)
    assert maps[0][1, 3, 2] == pytest.approx(1)
    assert videos.paths[5].rpartition("/")[2].startswith("000005")


def test_held_out_clips_of_different_classes_are_shown(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    videos = open_videos("synthetic://moving-shapes?videos=48&size=48&frames=8", 0)
    order = pictures._spread(videos, 4, 0)
    test = set(videos.splits["test"].tolist())
    classes = [videos.tasks["motion"].labels[video] for video in order[:4]]
    assert len(set(classes)) == 4
    assert set(order) <= test
    assert len(set(pictures._spread(videos, 32, 0))) == 42  # then those of the training


def test_without_labels_clips_lie_evenly_over_the_list():
    videos = pictures.Videos([f"{n}.mp4" for n in range(10)], torch.arange(10).numpy(), "", "")
    assert pictures._spread(videos, 4, 0)[:4] == [0, 3, 6, 9]
    assert sorted(pictures._spread(videos, 4, 0)) == list(range(10))


MISTAKES = [
    (["absent"], "absent"),
    (["RUN", "--patch", "1,2"], "expected three whole numbers SLOT,ROW,COLUMN, given '1,2'"),
    (["RUN", "--patch", "2,0,0"], "--patch: expected SLOT,ROW,COLUMN from 0,0,0 to 1,3,3, given 2,0,0"),
    (["RUN", "--video", "48"], "--video: expected a number below 48, or a path, given 48"),
    (["RUN", "--video", "absent.mp4"], "--video: no such file, and no number of a video: absent.mp4"),
    (["RUN", "--data", "absent"], "data.path: no such folder or file: absent"),
    (["RUN", "--clips", "0"], "expected a whole number (from 1 to 16), given '0'"),
    (["RUN", "--device", "gpu"], "expected cpu, cuda or cuda:N, given 'gpu'"),
    (["RUN", "--networks", "encoder"], "unknown option --networks, nearest valid option: --network"),
    (["RUN", "--video", "NOVIDEO"], "NOVIDEO"),
    ([], "required: RUN"),
]


def test_mistakes_are_one_sentence(made, capsys, tmp_path):
    bad = tmp_path / "NOVIDEO.mp4"
    bad.write_bytes(b"no video")
    for arguments, sentence in MISTAKES:
        given = [{"RUN": str(made), "NOVIDEO": str(bad)}.get(word, word) for word in arguments]
        capsys.readouterr()
        assert main(["viz", *given]) == Exit.WRONG_INPUT, arguments
        err = capsys.readouterr().err
        assert sentence in err, arguments
        assert err.count("\n") == 1


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["viz", "--help"])
    assert exit_.value.code == 0
    assert "--patch SLOT,ROW,COLUMN" in capsys.readouterr().out

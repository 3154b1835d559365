"""Several collections as one: their videos, weights, labels, and which run that is."""

import numpy as np
import pytest

from fastjepa import config
from fastjepa.build import build_dataset
from fastjepa.config import Settings
from fastjepa.data.mixture import mix, open_collections
from fastjepa.data.source import open_videos
from fastjepa.probe.features import members_of


@pytest.fixture
def folders(tmp_path):
    """Two folders of 6 and 3 files, and two lists with labels."""
    for name, count in (("a", 6), ("b", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.mp4").touch()
    (tmp_path / "x.csv").write_text("".join(f"a/{n}.mp4,{'run' if n % 2 else 'walk'}\n" for n in range(6)))
    (tmp_path / "y.csv").write_text("b/0.mp4,walk\nb/1.mp4,swim\nb/2.mp4,swim\n")
    return tmp_path


def test_one_collection_is_itself(folders):
    plain = open_videos(str(folders / "a"), 0)
    for path in (str(folders / "a"), {str(folders / "a"): 3.0}):
        one = open_collections(path, 0)
        assert (one.paths, one.fingerprint, one.mixed) == (plain.paths, plain.fingerprint, ())


def test_videos_of_all_collections_stand_behind_one_another_with_their_weights(folders):
    videos = open_collections({str(folders / "a"): 3, str(folders / "b"): 1}, 0)
    assert [path[-7:] for path in videos.paths] == [f"a/{n}.mp4" for n in range(6)] + [f"b/{n}.mp4" for n in range(3)]
    assert videos.train.tolist() == list(range(9))
    assert [(one.videos.tolist(), one.weight) for one in videos.collections] == [
        (list(range(6)), 3.0),
        (list(range(6, 9)), 1.0),
    ]
    assert videos.description.startswith(f"2 collections: 75.0% 6 videos under {folders / 'a'}; 25.0% 3 videos under ")


def test_only_the_ratio_of_the_weights_tells_runs_apart(folders):
    def fingerprint(a, b):
        return open_collections({str(folders / "a"): a, str(folders / "b"): b}, 0).fingerprint

    assert fingerprint(3, 1) == fingerprint(6, 2)
    assert len({fingerprint(3, 1), fingerprint(1, 3), fingerprint(1, 1)}) == 3
    s = Settings()
    assert config.identity(s, fingerprint(3, 1)) != config.identity(s, fingerprint(1, 1))


def test_a_run_draws_from_the_collections_by_their_weights(folders):
    videos = open_collections({str(folders / "a"): 1, str(folders / "b"): 4}, 0)
    order = build_dataset(Settings(), videos).plan.order
    share = np.mean([order.video(slot) >= 6 for slot in range(4000)])
    assert abs(share - 0.8) < 4 * (0.16 / 4000) ** 0.5


def test_classes_of_the_same_name_are_one_and_unlabelled_videos_are_in_no_split(folders):
    paths = {str(folders / "x.csv"): 1, str(folders / "b"): 1, str(folders / "y.csv"): 1}
    videos = open_collections(paths, 0)
    task = videos.tasks["label"]
    assert task.classes == ("run", "swim", "walk")
    names = [task.classes[n] if n >= 0 else None for n in task.labels]
    assert names == ["walk", "run"] * 3 + [None] * 3 + ["walk", "swim", "swim"]
    split = np.concatenate(list(videos.splits.values()))
    assert sorted(split.tolist()) == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    # A probe of a part of them takes some of each collection.
    few = members_of(videos, 4)
    assert {number >= 9 for number in np.concatenate(list(few.values()))} == {True, False}
    assert sum(map(len, members_of(videos, 9).values())) == 9, "all that have labels, though others have none"


def test_numbers_mean_something_else_in_each_list_and_those_of_the_first_count(folders):
    (folders / "x.csv").write_text("".join(f"a/{n}.mp4,{n % 2}\n" for n in range(6)))
    (folders / "y.csv").write_text("b/0.mp4,0\nb/1.mp4,1\nb/2.mp4,2\n")
    videos = open_collections({str(folders / "b"): 1, str(folders / "x.csv"): 1, str(folders / "y.csv"): 1}, 0)
    assert videos.tasks["label"].classes == ("0", "1")
    assert sorted(np.concatenate(list(videos.splits.values())).tolist()) == list(range(3, 9))
    assert videos.description.endswith("(labels of 1 of the 3 collections)")


def test_collections_that_know_other_things_keep_their_labels_out(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shapes = open_videos("synthetic://moving-shapes?videos=16&size=48&frames=4", 0)
    listed = open_videos(str(folders / "x.csv"), 0)
    videos = mix([(shapes, 1.0), (listed, 1.0)])
    assert videos.tasks.keys() == {"motion", "shape"}
    assert max(np.concatenate(list(videos.splits.values()))) < 16
    assert set(videos.collections[0].videos.tolist()) == set(shapes.train.tolist()), "what a probe needs is kept out"
    assert (videos.tasks["motion"].labels[16:] == -1).all()


def test_a_collection_that_is_not_there_is_named(folders):
    with pytest.raises(ValueError, match=r"no such folder or file: .*/c$"):
        open_collections({str(folders / "a"): 1, str(folders / "c"): 1}, 0)

"""Where the labels of a probe come from: folders of classes, and a collection of its own to test on."""

import numpy as np
import pytest
from PIL import Image

from fastjepa.data.labelled import class_folders, open_labelled, with_test
from fastjepa.data.source import open_videos


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)


def video(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"never opened here")


def labels(videos, root) -> dict[str, str]:
    (task,) = videos.tasks.values()
    return {path.removeprefix(f"{root}/"): task.classes[label] for path, label in zip(videos.paths, task.labels)}


def test_the_first_folder_is_the_class_at_any_depth(tmp_path):
    for name in ("run/a.mp4", "run/deep/b.mkv", "sit/c.mp4", "stray.mp4"):
        video(tmp_path / name)
    found = open_labelled(str(tmp_path), 0)
    assert labels(found, tmp_path) == {"run/a.mp4": "run", "run/deep/b.mkv": "run", "sit/c.mp4": "sit"}
    assert sum(len(split) for split in found.splits.values()) == 3
    assert not open_labelled(str(tmp_path), 0, folders=False).tasks  # nobody asked for classes


def test_numbered_images_of_a_class_are_images_and_folders_of_frames_in_it_are_videos(tmp_path):
    for number in range(3):
        picture(tmp_path / "cat" / f"{number:04}.png")
        picture(tmp_path / "dog" / "first" / f"frame_{number:04}.jpg")
        picture(tmp_path / "dog" / "second" / f"frame_{number:04}.jpg")
    assert [kind for kind in open_videos(str(tmp_path), 0).paths if kind.endswith("cat")], "frames to anybody else"
    found = labels(class_folders(tmp_path), tmp_path)
    assert found == {
        **{f"cat/{number:04}.png": "cat" for number in range(3)},
        "dog/first": "dog",
        "dog/second": "dog",
    }


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("only/a.mp4",), "found 1 such folders"),
        (("a.mp4", "b.mp4"), "found 0 such folders"),
        (("train/x/a.mp4", "val/x/b.mp4"), "its folders are parts, not classes: give {root}/train"),
    ],
)
def test_what_is_no_folder_of_classes_is_refused_in_a_sentence(tmp_path, names, said):
    for name in names:
        video(tmp_path / name)
    with pytest.raises(ValueError) as refused:
        class_folders(tmp_path)
    assert said.format(root=tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def listed(folder, name, rows):
    path = folder / name
    path.write_text("".join(f'"{file}",{label}\n' for file, label in rows))
    return open_videos(str(path), 0)


def test_a_test_collection_is_what_is_tested_on_and_nothing_else(tmp_path):
    train = listed(tmp_path, "train.csv", [(f"t{number}.mp4", "abc"[number % 3]) for number in range(12)])
    test = listed(tmp_path, "val.csv", [("v0.mp4", "c"), ("v1.mp4", "b")])  # numbers classes otherwise
    both = with_test(train, test)
    (task,) = both.tasks.values()
    named = {path.rpartition("/")[2]: task.classes[label] for path, label in zip(both.paths, task.labels)}
    assert named["v0.mp4"] == "c"
    assert named["v1.mp4"] == "b"
    assert all(named[f"t{number}.mp4"] == "abc"[number % 3] for number in range(12))
    assert {both.paths[video].rpartition("/")[2] for video in both.splits["test"]} == {"v0.mp4", "v1.mp4"}
    assert (len(both.splits["train"]), len(both.splits["validation"])) == (10, 2)
    used = np.concatenate(list(both.splits.values()))
    assert sorted(used.tolist()) == list(range(14))


def test_a_class_that_cannot_be_learned_is_named(tmp_path):
    train = listed(tmp_path, "train.csv", [("a.mp4", "x"), ("b.mp4", "y")])
    test = listed(tmp_path, "val.csv", [("c.mp4", "x"), ("d.mp4", "new")])
    with pytest.raises(ValueError, match=r"classes that the others have not: new$"):
        with_test(train, test)

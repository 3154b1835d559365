"""A collection re-encoded: names, list and labels; what is done again and what is not; what is refused."""

import errno
import json
import os

import pytest

from fastjepa.data import prepare as prepare_module
from fastjepa.data.index import update_index
from fastjepa.data.media import probe
from fastjepa.data.prepare import Ledger, alone, check_place, prepare
from fastjepa.data.processes import Lost
from fastjepa.data.reencode import Recipe
from fastjepa.data.source import open_videos
from tests.packed import pack

RECIPE = Recipe()


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Prepare a collection into `out`; (result, list as it is read back, what was made now)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(path, out="out", recipe=RECIPE, workers=1):
        index = update_index(str(path), workers=1, say=print)
        entries = {entry.path: entry for entry in index.entries}
        root = str(path) if os.path.isdir(path) else os.path.dirname(path)
        place = tmp_path / out
        result = prepare(
            open_videos(str(path), 0), entries, root, place, Ledger(place, recipe), workers, lambda *_: None
        )
        made = open_videos(str(place / "videos.csv"), 0) if (place / "videos.csv").read_text() else None
        return result, made, sorted(os.path.relpath(one, root) for one in result.new)

    return run


@pytest.fixture
def folder(film, tmp_path):
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("b.mp4", "a.avi", "a.mkv", "deep/c d.mp4")):
        film.video(folder / name, frames=10 + number)
    (folder / "text.mp4").write_text("hello " * 99)
    return folder


def relative(videos, out):
    return [os.path.relpath(path, out) for path in videos.paths]


def test_a_folder_keeps_its_names_and_two_files_of_one_stem_do_not_meet(go, folder, tmp_path):
    result, made, new = go(folder)
    assert new == ["a.avi", "a.mkv", "b.mp4", "deep/c d.mp4"]
    assert relative(made, tmp_path / "out") == ["a.mp4", "a.mkv.mp4", "b.mp4", "deep/c d.mp4"]
    assert [probe(path).frames for path in made.paths] == [11, 12, 10, 13]
    assert result.failed == []
    # The folder itself is a collection too.
    assert sorted(open_videos(str(tmp_path / "out"), 0).paths) == sorted(made.paths)


def test_labels_and_the_order_of_a_list_are_carried_over(go, folder, tmp_path):
    listed = tmp_path / "list.csv"
    lines = [f"videos/{name}" for name in ("b.mp4,12", "a.mkv,3", "text.mp4,3", "b.mp4,12", "deep/c d.mp4::run fast")]
    listed.write_text("\n".join(lines) + "\n")
    _, made, _ = go(listed)
    assert relative(made, tmp_path / "out") == [
        "videos/b.mp4", "videos/a.mp4", "videos/b.mp4", "videos/deep/c d.mp4",
    ]  # fmt: skip
    task = made.tasks["label"]
    assert [task.classes[number] for number in task.labels] == ["12", "3", "12", "run fast"]


def test_strange_names_and_files_elsewhere_get_names_that_a_list_can_hold(go, film, tmp_path):
    strange = [b"caf\xe9.mp4", b'quote".mp4', b"#hash 5.mp4", b"line\nend.mp4"]
    (tmp_path / "here").mkdir()
    for number, name in enumerate(strange):
        film.video(tmp_path / "plain.mp4", frames=5 + number)
        os.rename(tmp_path / "plain.mp4", os.path.join(os.fsencode(tmp_path / "here"), name))
    _, made, _ = go(tmp_path / "here", out="one")
    assert sorted(probe(path).frames for path in made.paths) == [5, 6, 7, 8]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.csv").write_text(f"{tmp_path}/here/#hash 5.mp4::a\n../here/#hash 5.mp4::a\n")
    _, made, _ = go(tmp_path / "lists" / "list.csv", out="two")
    assert relative(made, tmp_path / "two") == [f"outside{tmp_path}/here/#hash 5.mp4"] * 2


def test_members_of_shards_are_taken_with_their_labels(go, film, tmp_path):
    for number in range(3):
        film.video(tmp_path / f"{number}.mp4", frames=6 + number)
    members = {}
    for number in range(3):
        members[f"in/{number}.mp4"] = (tmp_path / f"{number}.mp4").read_bytes()
        members[f"in/{number}.cls"] = str(number % 2).encode()
    pack(tmp_path / "shard.tar", members.items())
    _, made, _ = go(tmp_path / "shard.tar")
    assert relative(made, tmp_path / "out") == [f"shard/in/{number}.mp4" for number in range(3)]
    assert [made.tasks["label"].classes[number] for number in made.tasks["label"].labels] == ["0", "1", "0"]


def test_only_what_is_new_changed_failed_or_lost_is_made_again(go, folder, film, tmp_path):
    go(folder)
    assert go(folder)[2] == []
    film.video(folder / "b.mp4", frames=30)
    film.video(folder / "new.mp4", frames=8)
    os.utime(folder / "a.avi", ns=(1, 1))  # of the same size, and still another file
    (tmp_path / "out" / "a.mkv.mp4").unlink()
    ledger = tmp_path / "out" / "prepared.jsonl"
    failed = json.loads(ledger.read_text().splitlines()[-1]) | {"reason": "the decoder crashed"}
    with ledger.open("a") as out:
        out.write(json.dumps(failed) + "\n")
    _, made, new = go(folder)
    assert set(new) == {"a.avi", "a.mkv", "b.mp4", "new.mp4", os.path.relpath(failed["source"], folder)}
    assert [probe(path).frames for path in made.paths] == [11, 12, 30, 8, 13]
    assert go(folder)[2] == []


def test_what_a_killed_run_left_is_cleared_and_the_rest_is_kept(go, folder, tmp_path):
    go(folder)
    out = tmp_path / "out"
    (out / ".unfinished").mkdir()
    (out / ".unfinished" / "1234.part").write_bytes(b"half")
    assert len(open_videos(str(out), 0).paths) == 4, "what is unfinished is no video"
    (out / "prepared.jsonl").write_text((out / "prepared.jsonl").read_text()[:-20])
    _, made, new = go(folder)
    assert len(new) == 1, "the line that was torn"
    assert len(made.paths) == 4
    assert not (out / ".unfinished").exists()


def test_a_source_that_is_gone_leaves_the_list_and_its_file_stays(go, folder, tmp_path):
    go(folder)
    (folder / "b.mp4").unlink()
    result, made, new = go(folder)
    assert new == []
    assert result.gone == [str(folder / "b.mp4")]
    assert "b.mp4" not in relative(made, tmp_path / "out")
    assert (tmp_path / "out" / "b.mp4").exists()


def test_a_file_that_cannot_be_made_is_written_down_and_costs_only_itself(go, folder, monkeypatch):
    real = prepare_module.each_apart

    def broken(function, jobs, workers, limit):
        for number, answer in real(function, jobs, workers, limit):
            yield number, Lost("reading it took more than 120 s") if jobs[number][0].path.endswith("b.mp4") else answer

    monkeypatch.setattr(prepare_module, "each_apart", broken)
    result, made, _ = go(folder)
    assert [(os.path.basename(one.source), one.reason) for one in result.failed] == [
        ("b.mp4", "reading it took more than 120 s")
    ]
    assert len(made.paths) == 3
    monkeypatch.undo()


def test_a_full_disk_ends_it_and_keeps_what_was_made(go, folder, monkeypatch, tmp_path):
    def full(function, jobs, workers, limit):
        yield 0, function(jobs[0])
        yield 1, OSError(errno.ENOSPC, "No space left on device", jobs[1][1])

    monkeypatch.setattr(prepare_module, "each_apart", full)
    with pytest.raises(OSError, match="No space left on device"):
        go(folder)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(go(folder)[2]) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_errors_of_the_disk_are_told_from_those_of_a_file(monkeypatch, code, tmp_path):
    def fail(error):
        def reencode(*_):
            raise error

        monkeypatch.setattr(prepare_module, "reencode", reencode)
        return prepare_module._one((type("E", (), {"path": "a.mp4"}), "b.mp4", RECIPE, "."))

    assert fail(OSError(code, os.strerror(code))).errno == code
    assert fail(prepare_module.av.error.ExternalError(errno.EINVAL, "odd")).reason == "it cannot be encoded: odd"
    assert fail(prepare_module.VideoError("it has no video stream")).reason == "it has no video stream"


def test_labels_that_a_list_cannot_hold_are_written_so_that_it_can(go, film, tmp_path):
    film.video(tmp_path / "v.mp4", frames=6)
    content = (tmp_path / "v.mp4").read_bytes()
    for name, labels, wanted in (
        ("a", ["brushing teeth, adult", "run\nfast", "a\tb"], ["brushing teeth adult", "run fast", "a b"]),
        ("b", ["a, b", "a b"], ["0 a b", "1 a b"]),
    ):
        members = {f"{n}.{end}": data for n, label in enumerate(labels)
                   for end, data in (("mp4", content), ("json", json.dumps({"label": label}).encode()))}  # fmt: skip
        pack(tmp_path / f"{name}.tar", members.items())
        _, made, _ = go(tmp_path / f"{name}.tar", out=name)
        task = made.tasks["label"]
        found = [task.classes[number] for number in task.labels]
        assert sorted(found) == sorted(wanted)
        assert len(made.paths) == len(labels)


def test_names_like_those_of_unfinished_files_and_folders_like_files_are_no_trouble(go, film, tmp_path):
    for name in (".tmp-old/x.mp4", "y.part.mp4", "a.avi", "a.mp4/b.avi", f"{'n' * 245}.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        film.video(tmp_path / "videos" / name, frames=6)
    for again in (5, 0):
        result, made, new = go(tmp_path / "videos")
        assert (len(new), result.failed, len(made.paths)) == (again, [], 5)


def test_two_at_a_time_in_one_folder_are_refused(go, folder, tmp_path):
    with alone(tmp_path / "out"), pytest.raises(ValueError, match="is being prepared by another process"):
        go(folder)
    assert len(go(folder)[2]) == 4


def test_a_failure_of_what_is_gone_is_forgotten(go, folder, tmp_path):
    go(folder)
    ledger = tmp_path / "out" / "prepared.jsonl"
    failed = json.loads(ledger.read_text().splitlines()[-1]) | {"source": "/gone.mp4", "reason": "it crashed"}
    with ledger.open("a") as out:
        out.write(json.dumps(failed) + "\n")
    result, _, _ = go(folder)
    assert (result.failed, result.gone) == ([], [])


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_another_recipe_or_a_folder_of_something_else_is_refused(go, folder, tmp_path):
    go(folder)
    with pytest.raises(ValueError, match="was prepared with --short-side 256 --gop 16 --quality 23, given --short-"):
        Ledger(tmp_path / "out", Recipe(short_side=128))
    (tmp_path / "other").mkdir()
    Ledger(tmp_path / "other", Recipe())
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ValueError, match="expected a new folder or one prepared before"):
        Ledger(tmp_path / "other", Recipe())
    for text in ("", "hello\n", '{"format": "x"}\n', '{"format": "fastjepa prepared videos", "version": 2}\n'):
        (tmp_path / "other" / "prepared.jsonl").write_text(text)
        with pytest.raises(ValueError, match="is not what this program writes"):
            Ledger(tmp_path / "other", Recipe())


def test_a_place_that_overlaps_the_collection_is_refused(tmp_path):
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(videos)
    sources = [str(videos / "deep" / "a.mp4")]
    for out in (videos, videos / "new", tmp_path, tmp_path / "link" / "new"):
        with pytest.raises(ValueError, match=r"^--prepare: expected a folder "):
            check_place(out, str(videos), sources)
    for out in (videos / "deep", tmp_path):  # of a list: what it names counts
        with pytest.raises(ValueError, match=r"^--prepare: expected a folder without the collection in it"):
            check_place(out, str(tmp_path / "list.csv"), sources)
    check_place(tmp_path / "videos-small", str(videos), sources)
    check_place(videos / "new", str(tmp_path / "list.csv"), sources)

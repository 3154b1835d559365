"""Which videos count as guilty of a dead process, and who knows of them."""

import os

from fastjepa.data.crashes import Crashes
from fastjepa.data.guard import Guard


def test_what_other_processes_of_the_run_have_crashed_on_is_known(tmp_path):
    paths = ["a.mp4", "b.mp4"]
    Crashes(paths, tmp_path / "crashed_videos-3.jsonl").add(1, 5, "why")
    mine = Crashes(paths, tmp_path / "crashed_videos.jsonl")
    assert mine.known == {1: (5, "why")}
    assert not (tmp_path / "crashed_videos.jsonl").exists()
    (tmp_path / "crashed_videos-3.jsonl").write_bytes(b'{"half')
    assert Crashes(paths, tmp_path / "crashed_videos-1.jsonl").known == {}
    assert (tmp_path / "crashed_videos-3.jsonl").read_bytes() == b'{"half'


def test_a_disk_that_is_away_for_all_makes_no_video_guilty(tmp_path):
    """Two processes run out of time with two videos, twice; one alone that does so twice is guilty."""
    said = []
    guard = Guard(Crashes(["a.mp4", "b.mp4"]), 5.0, said.append)
    for _ in range(2):
        with guard.watching(2):
            for place, video in enumerate((0, 1)):
                guard._hands[place] = video, 7 + video
                os.write(guard._stacks[place], b"Timeout (0:00:05)!")
            assert guard.blame({0: 1, 1: 1}, 0)[1] is False
    assert guard.crashes.known == {}
    for convicted in (False, True):
        with guard.watching(2):
            guard._hands[0] = 0, 7
            os.write(guard._stacks[0], b"Timeout (0:00:05)!")
            assert guard.blame({0: 1}, 0)[1] is convicted
    assert guard.crashes.known == {0: (7, "decoding took more than 5 s")}

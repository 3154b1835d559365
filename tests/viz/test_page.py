"""One page that needs nothing beside it, whatever the run folder holds."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from fastjepa.viz import Record, Section, Shown, read_record, write_page

VOID = {"meta", "img", "br", "hr"}
HOSTILE = "<script>alert(\"1\")</script> & 'quoted' \x1b[31m\u202e.mp4"


class Checked(HTMLParser):
    """Balanced tags, text, and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.references, self.tags, self.words = [], [], set(), []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "data", "action", "poster", "background"):
                self.references.append(value)
            if name == "style":
                assert re.fullmatch(r"(background:#[0-9a-f]{6}|width:[0-9.]+%)", value), value
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)


def page(tmp_path, record, sections=(), settings=None, notes=(), now=1_000_000.0):
    path = tmp_path / "viz" / "index.html"
    write_page(path, record, sections, settings or {}, notes, now)
    text = path.read_text(encoding="utf-8")
    checked = Checked(text)
    assert all(reference.startswith("data:image/") for reference in checked.references)
    assert "script" not in checked.tags
    assert "link" not in checked.tags
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    return checked


def full_folder(folder):
    folder.mkdir()
    (folder / "probe").mkdir()
    (folder / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 0.5, "loss_ratio": 0.75, "verdict": "alive"}\n{"step": 6, "lo'
    )
    status = {"state": "failed", "step": 6, "steps": 12, "heartbeat": 999_990.0, "reason": HOSTILE}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "env.json").write_text(json.dumps({"torch": HOSTILE, "triton": None}))
    (folder / "command.txt").write_text(HOSTILE)
    (folder / "train.log").write_text(f"2026-01-01 00:00:00  all is well\n2026-01-01 00:00:01  warning: {HOSTILE}\n")
    (folder / "bad_files.jsonl").write_text(json.dumps({"path": HOSTILE, "reason": HOSTILE}) + "\n{half")
    result = {"task": HOSTILE, "trained": 0.5, "untrained": 0.25, "top_5": 1.0, "videos": 1200, "trained_choice": {}}
    (folder / "probe" / "step-0000006-knn.json").write_text(
        json.dumps({"step": 6, "probe": HOSTILE, "results": [result]})
    )
    (folder / "probe" / "step-0000007.json").write_text("[]")
    Image.new("RGB", (20, 10)).save(folder / "probe" / "confusion-motion.png")


def test_a_whole_run_is_read_and_all_that_comes_from_files_is_escaped(tmp_path):
    full_folder(tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record.rows == [{"step": 5, "loss": 0.5, "loss_ratio": 0.75, "verdict": "alive"}]
    assert record.bad == [(HOSTILE, HOSTILE)]
    assert [probe["step"] for probe in record.probes] == [6]
    svg = Section("Curves", HOSTILE, [Shown(b"<svg></svg>", HOSTILE, HOSTILE)], small=True)
    shown = page(tmp_path, record, [svg], {"data.path": HOSTILE, "mask.sets": [{"a": HOSTILE}]}, [HOSTILE])
    words = "".join(shown.words)
    hostile = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    # Note, reason, command, warning, file, its reason, task, probe, environment, two settings, text and caption.
    assert words.count(hostile) == 13
    assert "\x1b" not in words
    for expected in (
        "failed",
        "alive",
        "6 of 12",
        "0.750",
        "50.0%",
        "25.0%",
        "100.0%",
        "1,200",
        "1 file that could not",
    ):
        assert expected in words, expected
    assert len(shown.references) == 2  # the curve and the confusion matrix


def test_an_empty_folder_has_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    record = read_record(tmp_path / "run")
    assert record == Record("run")
    assert "run" in page(tmp_path, record).words


@pytest.mark.parametrize(("age", "said"), [(60, "training"), (7200, "training, but silent for 2.0 h")])
def test_a_run_that_says_nothing_for_long_is_called_silent(tmp_path, age, said):
    status = {"state": "training", "step": 1, "steps": 4, "heartbeat": 1_000_000.0 - age, "seconds_left": 30.0}
    shown = page(tmp_path, Record("run", status=status))
    assert said in shown.words
    assert "30 s" in shown.words


def test_the_step_is_that_of_the_last_row_where_the_status_knows_less(tmp_path):
    shown = page(tmp_path, Record("run", rows=[{"step": 30}], status={"state": "failed", "step": 0, "steps": 40}))
    assert "30 of 40" in shown.words


def test_of_many_bad_files_the_first_are_shown(tmp_path):
    shown = page(tmp_path, Record("run", bad=[(f"{n}.mp4", "broken") for n in range(80)]))
    assert "49.mp4" in shown.words
    assert "50.mp4" not in shown.words
    assert "and 30 more, in bad_files.jsonl" in shown.words


def test_the_newest_result_of_each_probe_is_shown(tmp_path):
    probes = [
        {"step": step, "probe": kind, "results": [{"task": "motion", "trained": step / 100}]}
        for step, kind in ((10, "knn"), (20, "linear"), (30, "knn"))
    ]
    words = page(tmp_path, Record("run", probes=probes)).words
    assert {"knn probe, step 30", "linear probe, step 20", "30.0%", "20.0%"} <= set(words)
    assert "10.0%" not in words

"""One page of a run: a single HTML file that needs nothing beside it, no network and no script.

All that comes from files (names of videos, settings, warnings) is escaped.
"""

import base64
import html
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastjepa.viz.palette import GREY, VERDICTS
from fastjepa.viz.record import Record
from fastjepa.viz.stylesheet import CSS

HALF = 760  # pixels of a picture that two columns have room for
KINDS = {".png": "image/png", ".webp": "image/webp", ".svg": "image/svg+xml"}
MOST_BAD_FILES = 50
# A run that says nothing for so long hangs, or was killed.
SILENT_SECONDS = 900.0
RUNNING = ("training", "evaluating")
STATES = {"done": VERDICTS["alive"], "failed": VERDICTS["collapsed"], "training": VERDICTS["position only"]}


@dataclass(frozen=True)
class Shown:
    """A picture of the page: a file, or the bytes of an SVG; with what a person should see in it."""

    picture: Path | bytes
    title: str
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and pictures; `small` ones stand beside each other."""

    title: str
    text: str
    pictures: Sequence[Shown]
    small: bool = False


def write_page(
    path: Path,
    record: Record,
    sections: Sequence[Section],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    now: float | None = None,
) -> None:
    """The page of a run.

    `settings` are those that differ from the defaults, by dotted key; `notes` tell what is missing. Errors: OSError.
    """
    now = time.time() if now is None else now
    title = _clean(record.name)
    body = [
        _header(record, now),
        *(f'<p class="note">{_clean(note)}</p>' for note in notes),
        _probes(record),
        *(_section(section) for section in sections),
        _events(record),
        _making(record, settings),
        f"<footer>drawn {_moment(now)} by fastjepa</footer>",
    ]
    text = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".tmp-{path.name}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _header(record: Record, now: float) -> str:
    status, chips = record.status, []
    state = status.get("state")
    if isinstance(state, str):
        silent = now - _float(status.get("heartbeat"), now)
        if state in RUNNING and silent > SILENT_SECONDS:
            chips.append(_chip(f"{state}, but silent for {_duration(silent)}", VERDICTS["stuck"]))
        else:
            chips.append(_chip(state, STATES.get(state, GREY)))
    word = status.get("verdict") or next((row["verdict"] for row in record.rows[::-1] if row.get("verdict")), None)
    if isinstance(word, str):
        chips.append(_chip(word, VERDICTS.get(word, GREY)))
    lines = [f"<h1>{_clean(record.name)}</h1>", f'<p class="chips">{"".join(chips)}</p>' if chips else ""]
    for key in ("verdict_text", "reason"):
        if isinstance(status.get(key), str) and status[key]:
            lines.append(f'<p class="lead">{_clean(status[key])}</p>')
    # A status that was written in an emergency may not know the step.
    step = max(_float(status.get("step"), 0.0), record.rows[-1]["step"] if record.rows else 0)
    steps = _float(status.get("steps"), 0.0)
    if steps > 0:
        lines.append(
            f'<div class="bar" role="img" aria-label="{step:.0f} of {steps:.0f} steps">'
            f'<span style="width:{min(100.0, 100 * step / steps):.1f}%"></span></div>'
        )
        lines.append(f'<dl class="figures">{_figures(record, step, steps, state)}</dl>')
    return f"<header>{''.join(line for line in lines if line)}</header>"


def _figures(record: Record, step: float, steps: float, state: object) -> str:
    last = record.rows[-1] if record.rows else {}
    shown = [("step", f"{step:,.0f} of {steps:,.0f}")]
    for key, name, form in (
        ("loss_ratio", "loss over the best constant", "{:.3f}"),
        ("loss", "loss", "{:.4f}"),
        ("rank", "effective rank", "{:.1f}"),
        ("clips_per_s", "clips/s", "{:,.4g}"),
        ("data_wait", "waits for data", "{:.0%}"),
    ):
        value = last.get(key)
        if isinstance(value, int | float):
            shown.append((name, form.format(value)))
    left = record.status.get("seconds_left")
    if state in RUNNING and isinstance(left, int | float):
        shown.append(("left", _duration(left)))
    if isinstance(record.status.get("heartbeat"), int | float):
        shown.append(("last sign of life", _moment(record.status["heartbeat"])))
    return "".join(f"<div><dt>{_clean(name)}</dt><dd>{_clean(value)}</dd></div>" for name, value in shown)


def _probes(record: Record) -> str:
    newest = {probe["probe"]: probe for probe in record.probes if probe["results"]}  # in the order of their steps
    if not newest and not record.confusions:
        return ""
    tables = "".join(_probe_table(kind, probe) for kind, probe in sorted(newest.items()))
    pictures = [Shown(path, path.stem.replace("-", " ")) for path in record.confusions]
    return (
        "<section><h2>What it learned</h2><p>Classifiers on frozen features: what those of the trained encoder tell, "
        f"beside those of an untrained one, pixels and chance.</p>{tables}{_gallery(pictures, small=True)}</section>"
    )


def _probe_table(kind: str, probe: Mapping[str, Any]) -> str:
    keys = list(dict.fromkeys(key for result in probe["results"] for key in result))
    keys = [key for key in keys if all(isinstance(result.get(key), int | float) for result in probe["results"])]
    head = "".join(f'<th class="number">{_clean(key.replace("_", " "))}</th>' for key in keys)
    rows = "".join(
        f"<tr><th>{_clean(result['task'])}</th>"
        + "".join(f'<td class="number">{_clean(_accuracy(result[key]))}</td>' for key in keys)
        + "</tr>"
        for result in probe["results"]
    )
    caption = f"{_clean(kind)} probe, step {probe['step']:,}"
    return _scrolled(f"<table><caption>{caption}</caption><tr><th>task</th>{head}</tr>{rows}</table>")


def _accuracy(value: float) -> str:
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"


def _section(section: Section) -> str:
    text = f"<p>{_clean(section.text)}</p>" if section.text else ""
    return f"<section><h2>{_clean(section.title)}</h2>{text}{_gallery(section.pictures, section.small)}</section>"


def _gallery(pictures: Iterable[Shown], small: bool) -> str:
    figures = "".join(_figure(shown) for shown in pictures)
    return f'<div class="{"small" if small else "large"}">{figures}</div>' if figures else ""


def _figure(shown: Shown) -> str:
    wide = False
    if isinstance(shown.picture, bytes):
        content, kind = shown.picture, KINDS[".svg"]
    else:
        content, kind = shown.picture.read_bytes(), KINDS[shown.picture.suffix]
        with Image.open(shown.picture) as picture:
            wide = picture.width > HALF
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    caption = f"<figcaption>{_clean(shown.text)}</figcaption>" if shown.text else ""
    tag = '<figure class="wide">' if wide else "<figure>"
    return f'{tag}<img alt="{_clean(shown.title)}" src="{source}">{caption}</figure>'


def _events(record: Record) -> str:
    parts = []
    if record.warnings:
        lines = "".join(f"<li>{_clean(line)}</li>" for line in record.warnings)
        parts.append(f"<h3>The last warnings</h3><ul>{lines}</ul>")
    if record.bad:
        shown = record.bad[:MOST_BAD_FILES]
        rows = "".join(f'<tr><td class="path">{_clean(path)}</td><td>{_clean(why)}</td></tr>' for path, why in shown)
        more = len(record.bad) - len(shown)
        rows += f'<tr><td colspan="2">and {more} more, in bad_files.jsonl</td></tr>' if more else ""
        table = _scrolled(f"<table><tr><th>file</th><th>why</th></tr>{rows}</table>")
        files = "1 file" if len(record.bad) == 1 else f"{len(record.bad)} files"
        parts.append(f"<details open><summary>{files} that could not be read</summary>{table}</details>")
    return f"<section><h2>What happened</h2>{''.join(parts)}</section>" if parts else ""


def _making(record: Record, settings: Mapping[str, Any]) -> str:
    groups: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        groups.setdefault(section, []).append(f"<tr><th>{_clean(name)}</th><td>{_clean(_plain(value))}</td></tr>")
    tables = "".join(
        f"<table><caption>{_clean(section or 'run')}</caption>{''.join(rows)}</table>"
        for section, rows in groups.items()
    )
    parts = [f'<h3>Settings that are not the defaults</h3><div class="groups">{tables}</div>' if tables else ""]
    if record.commands:
        parts.append(f"<h3>Command</h3><pre>{_clean(chr(10).join(record.commands))}</pre>")
    if record.env:
        rows = "".join(
            f"<tr><th>{_clean(key)}</th><td>{_clean(_plain(value))}</td></tr>" for key, value in record.env.items()
        )
        parts.append(f"<h3>Environment</h3>{_scrolled(f'<table>{rows}</table>')}")
    inner = "".join(parts)
    return f"<section><h2>How it was made</h2>{inner}</section>" if inner else ""


def _scrolled(table: str) -> str:
    return f'<div class="scrolled">{table}</div>'


def _chip(text: str, colour: str) -> str:
    return f'<span class="chip" style="background:{colour}">{_clean(text)}</span>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return "\n".join(_plain(one) for one in value) if any(isinstance(one, Mapping) for one in value) else str(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _clean(text: str) -> str:
    """Text as it may stand in a page: what cannot be printed is shown as its escape sequence."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return html.escape(shown, quote=True)


def _is_file(path: Path) -> bool:
    return path.is_file()


def _float(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

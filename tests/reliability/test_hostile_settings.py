"""C9: settings files made to harm: refused in one line at once, without executing, expanding or writing anything."""

import os
import sys
from pathlib import Path

import pytest

from fastjepa import configfile

DEEP = 1200


def aliases(make):
    """Twelve levels, each ten times the one below: a million million values in a few lines."""
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} {make(f'*a{n - 1}')}" for n in range(1, 13)]
    return "\n".join(lines) + "\n"


LISTS = aliases(lambda alias: f"[{', '.join([alias] * 10)}]")
MAPS = aliases(lambda alias: f"{{{', '.join(f'k{n}: {alias}' for n in range(10))}}}")
MERGES = "a: &a {b: 1}\nm0: &m0 {<<: *a}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n" for n in range(1, 13)
)
HOSTILE = {
    "aliases of lists": (LISTS, "not valid YAML: it stands for more than 100000 values"),
    "aliases of lists in a setting": (LISTS + "optim: {lr: *a12}", "it stands for more than"),
    "aliases of lists for a group": (LISTS + "optim: *a12", "it stands for more than"),
    "aliases of lists for mask sets": (LISTS + "mask: {sets: *a12}", "it stands for more than"),
    "aliases of maps": (MAPS + "data: {path: *a12}", "it stands for more than"),
    "merged maps": (MERGES + "optim: *m12", "it stands for more than"),
    "a list in itself": ("mask: {sets: &a [*a]}", "mask.sets.0: expected a group of settings, given [[...]]"),
    "a map in itself": ("data: &a {path: *a}", "data.path: unknown key path of path"),
    "a file in itself": ("&a {data: *a}", "unknown key data.data"),
    "brackets in brackets": ("a: " + "[" * DEEP + "]" * DEEP, "not valid YAML: a value cannot be read"),
    "maps in maps": ("a: " + "{a: " * DEEP, "not valid YAML: a value cannot be read"),
    "indented for ever": ("\n".join(" " * n + "a:" for n in range(1000)), "not valid YAML: a value cannot be read"),
    "a number of many digits": (f"optim: {{steps: {'9' * 5000}}}", "not valid YAML: a value cannot be read"),
    "a larger one": (f"optim: {{steps: {'9' * 4000}}}", "expected a whole number (at least 1), at most 1000000000"),
    "a hexadecimal one": (f"optim: {{steps: 0x{'f' * 9000}}}", "given a number that is too long to be shown"),
    "one for a key": (f"? 0x{'f' * 9000}\n: 1", "not valid YAML: a key of more than 4096 characters"),
    "one for a key of a group": (f"optim:\n  ? 0x{'f' * 9000}\n  : 1", "a key of more than 4096 characters"),
    "a long key": (f"optim:\n  ? {'k' * 100_000}\n  : 1", "a key of more than 4096 characters"),
    "an exponent": ("optim: {lr: 1e999999999}", "optim.lr: expected a number (at least 0), given inf"),
    "a zero byte": ("optim: {lr: \0}", "not valid YAML"),
    "a zero byte in a path": ('data: {path: "a\\0b"}', "at least one, without a zero byte, given 'a\\x00b'"),
    "a zero byte in a folder": ('log: {folder: "a\\0b"}', "log.folder: expected text that is not empty, without a"),
    "a zero byte in a resume": ('resume: "a\\0b"', "resume: expected text, without a zero byte, given 'a\\x00b'"),
    "a zero byte in a base": ('base: "a\\0b"', "a\\x00b: no such settings file"),
    "a zero byte in a mixture": ('data: {path: {"a\\0b": 1.0}}', "without a zero byte"),
    "no UTF-8": (b"log: {folder: \xff\xfe}", "cannot be read: 'utf-8' codec"),
    "UTF-16": ("log: {folder: runs}".encode("utf-16"), "cannot be read: 'utf-8' codec"),
    "half a surrogate": ('log: {folder: "\\ud800"}', "log.folder: expected text"),
    "an escape sequence in a key": ('"\\e[2J\\e[31mx": 1', "unknown key \\x1b[2J\\x1b[31mx"),
    "a line break in a key": ('"lr\\nTraceback": 1', "unknown key lr\\nTraceback"),
    "a line break in a key of a group": ('optim: {"lr\\nTraceback": 1}', "unknown key optim.lr\\nTraceback"),
    "text from right to left": ('optim: {"a\\u202eb": 1}', "unknown key optim.a\\u202eb"),
    "a key twice": ("optim: {lr: 1.0, lr: 2.0}", 'found duplicate key "lr"'),
    "a list for a key": ("? [a, b]\n: 1", "unknown key"),
    "a map for a key": ("? {a: b}\n: 1", "found unhashable key"),
    "null for a key": ("optim: {~: 1}", "unknown key optim.None"),
    "a python object": ("data: {path: !!python/object/apply:os.system [touch marker]}", "could not determine a constr"),
    "a python name": ("data: {path: !!python/name:os.system }", "could not determine a constructor"),
    "a python module": ("data: {path: !!python/module:antigravity }", "could not determine a constructor"),
    "a new python object": ("data: !!python/object/new:os.system [touch marker]", "could not determine a constructor"),
    "a tag of its own": ("%TAG ! tag:example.org,2000:\n---\ndata: !settings {}", "could not determine a constructor"),
    "a base of the system": ("base: /etc/passwd", "/etc/passwd: "),
    "a base that cannot be read": ("base: /proc/self/mem", "/proc/self/mem: cannot be read: "),
    "a base with a long name": (f"base: {'x' * 5000}", ": "),
    "a base that is a folder": ("base: .", ": no such settings file"),
    "a base that is a pipe": ("base: pipe", "pipe: no such settings file"),
    "a base that waits for ever": ("base: /dev/stdin", ": "),
}  # fmt: skip


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """The line for a file."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")

    def go(text, *overrides):
        content = text if isinstance(text, bytes) else text.encode()
        Path("run.yaml").write_bytes(content)
        with pytest.raises(SystemExit) as end:
            configfile.from_command_line(["run.yaml", *overrides])
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert sorted(os.listdir()) == ["pipe", "run.yaml"]
        lines = err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].isprintable()
        return lines[0]

    return go


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_line(refusal, monkeypatch, kind):
    text, words = HOSTILE[kind]
    imported = set(sys.modules)
    assert words in refusal(text)
    assert "antigravity" not in set(sys.modules) - imported


@pytest.mark.parametrize("kind", ["merged maps", "aliases of maps", "brackets in brackets", "a python object"])
def test_a_hostile_value_of_the_command_line_is_one_line(refusal, kind):
    value = " ".join(HOSTILE[kind][0].splitlines()) if kind == "a python object" else f"{{{kind}: &a [*a, *a, *b]}}"
    assert "data.path: not a valid YAML value" in refusal("", f"data.path={value}")


def test_a_moderate_use_of_anchors_is_no_attack(tmp_path):
    """They keep recipes short."""
    path = tmp_path / "run.yaml"
    path.write_text("mask: {sets: [&a {num_blocks: 3}, {<<: *a, max_keep: 9}, *a]}")
    sets = configfile.load(path).mask.sets
    assert [(one.num_blocks, one.max_keep) for one in sets] == [(3, None), (3, 9), (3, None)]

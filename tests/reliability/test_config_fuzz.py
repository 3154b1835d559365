"""C10: hundreds of malformed settings, by file and by command line: exit code 2, a line for each mistake, no traceback.

Which sentence each mistake gets is tested in tests/test_config_mistakes.py; here it is that nothing else ever happens.
"""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastjepa import config, configfile
from tests.test_config_mistakes import LEAVES, VALUES, yaml_of

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
WHOLE = [key for key, field in config.fields() if int in getattr(field.annotation, "__args__", [field.annotation])]
HUGE = {
    "a whole number beyond any size": "9" * 400,
    "one that is not written out": f"0x{'f' * 9000}",
    "2**63": str(2**63),
}
STRUCTURE = {
    "a list": "- model",
    "text": "hello",
    "a number": "7",
    "groups of null": "model:\noptim:\n",
    "a group of text": "model: vit_large",
    "a group of lists": "model: [name, vit_large]",
    "an unknown group": "modle: {name: vit_large}",
    "a setting at the top": "lr: 1.0",
    "a group in a group": "model: {model: {name: vit_large}}",
    "mask sets of numbers": "mask: {sets: [1, 2]}",
    "no mask sets": "mask: {sets: []}",
    "a map for mask sets": "mask: {sets: {num_blocks: 3}}",
    "a key twice": "loss: {exponent: 1.0, exponent: 2.0}",
    "a group twice": "loss: {exponent: 1.0}\nloss: {exponent: 2.0}",
    "two documents": "model: {}\n---\nmodel: {}",
    "an unclosed bracket": "model: {name: [vit_large}",
    "a tab": "model:\n\tname: vit_large",
    "an unclosed text": "model: {name: 'vit_large}",
    "its own base": "base: run.yaml",
    "a base that is a number": "base: 3",
    "a base that is not there": "base: nowhere.yaml",
}
TOKENS = [
    ":",
    "-",
    "[",
    "]",
    "{",
    "}",
    "&a",
    "*a",
    "!!int ",
    "!!bool ",
    "!!set ",
    "!!omap ",
    "!!binary ",
    "!",
    "|",
    ">",
]
TOKENS += [
    "'",
    '"',
    "#",
    "?",
    "%",
    "@",
    "`",
    "\0",
    "\n",
    "  ",
    "\t",
    "\u2028",
    "\ud800",
    "1e999",
    ".nan",
    "~",
    "0x",
    "<<: ",
]
TOKENS += ["---\n", "...\n", "_", "99999999999999999999", "2024-13-40"]


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """The lines of a refusal of these bytes and overrides, or None where they are accepted."""
    monkeypatch.chdir(tmp_path)
    for path in SHIPPED:
        shutil.copy(path, tmp_path)
    path = tmp_path / "run.yaml"
    there = {*os.listdir(tmp_path), path.name}

    def go(text, *overrides):
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        capsys.readouterr()
        code = None
        try:
            configfile.from_command_line([str(path), *overrides])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert (code, out) in ((None, ""), (2, ""))
        lines = err.splitlines()
        assert bool(lines) == (code == 2)
        assert all(line.startswith((str(tmp_path), "command line: ")) for line in lines), err
        assert set(os.listdir(tmp_path)) == there
        return lines or None

    return go


def malformed():
    """(name, text, overrides, the key that the line must name) of every generated mistake."""
    for number, key in enumerate(LEAVES):
        for place, (value, valid_for) in enumerate(VALUES.items()):
            if key in valid_for:
                continue
            if (number + place) % 2:
                yield f"{key}: {value[:20]}", yaml_of(key, value), (), key
            else:
                yield f"{key}={value[:20]}", "", (f"{key}={value}",), key
        yield f"{key} misspelt", yaml_of(f"{key}x", 1), (), f"{key}x"
    for key in WHOLE:
        for name, value in HUGE.items():
            yield f"{key}: {name}", yaml_of(key, value), (), key
            yield f"{key}={name}", "", (f"{key}={value}",), key
    for name, text in STRUCTURE.items():
        yield name, text, (), ""


def test_every_generated_mistake_is_one_line_that_names_it(refused):
    cases = list(malformed())
    assert len(cases) > 300
    assert len(WHOLE) > 15
    for name, text, overrides, key in cases:
        lines = refused(text, *overrides)
        assert lines is not None, f"{name} was accepted"
        assert len(lines) == (2 if name in ("groups of null", "mask sets of numbers") else 1), lines
        assert key in lines[0], name


def test_several_mistakes_are_as_many_lines(refused):
    rng = random.Random(5)
    cases = [(text, overrides, key) for _, text, overrides, key in malformed() if overrides]
    for _ in range(50):
        # One a group: a wrong value may hide what else is wrong with the same list.
        picked = {key.split(".")[0]: (overrides, key) for _, overrides, key in rng.sample(cases, 6)}
        lines = refused("", *(override for overrides, _ in picked.values() for override in overrides))
        assert len(lines) == len(picked)
        assert all(any(key in line for line in lines) for _, key in picked.values())


def mutated(rng, text):
    """A settings file with some bytes changed, taken out, put in or copied."""
    body = bytearray(text)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(body))
        kind = rng.choice(["token", "cut", "flip", "copy"])
        if kind == "token":
            body[at:at] = rng.choice(TOKENS).encode(errors="surrogatepass")
        elif kind == "cut" and len(body) > 20:
            del body[at : at + rng.randint(1, 10)]
        elif kind == "flip":
            body[at] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(body))
            body[at:at] = body[start : start + rng.randint(1, 40)]
    return bytes(body)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_mutated_recipe_is_refused_in_lines_or_accepted(refused, count):
    rng = random.Random(count)
    recipes = [path.read_bytes() for path in SHIPPED] + [configfile.dump(config.Settings()).encode()]
    outcomes = [refused(mutated(rng, rng.choice(recipes))) is None for _ in range(count)]
    assert 0.02 * count < sum(outcomes) < 0.7 * count  # else it is not mistakes that are tested


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_recipe_is_accepted(refused, path):
    assert refused(path.read_bytes()) is None


def test_the_real_command_line_refuses_too(tmp_path):
    """What holds in one process holds for a process of its own: a sample of everything, without importing torch."""
    cases = list(malformed())
    for name, text, overrides, key in random.Random(2).sample(cases, 17) + cases[-3:]:
        (tmp_path / "run.yaml").write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "fastjepa.train", "run.yaml", *overrides],
            cwd=tmp_path, capture_output=True, text=True, timeout=240,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, ""), name
        (line,) = done.stderr.splitlines()
        assert line.startswith(("run.yaml:", "nowhere.yaml:", "command line: ")), name
        assert key in line
        assert os.listdir(tmp_path) == ["run.yaml"]

"""Reading settings: a YAML file, an optional base, `key=value` overrides; and the sentences for what is wrong.

Every mistake of a file is found in one pass. Nothing here imports torch, so a typing error costs no waiting.
"""

import difflib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from fastjepa.config import SECTIONS, DataSet, Mask, MaskSet, Section, Settings, by_key, fields
from fastjepa.configchecks import cross_checks
from fastjepa.expectation import expectation

# A few lines of aliases can stand for more values than any memory holds; settings are some hundred.
MOST_VALUES = 100_000
LONGEST_KEY = 4096
USAGE = "usage: python -m fastjepa.train SETTINGS.yaml [key=value ...]"
HINT = """
  python -m fastjepa train configs/demo.yaml                            five minutes on a CPU, nothing to download
  python -m fastjepa train configs/small_data.yaml data.path=MY_VIDEOS  a folder of your own
  python -m fastjepa train --help optim                                 one group of settings: {}

The same command again continues a run. Ctrl-C saves and leaves; a second one leaves at once.""".format(
    ", ".join(SECTIONS)
)


class SettingsError(ValueError):
    """All mistakes of a settings file; `mistakes` holds one sentence each."""

    def __init__(self, mistakes: list[str]) -> None:
        mistakes = [_printable(mistake) for mistake in mistakes]
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


def load(path: str | Path, overrides: list[str] | None = None, *, stored: bool = False) -> Settings:
    """Settings from a YAML file and `key=value` overrides; `stored` is the file of a run that has begun.

    Errors: SettingsError with every mistake, each naming its place, what was expected, what was given and the nearest
    valid name.
    """
    path = Path(path)
    values, places = _read_with_base(path)
    mistakes = []
    for text in overrides or []:
        mistake = _override(values, places, text)
        mistakes += [mistake] if mistake else []
    settings, found = _validate(values, places, str(path), stored)
    mistakes += found
    if mistakes or settings is None:
        raise SettingsError(mistakes)
    return settings


def dump(settings: Settings) -> str:
    """YAML text of all settings; `load` reads it back to an equal object."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(settings.model_dump(mode="json", by_alias=True), text)
    return text.getvalue()


def restore(stored: Mapping[str, Any], source: str) -> Settings:
    """Settings from dotted keys, as `config.flat` gives them and a checkpoint keeps them.

    Errors: SettingsError, which names `source`.
    """
    values: dict[str, Any] = {}
    for key, value in stored.items():
        section, _, name = key.partition(".")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[key] = value
    settings, mistakes = _validate(values, {}, source, stored=True)
    if settings is None or mistakes:
        raise SettingsError(mistakes)
    return settings


def help_text(group: str = "") -> str:
    """Every key, or those of one group, with its default and help. Errors: SettingsError for an unknown group."""
    if group and group not in SECTIONS:
        near = difflib.get_close_matches(group, SECTIONS, n=1)
        hint = f", nearest valid group: {near[0]}" if near else ""
        raise SettingsError([f"--help: expected one of {', '.join(SECTIONS)}, given {group!r}{hint}"])
    lines = [USAGE, "", f"Settings{f' of {group}' if group else ''}, their defaults and what they do:"]
    if not group:
        lines[1:1] = [HINT]
    section = ""
    for key, field in fields():
        head = key.split(".")[0] if "." in key else ""
        if group and head != group:
            continue
        if head != section:
            section = head
            lines += ["", f"{head}: {SECTIONS[head].__doc__}" if head else ""]
        lines.append(f"  {key} = {_show(field.default)}")
        lines.append(f"      {field.description}; expects {expectation(field)}")
        insides: dict[str, type[Section]] = {"mask.sets": MaskSet, "data.path": DataSet}
        if key in insides:
            inner = insides[key]
            lines += [f"        {k} = {_show(f.default)}: {f.description}" for k, f in inner.model_fields.items()]
    return "\n".join(lines)


def from_command_line(arguments: list[str]) -> tuple[Settings, str]:
    """(settings, name of the run) of `python -m fastjepa.train FILE key=value ...`; prints and exits on mistakes."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        if not arguments:
            print(f"{USAGE}\n{HINT}", file=sys.stderr)  # noqa: T201
            sys.exit(2)
        groups = [word for word in arguments if not word.startswith("-") and not _names_a_file(word)]
        try:
            print(help_text(groups[0] if groups else ""))  # noqa: T201
        except SettingsError as error:
            print(error, file=sys.stderr)  # noqa: T201
            sys.exit(2)
        sys.exit(0)
    try:
        return load(arguments[0], arguments[1:]), Path(arguments[0]).stem
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _names_a_file(word: str) -> bool:
    return "=" in word or word.endswith((".yaml", ".yml")) or Path(word).exists()


def _show(value: Any) -> str:
    if isinstance(value, Section):
        return "{" + ", ".join(f"{key}: {_show(inner)}" for key, inner in value) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _printable(text: str) -> str:
    """Line breaks, escape sequences and the like are shown, not sent to the console."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _given(value: Any) -> str:
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # of thousands of digits
        text = "a number that is too long to be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _beyond_limits(problem: Any) -> str:
    """What pydantic's problem adds to the expectation of the field: limits that all fields have."""
    return f", {problem['ctx']['error']}" if problem["type"] == "value_error" else ""


def _nearest(word: str, valid: list[str]) -> str:
    # The right name under the wrong head, or without one, comes before names that only look alike.
    same = [key for key in valid if key.rpartition(".")[2] == word.rpartition(".")[2]]
    close = same or difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f", nearest valid key: {close[0]}" if close else ""


def _place(places: dict[str, str], key: str, file: str) -> str:
    """Where the value of a key came from: its own entry, or that of what holds it."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, file)


def _parse(text: str) -> Any:
    """Errors: YAMLError."""
    try:
        # Looked at before anything is made of it: merging what aliases stand for may take for ever.
        yaml = YAML(typ="safe", pure=True)
        node = yaml.compose(text)
        if _values(node, {}) > MOST_VALUES:
            raise YAMLError(f"it stands for more than {MOST_VALUES} values")
        return None if node is None else yaml.constructor.construct_document(node)
    except (ValueError, LookupError, RecursionError) as error:  # 2024-02-30, !!bool perhaps, a thousand brackets
        raise YAMLError(f"a value cannot be read: {error}") from None


def _values(node: Node | None, known: dict[int, int]) -> int:
    """How many values a document has once every alias is written out; what contains itself counts once there.

    Errors: YAMLError where a key is longer than the name of any setting or file.
    """
    if node is None or isinstance(node, ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1
        if isinstance(node, MappingNode) and any(len(key.value) > LONGEST_KEY for key, _ in node.value):
            raise YAMLError(f"a key of more than {LONGEST_KEY} characters")
        parts = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _read(path: Path) -> dict[str, Any]:
    try:
        present = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise SettingsError([f"{path}: cannot be read: {error.strerror}"]) from None
    if str(path).startswith("-"):
        raise SettingsError([f"{path}: expected a settings file, such as configs/demo.yaml; settings are key=value"])
    if not present and path.is_dir():
        known = ", ".join(sorted(str(one) for one in path.glob("*.y*ml"))[:4])
        holds = f" that holds {known}" if known else ""
        raise SettingsError([f"{path}: no such settings file, it is a folder{holds}"])
    if not present:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1, cutoff=0.4)
        hint = f", nearest: {path.parent / near[0]}" if near else ""
        raise SettingsError([f"{path}: no such settings file{hint}"])
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: cannot be read: {error}"]) from None
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        problem = str(error.problem or error).splitlines()[0]
        raise SettingsError([f"{path}:{line} not valid YAML: {problem}"]) from None
    except YAMLError as error:
        raise SettingsError([f"{path}: not valid YAML: {str(error).splitlines()[0]}"]) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError([f"{path}: expected a mapping of settings, given a {type(content).__name__}"])
    return content


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A file, its base, the base of that and so on, each with what it says."""
    found: list[tuple[Path, dict[str, Any]]] = []
    known: set[Path] = set()
    while True:
        content = _read(path)
        base = content.pop("base", None)
        found.append((path, content))
        if path.resolve() in known:
            files = " -> ".join(str(one) for one, _ in found)
            raise SettingsError([f"{path}: base: expected bases that come to an end, given {files}"])
        if base is None:
            return found
        if not isinstance(base, str):
            raise SettingsError([f"{path}: base: expected the name of a YAML file, given {_given(base)}"])
        known.add(path.resolve())
        path = path.parent / base


def _read_with_base(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(merged values, file that each top-level.key came from)."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for source, content in reversed(_chain(path)):
        for head, value in content.items():
            if head in SECTIONS and isinstance(value, dict):
                if not isinstance(values.get(head), dict):
                    values[head] = {}
                values[head].update(value)
                places.update({f"{head}.{key}": str(source) for key in value})
            else:
                values[head] = value
            places[str(head)] = str(source)
    return values, places


def _override(values: dict[str, Any], places: dict[str, str], text: str) -> str | None:
    """Put one `key=value` into the values; returns a sentence where it is not one."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return f"command line: expected key=value, given {text!r}"
    try:
        value = _parse(raw) if raw.strip() else ""
    except YAMLError:
        return f"command line: {key}: not a valid YAML value: {raw!r}"
    head, *rest = key.split(".")
    places[key] = "command line"
    if not rest:
        values[head] = value
        return None
    places.setdefault(head, "command line")
    branch = values.setdefault(head, {})
    if not isinstance(branch, dict):
        return f"command line: {key}: {head} is not a group of settings in the file"
    if head == "mask" and rest[0] == "sets" and len(rest) > 1 and rest[1].isdecimal():
        return _override_mask_set(branch, int(rest[1]), rest[2:], value)
    branch[".".join(rest)] = value
    return None


def _override_mask_set(branch: dict[str, Any], number: int, rest: list[str], value: Any) -> str | None:
    sets = branch.get("sets", [s.model_dump(mode="json") for s in Settings().mask.sets])
    if not isinstance(sets, list) or not sets:
        return f"command line: mask.sets.{number}: mask.sets is not a list of mask sets in the file"
    if number >= len(sets) or len(rest) != 1 or not isinstance(sets[number], dict):
        return f"command line: mask.sets.{number}: expected mask.sets.0.KEY to mask.sets.{len(sets) - 1}.KEY"
    branch["sets"] = [{**s, rest[0]: value} if place == number else s for place, s in enumerate(sets)]
    return None


def _validate(
    values: dict[str, Any], places: dict[str, str], file: str, stored: bool
) -> tuple[Settings | None, list[str]]:
    mistakes: list[str] = []
    broken: set[str] = set()
    valid: dict[str, Any] = {}
    keys = [key for key, _ in fields()]
    for head, content in values.items():
        where = places.get(str(head), file)
        if head in SECTIONS:
            if not isinstance(content, dict):
                mistakes.append(f"{where}: {head}: expected a group of settings, given {_given(content)}")
                broken.update(key for key in keys if key.startswith(f"{head}."))
                continue
            valid[head], found = _validate_section(head, content, places, where, broken)
            mistakes += found
        elif head in Settings.model_fields:
            try:
                Settings.model_validate({head: content})
                valid[head] = content
            except ValidationError as error:
                more = _beyond_limits(error.errors()[0])
                expected = expectation(Settings.model_fields[head])
                mistakes.append(f"{where}: {head}: expected {expected}{more}, given {_given(content)}")
        else:
            mistakes.append(f"{where}: unknown key {head}{_nearest(str(head), [*SECTIONS, *keys])}")
    settings = Settings(**valid)
    for involved, sentence in cross_checks(settings, stored=stored):
        # A key that is wrong by itself was replaced by its default for this pass: say nothing about its combinations.
        if not broken.intersection(involved):
            key = next((key for key in involved if key in places), involved[0])
            mistakes.append(f"{_place(places, key, file)}: {sentence}")
    return settings, mistakes


def _validate_section(
    head: str, content: dict[str, Any], places: dict[str, str], where: str, broken: set[str]
) -> tuple[Section, list[str]]:
    """The section with its valid values (wrong ones at their defaults) and a sentence for each wrong one."""
    kind = SECTIONS[head]
    try:
        return kind.model_validate(content), []
    except ValidationError as error:
        problems = [(problem["loc"], _beyond_limits(problem)) for problem in error.errors()]
    mistakes = []
    for location, more in problems:
        named, expected = _locate(kind, location)
        key = ".".join(map(str, (head, *named)))
        if key in broken:
            continue
        broken.add(key)
        place = _place(places, key, where)
        if expected is None:
            siblings = [f"{key.rpartition('.')[0]}.{name}" for name in MaskSet.model_fields]
            valid = [name for name, _ in fields()] if len(named) == 1 else siblings
            mistakes.append(f"{place}: unknown key {key}{_nearest(key, valid)}")
        else:
            given: Any = content
            for part in named:
                given = given[part]
            inside = _in_mixture(given) if key == "data.path" else ""
            mistakes.append(f"{place}: {key}: {inside or f'expected {expected}{more}, given {_given(given)}'}")
    return kind.model_validate(_without(head, content, broken)), mistakes


def _in_mixture(path: Any) -> str:
    """What is wrong inside of the mixture that `data.path` should be; empty for what is none."""
    if isinstance(path, list):
        return f"expected a mixture as a map from paths to weights, {{A: 1, B: 1}}, given the list {_given(path)}"
    if path == {}:
        return "expected a mixture with at least one path and its weight, {A: 1, B: 1}, given {}"
    for name, one in path.items() if isinstance(path, dict) else ():
        if not isinstance(name, str):
            return f"expected a path before each weight, in quotes where it looks like a number, given {_given(name)}"
        if not name:
            return "expected a path that is not empty before each weight, given ''"
        try:
            DataSet.model_validate(one if isinstance(one, dict) else {"weight": one})
        except ValidationError as error:
            key = str(error.errors()[0]["loc"][0])
            field = DataSet.model_fields.get(key)
            if field is None:
                return f"unknown key {key} of {name}{_nearest(key, list(DataSet.model_fields))}"
            group = "" if isinstance(one, dict) else f" or a group of {', '.join(DataSet.model_fields)}"
            given = one[key] if isinstance(one, dict) else one
            return f"expected {expectation(field)}{group} as {key} of {name}, given {_given(given)}"
    return ""


def _locate(kind: type[Section], location: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], str | None]:
    """(the part of an error's location that names a setting, what it expects or None where the key is unknown)."""
    inside = kind is Mask and location[0] == "sets" and len(location) > 1
    if inside and len(location) == 2:
        return location, "a group of settings"
    named = location[:3] if inside else location[:1]
    field = by_key(MaskSet if inside else kind).get(str(named[-1]))
    return named, None if field is None else expectation(field)


def _without(head: str, content: dict[str, Any], broken: set[str]) -> dict[str, Any]:
    """The values of a section without the wrong ones. A mask set keeps its number and its other values."""
    kept = {key: value for key, value in content.items() if f"{head}.{key}" not in broken}
    if isinstance(kept.get("sets"), list):
        entries = [entry if isinstance(entry, dict) else {} for entry in kept["sets"]]
        kept["sets"] = [_without(f"{head}.sets.{number}", entry, broken) for number, entry in enumerate(entries)]
    return kept

"""The tables and pictures of README.md and bench/README.md from the result files, and what got slower since a commit.

    python -m bench.report                     write what is between the marks, and docs/bench-*.png
    python -m bench.report --check             write nothing, say what would change
    python -m bench.report --against COMMIT    compare the newest results with those of a commit

Ends with 0, with 1 where --check would change something or --against finds something slower or larger beyond the
spread, with 2 where the input is wrong.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import compare, plots
from bench.report.regions import Links, rewrite, split
from bench.report.stored import choose, read_folder

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "bench" / "README.md", ROOT / "docs" / "measured.md"]


def made(readmes: Sequence[Path], results: Path, docs: Path) -> dict[Path, bytes]:
    """Texts and their pictures as the result files would have them, by path.

    Errors: ValueError with one sentence for a wrong mark, a file or folder that is not there or broken.
    """
    parts = {}
    for readme in readmes:
        if not readme.is_file():
            raise ValueError(f"--readme: expected a file, given {str(readme)!r}.")
        parts[readme] = split(readme.read_text(), readme.name)
    chosen = choose(read_folder(results))
    pictures = plots.draw(chosen, {name for of_text in parts.values() for _, name in of_text})
    files = {docs / f"bench-{kind}.png": content for kind, content in pictures.items()}
    for readme, of_text in parts.items():
        links = Links(*(Path(os.path.relpath(folder, readme.parent)).as_posix() for folder in (results, docs)))
        files[readme] = rewrite(of_text, chosen, pictures.keys(), links).encode()
    return files


def difference(path: Path, content: bytes) -> str:
    """What would change in a file, for a person; "" where nothing would."""
    before = path.read_bytes() if path.exists() else None
    if before == content:
        return ""
    if before is None:
        return f"{_short(path)} would be new"
    if path.suffix == ".png":
        return f"{_short(path)} would change (drawn here by {plots.software()})"
    lines = difflib.unified_diff(
        before.decode().splitlines(), content.decode().splitlines(), path.name, "from the results", n=0, lineterm=""
    )
    return f"{_short(path)} would change:\n" + "\n".join(lines)


def _short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, write or compare; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; say what would change, and end with 1")
    what.add_argument("--against", metavar="COMMIT", help="what got slower since then, beyond the spread; ends with 1")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of result files")
    parser.add_argument("--readme", type=Path, nargs="+", default=READMES, help="files with the marks")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pictures")
    options = parser.parse_args(arguments)
    try:
        if options.against is not None:
            found = compare.against(options.against, options.results)
            print(found.text())
            return 1 if found.worse else 0
        files = made([one.resolve() for one in options.readme], options.results.resolve(), options.docs.resolve())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    changes = {path: text for path, content in files.items() if (text := difference(path, content))}
    for path, text in changes.items():
        if options.check:
            print(text)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])
            print(f"wrote {_short(path)}")
    if not changes:
        print("nothing would change" if options.check else "nothing changed")
    return 1 if options.check and changes else 0


if __name__ == "__main__":
    sys.exit(main())

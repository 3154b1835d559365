"""`python -m fastjepa VERB ...`: train a run, see what it learned, hand its features and weights over."""

import difflib
import importlib
import sys

from fastjepa.exits import Exit, ended, reader_left

# The module of each verb has `main(arguments)`; it is imported when the verb is called.
VERBS = {
    "train": ("fastjepa.train", "SETTINGS.yaml [key=value ...]", "pretrain; the same as python -m fastjepa.train"),
    "plan": (
        "fastjepa.verbs.plan",
        "SETTINGS.yaml [--gpu NAME] [key=value ...]",
        "tokens, schedule, work, memory, expected clips/s and days on one GPU, without starting it",
    ),
    "data": (
        "fastjepa.survey",
        "PATH [--prepare FOLDER] ...",
        "what a collection of videos holds, which files are bad, whether this machine decodes fast enough; "
        "or encode it once more for fast training",
    ),
    "probe": (
        "fastjepa.verbs.probe",
        "WEIGHTS [--probe knn,linear,attentive] [--data PATH] ...",
        "what the features of a run or of published weights learned: kNN, linear and attentive classifiers",
    ),
    "viz": (
        "fastjepa.verbs.viz",
        "RUN [--data PATH] [--video N|PATH] [--clips N] ...",
        "pictures of what a run has learned, and one page of it all: index.html in its viz/",
    ),
    "embed": (
        "fastjepa.verbs.embed",
        "WEIGHTS PATH --out FILE ...",
        "features of a video or a collection, window by window, to .safetensors or .parquet",
    ),
    "export": (
        "fastjepa.verbs.export",
        "RUN OUT [--format transformers|meta] ...",
        "hand weights over: a folder in the transformers layout with its card, or the public code's file",
    ),
    "import": (
        "fastjepa.verbs.import_",
        "FILE OUT",
        "take published weights (.pth.tar, .pt) in: a folder that every verb and init.from read",
    ),
    "info": (
        "fastjepa.verbs.info",
        "[RUN | SETTINGS.yaml]",
        "versions, devices, decoders, what a run takes here and why; of a run: is it alive, how far is it",
    ),
}
FIVE_MINUTES = """See it work in five minutes, on a CPU, with nothing to download:
  python -m fastjepa train configs/demo.yaml
and meanwhile, from another terminal, whether it is alive:
  python -m fastjepa info runs/demo-*
Then a folder of your own videos:
  python -m fastjepa data MY_VIDEOS
  python -m fastjepa train configs/small_data.yaml data.path=MY_VIDEOS"""


def usage() -> str:
    """The verbs, and where a newcomer begins."""
    lines = ["usage: python -m fastjepa VERB ...", ""]
    for verb, (_, takes, what) in VERBS.items():
        lines += [f"  {verb} {takes}".rstrip(), f"      {what}"]
    lines += ["  VERB --help", "      what a verb takes", "  --help", "      every setting with its default and help"]
    return "\n".join([*lines, "", FIVE_MINUTES])


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. What is wrong with its input is one sentence on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if not verb:
        _print(usage())
        return Exit.DONE
    if verb in ("-h", "--help"):
        from fastjepa.configfile import help_text

        _print(f"{usage()}\n\n{help_text()}")
        return Exit.DONE
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        nearest = f", nearest valid verb: {near[0]}" if near else ""
        _print(f"unknown verb {verb!r}{nearest}\n{usage()}", sys.stderr)
        return Exit.WRONG_INPUT
    try:
        return int(importlib.import_module(VERBS[verb][0]).main(rest))
    except ValueError as error:
        _print(str(error), sys.stderr)
        return Exit.WRONG_INPUT
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            raise
        _print(f"{error.strerror}: {error.filename}" if error.filename else str(error), sys.stderr)
        return Exit.FAILED
    except KeyboardInterrupt:
        _print("interrupted", sys.stderr)
        return Exit.SECOND_INTERRUPT


def _print(text: str, stream: object = None) -> None:
    print(text, file=stream or sys.stdout)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(ended(main))

"""`python -m fastjepa VERB ...`: train a run, show the plan of one, look through videos, show this machine."""

import sys

USAGE = """usage: python -m fastjepa VERB ...
  train SETTINGS.yaml [key=value ...]   pretrain; the same as python -m fastjepa.train
  plan SETTINGS.yaml [--gpu NAME] [key=value ...]
                                        tokens, schedule, work, memory, expected clips/s and days of a run on one GPU,
                                        this machine's or a named one (h200, a100, ...), without starting it
  data PATH [--workers N] [--out FILE] [--gpu NAME]
                                        what a folder or list of videos holds, which files are bad and why, and whether
                                        this machine decodes fast enough; only what changed is opened again
  data PATH --prepare FOLDER [--short-side 256] [--gop 16] [--quality 23] [--workers N]
                                        encode the videos once more for fast training: small, with close key frames
  info                                  versions, devices, decoders
  --help                                every setting with its default and help"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if verb == "train":
        from fastjepa.train import main as train

        return train(rest)
    if verb == "plan":
        return _plan(rest)
    if verb == "data":
        from fastjepa.survey import main as survey

        return survey(rest)
    if verb == "info":
        return _info()
    if verb in ("-h", "--help"):
        from fastjepa.configfile import help_text

        _print(f"{USAGE}\n\n{help_text()}")
        return 0
    _print(f"unknown verb {verb!r}\n{USAGE}" if verb else USAGE, sys.stderr)
    return 2


def _plan(arguments: list[str]) -> int:
    """Exit code 0 also where the run would not fit: that is what was asked, and the last line answers it."""
    from fastjepa.configfile import from_command_line

    try:
        rest, name = _take_gpu(arguments)
    except ValueError as error:
        _print(str(error), sys.stderr)
        return 2
    if not rest:
        _print(USAGE, sys.stderr)
        return 2
    settings, _ = from_command_line(rest)
    import torch

    from fastjepa import gpus
    from fastjepa.build import build_jepa, build_masks
    from fastjepa.forecast import forecast, heading
    from fastjepa.memory import usable_memory
    from fastjepa.plan import describe, make_plan

    try:
        gpu, reason = (gpus.named(name), "named by --gpu") if name is not None else gpus.of_this_machine()
        masks = build_masks(settings)
        with torch.device("meta"):  # shapes only: a plan of the largest model costs no memory
            jepa = build_jepa(settings)
    except ValueError as error:
        _print(str(error), sys.stderr)
        return 2
    # What a GPU would do: `auto` compiles there.
    compiled = settings.runtime.compile is not False
    plan = make_plan(settings, jepa, masks, usable_memory(gpu), compiled=compiled)
    _print("\n".join([heading(gpu, reason), *describe(settings, plan, jepa), *forecast(settings, plan, gpu)]))
    return 0


def _take_gpu(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--gpu NAME` (or `--gpu=NAME`), and the name. Errors: ValueError where it is missing."""
    rest, name = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--gpu":
            name = next(remaining, "")
        elif argument.startswith("--gpu="):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    if name == "":
        raise ValueError("--gpu: expected the name of a GPU, given nothing, for example --gpu h200")
    return rest, name


def _info() -> int:
    import platform
    from importlib import metadata

    import torch

    from fastjepa.data.decoders import dali, torchcodec

    packages = ("fastjepa", "torch", "triton", "numpy", "av", "torchcodec", "nvidia-dali-cuda130", "xformers")
    for name in packages:
        try:
            _print(f"{name:<22}{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            _print(f"{name:<22}not installed")
    _print(f"{'python':<22}{platform.python_version()} on {platform.platform()}")
    _print(f"{'cpu threads':<22}{torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory, version = f"{facts.total_memory / 1e9:.0f} GB", f"{facts.major}.{facts.minor}"
        _print(f"cuda:{index:<17}{facts.name}, {memory}, compute capability {version}")
    if not torch.cuda.is_available():
        _print(f"{'cuda':<22}no device")
    decoders = {
        "pyav": "",
        "torchcodec": torchcodec.why_not(),
        "dali_gpu": dali.why_not(torch.device("cuda")),
        "dali_cpu": dali.why_not(torch.device("cpu")),
    }
    for name, reason in decoders.items():
        _print(f"{f'decoder {name}':<22}{reason or 'ready'}")
    return 0


def _print(text: str, stream: object = None) -> None:
    print(text, file=stream or sys.stdout)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())

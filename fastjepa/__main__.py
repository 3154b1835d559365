"""`python -m fastjepa VERB ...`: train a run, show its plan without running it, or show what this machine offers."""

import sys

USAGE = """usage: python -m fastjepa VERB ...
  train SETTINGS.yaml [key=value ...]   pretrain; the same as python -m fastjepa.train
  plan SETTINGS.yaml [key=value ...]    tokens, work, memory, batch and schedule of a run, without starting it
  info                                  versions and devices
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
    if verb == "info":
        return _info()
    if verb in ("-h", "--help"):
        from fastjepa.configfile import help_text

        _print(f"{USAGE}\n\n{help_text()}")
        return 0
    _print(f"unknown verb {verb!r}\n{USAGE}" if verb else USAGE, sys.stderr)
    return 2


def _plan(arguments: list[str]) -> int:
    from fastjepa.configfile import from_command_line

    settings, _ = from_command_line(arguments)
    import torch

    from fastjepa import parallel
    from fastjepa.build import build_jepa, build_masks
    from fastjepa.plan import describe, make_plan

    try:
        device, reason = parallel.set_up(settings.runtime)
        masks = build_masks(settings)
        with torch.device("meta"):  # shapes only: a plan of the largest model costs no memory
            jepa = build_jepa(settings)
    except ValueError as error:
        _print(str(error), sys.stderr)
        return 2
    _print(
        "\n".join(
            [f"device     {device} ({reason})", *describe(settings, make_plan(settings, jepa, masks, device), jepa)]
        )
    )
    return 0


def _info() -> int:
    import platform
    from importlib import metadata

    import torch

    packages = ("fastjepa", "torch", "triton", "numpy", "av", "nvidia-dali-cuda130", "xformers")
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
    return 0


def _print(text: str, stream: object = None) -> None:
    print(text, file=stream or sys.stdout)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())

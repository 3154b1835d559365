"""`python -m fastjepa info`: versions, devices, decoders."""

import platform
from collections.abc import Sequence
from importlib import metadata

import torch

from fastjepa.data.decoders import dali, torchcodec
from fastjepa.exits import Exit
from fastjepa.verbs.parsing import Parser, say

PACKAGES = ("fastjepa", "torch", "triton", "numpy", "av", "torchcodec", "nvidia-dali-cuda130", "xformers")


def main(arguments: Sequence[str]) -> Exit:
    """Print what there is. Errors: ValueError for an argument."""
    Parser("info", __doc__).read(arguments)
    for name in PACKAGES:
        try:
            say(f"{name:<22}{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            say(f"{name:<22}not installed")
    say(f"{'python':<22}{platform.python_version()} on {platform.platform()}")
    say(f"{'cpu threads':<22}{torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory, version = f"{facts.total_memory / 1e9:.0f} GB", f"{facts.major}.{facts.minor}"
        say(f"cuda:{index:<17}{facts.name}, {memory}, compute capability {version}")
    if not torch.cuda.is_available():
        say(f"{'cuda':<22}no device")
    decoders = {
        "pyav": "",
        "torchcodec": torchcodec.why_not(),
        "dali_gpu": dali.why_not(torch.device("cuda")),
        "dali_cpu": dali.why_not(torch.device("cpu")),
    }
    for name, reason in decoders.items():
        say(f"{f'decoder {name}':<22}{reason or 'ready'}")
    return Exit.DONE

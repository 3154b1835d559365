"""The training step of the public V-JEPA code, timed as a black box in a process of its own.

    python bench/public/black_box.py --repo CHECKOUT --model vit_large --batch 24 --variant nostats

The real `app.vjepa.train.main` of a checkout runs in one process (DistributedDataParallel, world size 1) with its own
models, mask collator, schedules, loss, optimizer, moving average and logging. Replaced are the data (one host batch of
synthetic clips), packages for decoding and augmentation that do not import (empty stand-ins) and, by variant:

    shipped   nothing more
    nostats   its per-tensor statistics (a device-to-host read each) return constants
    compiled  nostats, and the three networks compiled by torch.compile inside their DDP wrappers, with DDP's splitting
              of graphs off and the attention-backend context, which would break every graph, emptied

It speaks in lines of JSON on standard output, one after the warm-up and one after every turn, and waits for a line on
standard input before it goes on; without one it ends. `ms` is the step as the code itself measures it: CUDA events
around schedules, networks, backward, optimizer, statistics and moving average, or the host clock on a CPU, where all is
float32. Masks are the code's own, drawn before the first step and written to `--masks` as {"context", "target"}, both
indexed [step][mask set], an int64 tensor [batch, tokens] each.
"""

import argparse
import contextlib
import importlib
import importlib.machinery
import json
import logging
import os
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

OPTIONAL = ("PIL", "cv2", "torchvision", "timm", "decord", "pandas", "psutil", "yaml")
VARIANTS = ("shipped", "nostats", "compiled")


class Hollow(type):
    """Type of the empty classes found in a stand-in; their attributes are again empty classes."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Hollow(name, (), {})


class StandIn(types.ModuleType):
    """A module whose every attribute is an empty class: enough for imports and constants of modules."""

    __version__, __path__ = "0.0", []
    __getattr__ = Hollow.__getattr__


@contextlib.contextmanager
def stand_ins(names: tuple[str, ...]) -> Iterator[list[str]]:
    """Within the block, packages that are absent, or broken beside this torch, import as stand-ins; yields which."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError, AttributeError, OSError):  # what a broken binary package raises
            missing.append(name)
    for loaded in [module for module in sys.modules if module.split(".")[0] in missing]:
        del sys.modules[loaded]

    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in missing:
            return None
        return importlib.machinery.ModuleSpec(name, finder, is_package=True)  # type: ignore[arg-type]

    finder = types.SimpleNamespace(
        find_spec=find_spec, create_module=lambda spec: StandIn(spec.name), exec_module=lambda module: None
    )
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    yield missing
    sys.meta_path.remove(finder)  # type: ignore[arg-type]
    for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
        del sys.modules[name]  # nothing else may take them for real


class Finished(Exception):
    """Leaves the training loop at a step's boundary."""


class Batches(list):
    """Loader and sampler in one: a list of (clips, context masks, target masks)."""

    def set_epoch(self, epoch: int) -> None:
        """What the loop asks of a sampler."""


def settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The published pretraining recipe, with the sizes asked for; gradients are clipped from the first step on."""
    blocks = {"aspect_ratio": [0.75, 1.5], "temporal_scale": [1.0, 1.0], "max_temporal_keep": 1.0, "max_keep": None}
    shown = options.steps
    return {
        "meta": {"load_checkpoint": False, "read_checkpoint": None, "seed": options.seed, "use_sdpa": True,
                 "dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
        "mask": [{**blocks, "num_blocks": 8, "spatial_scale": [0.15, 0.15]},
                 {**blocks, "num_blocks": 2, "spatial_scale": [0.7, 0.7]}],
        "model": {"model_name": options.model, "pred_depth": 12, "pred_embed_dim": 384, "uniform_power": True,
                  "use_mask_tokens": True},
        "data": {"batch_size": options.batch, "num_clips": 1, "num_frames": options.frames, "crop_size": options.crop,
                 "patch_size": 16, "tubelet_size": 2},
        "data_aug": {},
        "loss": {"loss_exp": 1.0, "reg_coeff": 0.0},
        "logging": {"folder": folder, "write_tag": "jepa"},
        "optimization": {"ipe": max(300, shown), "ipe_scale": 1.25, "epochs": 300, "warmup": -1, "start_lr": 2e-4,
                         "lr": 6.25e-4, "final_lr": 1e-6, "weight_decay": 0.04, "final_weight_decay": 0.4,
                         "clip_grad": 10.0, "ema": [0.998, 1.0]},
    }  # fmt: skip


def make_batches(options: argparse.Namespace, collator: Any, host: Callable[[torch.Tensor], torch.Tensor]) -> Batches:
    """One batch of synthetic clips, paired with a fresh draw of masks for every step; the masks go into their file."""
    generator = torch.Generator().manual_seed(options.seed + 2)
    shape = (options.batch, 3, options.frames, options.crop, options.crop)
    clips = host(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).float().sub_(127.5).div_(73.9))
    torch.manual_seed(options.seed + 1)
    draws = [collator([([torch.zeros(1)], 0, 0)] * options.batch)[1:] for _ in range(options.steps)]
    if options.masks is not None:
        sets = {"context": [one[0] for one in draws], "target": [one[1] for one in draws]}
        torch.save(sets, options.masks)
    return Batches(([[clips]], [host(m) for m in context], [host(m) for m in target]) for context, target in draws)


class Turns:
    """The steps so far, told a turn at a time."""

    def __init__(self, options: argparse.Namespace, speak: Callable[[dict[str, Any]], None]) -> None:
        self.options, self.speak = options, speak
        self.ms: list[float] = []
        self.losses: list[float] = []

    def took(self, ms: float, loss: float) -> None:
        """Note a step; at the end of a turn say so and wait. Errors: Finished where nobody wants another."""
        self.ms.append(ms)
        self.losses.append(loss)
        over = len(self.ms) - self.options.warmup
        if over < 0 or over % self.options.turn:
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.empty_cache()  # the other side takes its turn in this memory
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
        self.speak({"ms": self.ms[-self.options.turn :] if over else [], "losses": self.losses, "peak_memory_gb": peak})
        if not sys.stdin.readline() or len(self.ms) == self.options.steps:
            raise Finished
        if cuda and not over:
            torch.cuda.reset_peak_memory_stats()


def run(options: argparse.Namespace, speak: Callable[[dict[str, Any]], None]) -> None:
    """The public code's own training, step by step."""
    cuda = torch.cuda.is_available()
    sys.path.insert(0, os.path.abspath(options.repo))
    logging.disable(logging.INFO)
    with stand_ins(OPTIONAL):
        train = importlib.import_module("app.vjepa.train")
    code_timer, ddp, turns = train.gpu_timer, train.DistributedDataParallel, Turns(options, speak)

    def init_data(collator: Any, **_: Any) -> tuple[Batches, Batches]:
        batches = make_batches(options, collator, torch.Tensor.pin_memory if cuda else torch.Tensor.contiguous)
        return batches, batches

    def gpu_timer(closure: Any, **more: Any) -> Any:
        began = time.perf_counter()
        result, event_ms = code_timer(closure, **more)  # on CUDA it synchronizes once, at its end
        turns.took(event_ms if cuda else (time.perf_counter() - began) * 1e3, float(result[0]))
        return result, event_ms

    def compiled_ddp(module: Any, **more: Any) -> Any:
        module.compile()
        return ddp(module, **more)

    train.init_data, train.gpu_timer, train.make_transforms = init_data, gpu_timer, lambda **_: None
    if options.variant != "shipped":
        zeros = dict.fromkeys(("first_layer", "last_layer", "min", "max", "global_norm"), 0.0)
        train.grad_logger, train.adamw_logger = lambda _: types.SimpleNamespace(**zeros), lambda _: None
    if options.variant == "compiled":
        importlib.import_module("torch._dynamo").config.optimize_ddp = False
        torch.backends.cuda.sdp_kernel = contextlib.nullcontext
        train.DistributedDataParallel = compiled_ddp
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if cuda and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        with contextlib.suppress(Finished):
            train.main(settings(options, folder))
        dist.destroy_process_group()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Times the public training step, a turn at a time.")
    parser.add_argument("--repo", required=True, help="checkout of the public code")
    parser.add_argument("--model", default="vit_large")
    parser.add_argument("--variant", default="shipped", choices=VARIANTS)
    parser.add_argument("--masks", type=Path, help="write the masks of every step to this file")
    sizes = {"crop": 224, "frames": 16, "batch": 24, "steps": 60, "warmup": 5, "turn": 10, "seed": 234}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    options = parser.parse_args()
    if not Path(options.repo, "app", "vjepa", "train.py").is_file():
        parser.error(f"--repo: expected a checkout of the public code, given {options.repo!r}")
    out = os.fdopen(os.dup(1), "w")  # the code prints and logs to standard output

    def speak(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        run(options, speak)


if __name__ == "__main__":
    main()

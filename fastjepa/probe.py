"""What did the features learn? A linear classifier on pooled, frozen features.

The trained target encoder beside the same encoder untrained, raw pixels and chance. Videos are split into train,
validation (chooses the regularisation) and test (is reported).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.data.dataset import Reader
from fastjepa.data.decode import VideoError
from fastjepa.data.sampling import central_box, clip_frames, clip_stride
from fastjepa.data.source import Videos
from fastjepa.data.transforms import cut

# A probe of more takes hours on a large collection and tells nothing new.
MOST_VIDEOS = 2000
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
BATCH = 16


class ProbeStopped(RuntimeError):
    """The run was asked to end while it was probing."""


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy on one task, as a share of 1."""

    task: str
    trained: float
    untrained: float
    pixels: float
    chance: float
    videos: int


@dataclass(frozen=True)
class Cut:
    """How a clip is cut out for evaluation: frames and stride, side in pixels, seconds that take the stride's place."""

    frames: int
    stride: int
    crop: int
    duration: float | None = None


def probe(
    trained: nn.Module, untrained: nn.Module, videos: Videos, reader: Reader, cut_out: Cut, stopped: Callable[[], bool]
) -> list[Accuracy]:
    """Linear accuracy on every task of `videos`. Encoders take [B, C, T, H, W] and give [B, N, E], on one device.

    At most 2,000 videos are used, unreadable ones are left out; `stopped` is asked between batches. Empty where too few
    can be read to learn from two, to choose on one and to test on one. Errors: ProbeStopped.
    """
    device = next(trained.parameters()).device
    # The splits are in random order, so their first parts are a fair draw.
    share = min(1.0, MOST_VIDEOS / len(videos.paths))
    members = {name: split[: int(np.ceil(share * len(split)))] for name, split in videos.splits.items()}
    numbers, columns = [], ([], [], [])  # type: ignore[var-annotated]
    for batch, clips in _clips(np.concatenate(list(members.values())), reader, cut_out):
        if stopped():
            raise ProbeStopped
        numbers += batch
        for column, rows in zip(
            columns, (*(_pooled(e, clips.to(device)) for e in (trained, untrained)), _pixels(clips))
        ):
            column.append(rows)
    place = {video: row for row, video in enumerate(numbers)}
    splits = {name: torch.tensor([place[v] for v in split if v in place]) for name, split in members.items()}
    if len(splits["train"]) < 2 or not len(splits["validation"]) or not len(splits["test"]):
        return []
    features = [torch.cat(column).double() for column in columns]
    results = []
    for name, task in videos.tasks.items():
        labels = torch.from_numpy(task.labels)[torch.tensor(numbers)]
        scores = [linear_accuracy(x, labels, splits, len(task.classes)) for x in features]
        test = labels[splits["test"]]
        chance = torch.bincount(labels[splits["train"]], minlength=len(task.classes)).argmax()
        results.append(
            Accuracy(name, scores[0], scores[1], scores[2], (test == chance).double().mean().item(), len(test))
        )
    return results


def linear_accuracy(features: Tensor, labels: Tensor, splits: dict[str, Tensor], classes: int) -> float:
    """Test accuracy of softmax regression on standardised features float64 [M, D].

    The penalty is chosen on the validation split.
    """
    train = features[splits["train"]]
    features = (features - train.mean(dim=0)) / train.std(dim=0).clamp_min(1e-8)
    best, result = -1.0, 0.0
    for penalty in PENALTIES:
        weight, bias = _softmax_regression(features[splits["train"]], labels[splits["train"]], classes, penalty)
        right = ((features @ weight + bias).argmax(dim=1) == labels).double()
        validation = right[splits["validation"]].mean().item()
        if validation > best:
            best, result = validation, right[splits["test"]].mean().item()
    return result


def table(results: list[Accuracy]) -> list[str]:
    """The results in lines for a person."""
    lines = [f"{'linear probe':<14}{'trained':>9}{'untrained':>11}{'pixels':>8}{'chance':>8}   test videos"]
    for r in results:
        shares = f"{r.trained:>9.1%}{r.untrained:>11.1%}{r.pixels:>8.1%}{r.chance:>8.1%}"
        lines.append(f"{r.task:<14}{shares}   {r.videos}")
    return lines


def write(results: list[Accuracy], step: int, folder: Path) -> None:
    """Keep the results as JSON: probe/step-0003000.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"step": step, "probe": "linear", "results": [asdict(r) for r in results]}
    (folder / f"step-{step:07d}.json").write_text(json.dumps(content, indent=2))


def _softmax_regression(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()


def _clips(videos: np.ndarray, reader: Reader, cut_out: Cut) -> Iterator[tuple[list[int], Tensor]]:
    numbers: list[int] = []
    clips: list[Tensor] = []
    for video in sorted(videos.tolist()):
        try:
            info = reader.info(video)
            stride = clip_stride(cut_out.frames, cut_out.stride, cut_out.duration, info.rate)
            frames = reader.read(video, clip_frames(info.frames, cut_out.frames, stride, rng=None))
        except VideoError:
            continue  # named in bad_files.jsonl when pretraining meets it; a probe of the rest is still a probe
        numbers.append(video)
        clips.append(cut(frames, central_box(info.height, info.width), False, cut_out.crop))
        if len(clips) == BATCH:
            yield numbers, torch.stack(clips)
            numbers, clips = [], []
    if clips:
        yield numbers, torch.stack(clips)


@torch.no_grad()
def _pooled(encoder: nn.Module, clips: Tensor) -> Tensor:
    return encoder(clips).float().mean(dim=1).cpu()


def _pixels(clips: Tensor) -> Tensor:
    """A coarse copy of the clip, 4 x 12 x 12 x 3 values: what a linear classifier gets without any features."""
    size = (min(4, clips.shape[2]), 12, 12)
    return F.adaptive_avg_pool3d(clips, size).flatten(1)

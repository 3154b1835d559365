"""A probe from beginning to end: the features of one encoder after the other, and the classifiers on them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastjepa.data.dataset import Reader
from fastjepa.data.source import Videos
from fastjepa.probe import attentive, features, knn, linear
from fastjepa.probe.baselines import Baseline, Baselines
from fastjepa.probe.report import Accuracy
from fastjepa.probe.scores import Outcome, confusion, score
from fastjepa.probe.tokens import TokenFile

KNN, LINEAR, ATTENTIVE = "knn", "linear", "attentive"
KINDS = (KNN, LINEAR, ATTENTIVE)

Encoder = Callable[[], nn.Module]


@dataclass(frozen=True)
class Protocol:
    """What is probed with and how: `kinds` of KINDS, and for the attentive one the number of attention heads.

    At most about `most` videos are used.
    """

    kinds: tuple[str, ...]
    cut: features.Cut
    heads: int = 1
    seed: int = 0
    most: int = features.MOST_VIDEOS


@dataclass(frozen=True)
class _Measured:
    """Of one encoder: an outcome by kind and task, the one on pixels by kind and task, and what they are tested on."""

    outcomes: dict[tuple[str, str], Outcome]
    pixels: dict[tuple[str, str], Outcome]
    wanted: dict[str, Tensor]
    chance: dict[str, float]


def probe(
    trained: Encoder,
    untrained: Encoder | None,
    videos: Videos,
    reader: Reader,
    protocol: Protocol,
    stopped: Callable[[], bool],
    *,
    folder: Path,
    known: Baselines | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[Accuracy]]:
    """Accuracy by kind of probe, on every task of `videos`.

    `trained` and `untrained` make an encoder, [B, C, T, H, W] -> [B, N, E], in evaluation mode on its device; the
    second is asked for when the first has been let go, and not at all where `known` has its figures. Tokens lie in a
    nameless file in `folder` meanwhile. Unreadable videos are left out, `stopped` is asked between batches, `progress`
    is told (encoder, videos done, videos). Empty where too few can be read to learn from two, to choose on one and to
    test on one. No global random state is read or moved. Errors: ProbeStopped; OSError where the disk is full.
    """
    known = known or Baselines("")
    tasks = list(videos.tasks)
    found = {kind: known.get(kind, tasks, untrained=untrained is not None) for kind in protocol.kinds}
    missing = tuple(kind for kind in protocol.kinds if not found[kind])
    measure = _Measurement(videos, reader, protocol, stopped, folder, progress)
    own = measure.of("trained", trained, protocol.kinds, pixels=missing)
    if own is None:
        return {}
    if missing:
        other = None if untrained is None else measure.of("untrained", untrained, missing)
        for kind in missing:
            found[kind] = {task: _baseline(kind, task, own, other) for task in tasks}
            known.put(kind, found[kind])
    return {kind: [_accuracy(kind, task, own, found[kind][task], videos) for task in tasks] for kind in protocol.kinds}


@dataclass(frozen=True)
class _Measurement:
    videos: Videos
    reader: Reader
    protocol: Protocol
    stopped: Callable[[], bool]
    folder: Path
    progress: Callable[[str, int, int], None] | None

    def of(self, name: str, make: Encoder, kinds: Sequence[str], pixels: Sequence[str] = ()) -> _Measured | None:
        """None where too few videos can be read. The encoder is let go before a classifier is trained."""
        p = self.protocol
        members = features.members_of(self.videos, p.most)
        progress = self.progress
        tell = None if progress is None else lambda done, total: progress(name, done, total)
        with ExitStack() as stack:
            tokens = stack.enter_context(TokenFile(self.folder)) if ATTENTIVE in kinds else None
            encoder = make()
            device = next(encoder.parameters()).device
            seen = features.encode(
                encoder, members, self.reader, p.cut, self.stopped, tokens=tokens, pixels=bool(pixels), progress=tell
            )
            del encoder
            rows = features.rows_of(members, seen.numbers)
            if not rows:
                return None
            measured = _Measured({}, {}, {}, {})
            means = torch.cat(seen.means)
            coarse = torch.cat(seen.pixels) if pixels else torch.empty(0)
            for number, (task, about) in enumerate(self.videos.tasks.items()):
                labels, classes = torch.from_numpy(about.labels)[torch.tensor(seen.numbers)], len(about.classes)
                measured.wanted[task] = labels[rows["test"][:, 0]]
                measured.chance[task] = features.majority_accuracy(labels, rows)
                for kind in kinds:
                    if kind == ATTENTIVE:
                        assert tokens is not None, "made for this kind"
                        outcome = attentive.classify(
                            tokens, labels, rows, classes, p.heads, (p.seed, number), device, self.stopped
                        )
                    else:
                        outcome = _on_means(kind, means, labels, rows, classes, device)
                    measured.outcomes[kind, task] = outcome
                on_pixels: dict[str, Outcome] = {}
                for kind in pixels:
                    # The attentive probe has no tokens of pixels: it stands beside the linear one on them.
                    basis = KNN if kind == KNN else LINEAR
                    if basis not in on_pixels:
                        on_pixels[basis] = _on_means(basis, coarse, labels, rows, classes, device)
                    measured.pixels[kind, task] = on_pixels[basis]
        return measured


def _on_means(
    kind: str, x: Tensor, labels: Tensor, rows: dict[str, Tensor], classes: int, device: torch.device
) -> Outcome:
    if kind == KNN:
        return knn.classify(x.to(device), labels, rows, classes)
    return linear.classify(x.double(), labels, rows, classes)


def _baseline(kind: str, task: str, own: _Measured, other: _Measured | None) -> Baseline:
    pixels = score(own.pixels[kind, task].probabilities, own.wanted[task]).top1
    if other is None:
        return Baseline(None, None, pixels)
    outcome = other.outcomes[kind, task]
    return Baseline(score(outcome.probabilities, other.wanted[task]).top1, outcome.choice, pixels)


def _accuracy(kind: str, task: str, own: _Measured, baseline: Baseline, videos: Videos) -> Accuracy:
    outcome, wanted = own.outcomes[kind, task], own.wanted[task]
    found = score(outcome.probabilities, wanted)
    return Accuracy(
        task,
        found.top1,
        baseline.untrained,
        baseline.pixels,
        own.chance[task],
        len(wanted),
        found.top5,
        found.class_mean,
        outcome.choice,
        baseline.choice,
        (confusion(outcome.probabilities, wanted).numpy(), videos.tasks[task].classes),
    )

"""A grid of attentive classifiers in one pass is what each of them would be alone; their tokens come from a file."""

import os
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastjepa.models import AttentiveClassifier
from fastjepa.probe import attentive, tokens
from fastjepa.probe.heads import Heads
from fastjepa.probe.tokens import TokenFile, most_clips

WIDTH, HEADS, CLASSES = 12, 3, 5
CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def go_on() -> bool:
    return False


def alone(heads: Heads, number: int) -> AttentiveClassifier:
    """One classifier of the grid as the network that published probes are."""
    classifier = AttentiveClassifier(WIDTH, HEADS, num_classes=CLASSES).to(next(heads.parameters()).dtype)
    classifier.load_state_dict({name: weight[number] for name, weight in heads.weights().items()})
    return classifier


def test_every_classifier_gives_the_logits_and_gradients_of_the_published_one():
    heads = Heads(AttentiveClassifier(WIDTH, HEADS, num_classes=CLASSES), 3, HEADS).double()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng(len(parameter)), dtype=torch.float64))
        heads.decayed[1].mul_(0.5)  # the three differ
        heads.plain[2].add_(1.0)
    x = 3 * torch.randn(4, 7, WIDTH, generator=rng(), dtype=torch.float64) + 1
    upstream = torch.randn(3, 4, CLASSES, generator=rng(1), dtype=torch.float64)
    logits = heads(F.layer_norm(x, (WIDTH,), eps=1e-5))
    (logits * upstream).sum().backward()
    for number in range(3):
        classifier = alone(heads, number)
        want = classifier(x)
        assert torch.allclose(logits[number], want, rtol=1e-9, atol=1e-9)
        (want * upstream[number]).sum().backward()
        gradients = {name: p.grad for name, p in classifier.named_parameters()}
        for flat, names in ((heads.decayed, heads.matrices), (heads.plain, heads.vectors)):
            joined = torch.cat([gradients[name].flatten() for name in names])
            assert torch.allclose(flat[number].grad, joined, rtol=1e-7, atol=1e-9)


def test_all_begin_with_the_weights_of_the_first():
    first = AttentiveClassifier(WIDTH, HEADS, num_classes=CLASSES)
    heads = Heads(first, 2, HEADS)
    for name, weight in first.named_parameters():
        assert torch.equal(heads.weights()[name], torch.stack([weight, weight]))
    heads.decayed[0].data.zero_()
    assert heads.decayed[1].any()


@pytest.fixture
def noise(tmp_path):
    """20 clips of normalised noise in a file, and their labels."""
    with TokenFile(tmp_path) as file:
        file.append(torch.randn(20, 6, WIDTH, generator=rng()))
        yield file, torch.randint(CLASSES, (20,), generator=rng(1))


def test_every_entry_of_the_grid_trains_as_it_would_alone(noise, monkeypatch):
    """Against a plain loop over one published classifier: cosine rate, own clipping, decay of matrices only."""
    file, labels = noise
    grid = ((0.01, 0.0), (0.01, 2.0), (0.03, 0.5))
    for name, value in (("GRID", grid), ("EPOCHS", 4), ("BATCH", 8), ("CLIP_GRAD", 0.2)):
        monkeypatch.setattr(attentive, name, value)
    order = []
    read = file.read
    monkeypatch.setattr(file, "read", lambda rows, device: order.append(rows) or read(rows, device))
    train = torch.arange(2, 20)
    trained = attentive.train_heads(file, labels, train, CLASSES, HEADS, (7, 1), CPU, go_on)
    assert [len(rows) for rows in order] == [8, 8, 2] * 4
    epochs = [torch.cat(order[3 * epoch : 3 * epoch + 3]) for epoch in range(4)]
    assert all(torch.equal(epoch.sort().values, train) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])

    monkeypatch.setattr(attentive, "EPOCHS", 0)
    first = attentive.train_heads(file, labels, train, CLASSES, HEADS, (7, 1), CPU, go_on)
    clipped = 0
    for number, (lr, decay) in enumerate(grid):
        classifier = alone(first, number)
        parts = [[p for p in classifier.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)]
        groups = [{"params": parts[0], "weight_decay": decay}, {"params": parts[1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for rows in order[:12]:
            optimizer.zero_grad()
            F.cross_entropy(classifier(read(rows, CPU)), labels[rows]).backward()
            clipped += nn.utils.clip_grad_norm_(classifier.parameters(), 0.2).item() > 0.2
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            have, want = trained(read(train, CPU))[number], classifier(read(train, CPU))
        assert ((have - want).abs().max() / want.abs().max()).item() < 1e-3, number
    assert clipped > 0


def test_tokens_come_back_normalised_in_half_precision(tmp_path):
    x = torch.randn(5, 6, WIDTH, generator=rng()) * torch.tensor([1e-3, 1.0, 1e5, 7.0, 1e-2])[:, None, None] + 0.5
    with TokenFile(tmp_path) as file:
        file.append(x[:2].bfloat16().float())
        file.append(x[2:])
        want = F.layer_norm(torch.cat([x[:2].bfloat16().float(), x[2:]]), (WIDTH,), eps=1e-5)
        assert torch.equal(file.read(torch.tensor([4, 0, 2, 2]), CPU), want[[4, 0, 2, 2]].half().float())
        file.append(x[:1])  # also after a read
        assert torch.equal(file.read(torch.tensor([5, 1]), CPU)[1], want[1].half().float())
        with pytest.raises(OSError, match="ends before row 6"):
            file.read(torch.tensor([6]), CPU)


def test_the_file_has_no_name_and_its_space_is_given_back(tmp_path):
    with TokenFile(tmp_path) as file:
        file.append(torch.zeros(2, 3, 4))
        assert list(tmp_path.iterdir()) == []
        handle = file._file.fileno()
    with pytest.raises(OSError):
        os.fstat(handle)


def test_as_many_clips_as_half_of_the_free_space_or_the_limit_hold(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    row = 2 * 100 * 64  # two bytes each; one encoder at a time
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda folder: usage(0, 0, 2 * 5 * row + 1))
    assert most_clips(100, 64, tmp_path) == 5
    monkeypatch.setattr(tokens.shutil, "disk_usage", lambda folder: usage(0, 0, 10**15))
    assert most_clips(100, 64, tmp_path) == int(16e9) // row
    assert most_clips(1568, 1024, tmp_path) > 2000  # a ViT-L at 224 px keeps all

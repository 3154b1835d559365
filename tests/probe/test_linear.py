"""The linear probe beside scikit-learn's logistic regression on the same pooled features."""

import pytest
import torch

from fastjepa import configfile, evaluation, probe
from fastjepa.build import build_reader
from fastjepa.data.mixture import open_collections
from fastjepa.opened import open_encoder
from fastjepa.probe import features, linear
from fastjepa.probe.linear import PENALTIES, linear_accuracy


def pooled(encoder, s, videos):
    """(features float64 [R, E], rows of the splits, labels by task)."""
    how = evaluation.protocol(s, (probe.LINEAR,), encoder.num_heads)
    members = features.members_of(videos)
    seen = features.encode(encoder, members, build_reader(s, videos), how.cut, lambda: False, pixels=False)
    rows = {name: row.flatten() for name, row in features.rows_of(members, seen.numbers).items()}
    labels = {name: torch.from_numpy(task.labels)[seen.numbers] for name, task in videos.tasks.items()}
    return torch.cat(seen.means).double(), rows, labels


def other_accuracy(x, labels, rows) -> float:
    """Test accuracy of scikit-learn's, with its penalty chosen on validation as ours is."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = {name: (x[row].numpy(), labels[row].numpy()) for name, row in rows.items()}
    best, result = -1.0, 0.0
    for penalty in PENALTIES:
        strength = 1 / (2 * len(rows["train"]) * penalty)  # it weighs the sum of the losses, and half of the square
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=10_000, tol=1e-7))
        model.fit(*parts["train"])
        validation = model.score(*parts["validation"])
        if validation > best:
            best, result = validation, model.score(*parts["test"])
    return result


def test_it_is_that_of_scikit_learn_on_an_encoder_s_features(recipe):
    pytest.importorskip("sklearn")
    path = "synthetic://moving-shapes?videos=240&size=32&frames=4"
    s = configfile.load(recipe, [f"data.path={path}"])
    videos = open_collections(path, 0)
    x, rows, labels = pooled(evaluation.untrained_encoder(s, torch.device("cpu")), s, videos)
    assert x.shape == (240, 64)
    for task, y in labels.items():
        have = linear_accuracy(x, y, rows, len(videos.tasks[task].classes))
        assert abs(have - other_accuracy(x, y, rows)) < 0.01, task


def test_the_solver_comes_to_the_minimum():
    """Its gradient is next to nothing, also under the smallest penalty."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=rng, dtype=torch.float64)
    y = (x[:, :4] + torch.randn(300, 4, generator=rng, dtype=torch.float64)).argmax(dim=1)
    for penalty in PENALTIES:
        weight, bias = (one.requires_grad_() for one in linear.softmax_regression(x, y, 4, penalty))
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + penalty * weight.square().sum()
        assert max(g.abs().max().item() for g in torch.autograd.grad(loss, (weight, bias))) < 1e-4, penalty


@pytest.mark.long
def test_it_is_that_of_scikit_learn_on_the_whole_demo(tmp_path):
    """A tenth of its steps."""
    pytest.importorskip("sklearn")
    from fastjepa.start import start

    s = configfile.load("configs/demo.yaml", [f"log.folder={tmp_path}", "runtime.stop_at=300", "eval.probe=none"])
    start(s, "demo")
    (run,) = tmp_path.glob("demo-*")
    videos = open_collections(s.data.path, s.optim.seed)
    x, rows, labels = pooled(open_encoder(run).encoder, s, videos)
    for task, y in labels.items():
        have = linear_accuracy(x, y, rows, len(videos.tasks[task].classes))
        assert abs(have - other_accuracy(x, y, rows)) <= 0.01, task

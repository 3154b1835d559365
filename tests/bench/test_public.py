"""The public code as a black box beside ours: its turns, its masks, its end. A small package stands for a checkout."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from bench import test_public as cases
from bench.failures import CannotRun
from bench.public.beside import NoCheckout, PublicCode, Size, checkout, commit_of
from bench.step.contenders import Own
from bench.step.ways import settings_of
from tests.pedantic import Pedantic

CPU = torch.device("cpu")
SIZE = Size("vit_tiny", crop=64, frames=4, batch=2)
# What the black box relies on: the names it replaces, and what they are called with.
TRAIN = """
import timm, pandas  # absent on purpose
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

CALLED = []


def gpu_timer(closure, log_timings=True):
    return closure(), -1.0


def grad_logger(parameters):
    CALLED.append("grad_logger")


def adamw_logger(optimizer):
    CALLED.append("adamw_logger")


class Collator:
    def __call__(self, batch):
        sets = lambda kept: [torch.arange(k).repeat(len(batch), 1) for k in kept]
        return torch.zeros(1), sets((3 + len(CALLED) % 2, 2)), sets((5, 6))


def main(args):
    assert dist.get_world_size() == 1
    loader, sampler = init_data(collator=Collator(), unused=1)
    sampler.set_epoch(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    print("noise on standard output")
    for step, (clips, context, target) in enumerate(loader):
        assert clips[0][0].shape == (args["data"]["batch_size"], 3, 4, 64, 64)
        if step == {failing}:
            raise RuntimeError("it broke")

        def train_step():
            model(torch.ones(1, 4)).sum().backward()
            grad_logger([]), adamw_logger(None)
            return (0.5 + step / 100 + len(CALLED), 0)

        gpu_timer(train_step)
    raise AssertionError("the loop ran out of batches before it was stopped")
"""


@pytest.fixture
def repo(tmp_path):
    """Makes a stand-in for a checkout."""

    def make(failing=-1):
        package = tmp_path / "peer" / "app" / "vjepa"
        package.mkdir(parents=True, exist_ok=True)
        (package / "train.py").write_text(TRAIN.replace("{failing}", str(failing)))
        return tmp_path / "peer"

    return make


@pytest.mark.parametrize(("variant", "calls"), [("shipped", 2), ("nostats", 0)])
def test_it_takes_a_turn_when_told_and_ends_when_left(repo, variant, calls):
    public = PublicCode(repo(), variant, SIZE, steps=6, turn=3, device=CPU, warm_up=2)
    assert len(public.losses()) == 2  # it has warmed up and waits
    assert len(public.turn(3)) == 3
    losses = public.losses()
    assert losses == pytest.approx([0.5 + step / 100 + calls * (step + 1) for step in range(6)])
    assert len(public.turn(3)) == 3
    public.close()
    public.close()  # a second time is no error
    assert public.process.returncode == 0


def test_our_side_gets_its_masks(repo):
    public = PublicCode(repo(), "nostats", SIZE, steps=2, turn=2, device=CPU, warm_up=2)
    try:
        assert len(public.batches.draws) == 5
        draw = public.batches.draws[0]
        assert [one.tolist()[0] for one in draw.context] == [[0, 1, 2], [0, 1]]
        assert [one.shape[1] for one in draw.target] == [5, 6]
        s = settings_of("vitl", "packed", quick=False, overrides=cases.TINY_SETTINGS)
        assert (s.data.crop, s.data.frames, s.optim.global_batch, s.model.name) == (64, 4, 2, "vit_tiny")
        ours = Own(s, public.batches, CPU, warm_up=1)
        assert len(ours.turn(1)) == 1
    finally:
        public.close()


@pytest.mark.parametrize("failing", [0, 3])
def test_one_that_breaks_says_what_it_said_last(repo, failing):
    def run():
        public = PublicCode(repo(failing), "shipped", SIZE, steps=2, turn=2, device=CPU, warm_up=2)
        try:
            public.turn(2)
        finally:
            public.close()

    with pytest.raises(CannotRun, match=r"ended with exit code 1: .*RuntimeError: it broke"):
        run()


def test_a_checkout_must_be_named(monkeypatch, tmp_path):
    monkeypatch.delenv("JEPA_REPO", raising=False)
    with pytest.raises(NoCheckout, match="JEPA_REPO names no checkout"):
        checkout()
    monkeypatch.setenv("JEPA_REPO", str(tmp_path))
    with pytest.raises(CannotRun, match=r"expected a checkout of the public code with app/vjepa/train\.py, given"):
        checkout()


def test_a_wrong_checkout_or_one_that_breaks_is_no_skip(repo, monkeypatch, tmp_path):
    def case():
        cases.test_public(SimpleNamespace(), lambda rows: None, CPU, "tiny", "shipped")

    monkeypatch.delenv("JEPA_REPO", raising=False)
    with pytest.raises(pytest.skip.Exception, match="names no checkout"):
        case()
    monkeypatch.setenv("JEPA_REPO", str(tmp_path / "nowhere"))
    with pytest.raises(pytest.fail.Exception, match="expected a checkout"):
        case()
    monkeypatch.setenv("JEPA_REPO", str(repo(0)))
    with pytest.raises(pytest.fail.Exception, match="it broke"):
        case()


def test_the_commit_of_a_checkout_is_known_where_it_has_one(tmp_path):
    assert commit_of(tmp_path) is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    named = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *named, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    assert len(commit_of(tmp_path)) == 40
    inside = tmp_path / "unpacked"
    inside.mkdir()
    assert commit_of(inside) is None, "that is another repository's"


def test_a_case_measures_both_in_turns(repo, monkeypatch):
    monkeypatch.setenv("JEPA_REPO", str(repo()))
    monkeypatch.setattr(cases, "CPU_STEPS", 10)
    rows = []

    cases.with_public(Pedantic(), rows.extend, CPU, "tiny", "nostats")
    assert [row["name"] for row in rows] == ["step packed", "step public nostats", "step packed over public nostats"]
    assert rows[0]["n"] == rows[1]["n"] == 10
    assert rows[2]["in_turns"]
    assert rows[2]["parity"] is None

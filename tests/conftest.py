"""Shared by all tests: where optional inputs lie, and which skips are allowed."""

import os
from pathlib import Path

import pytest
import torch

from fastjepa import configfile
from fastjepa.start import start

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
NO_CUDA = "needs a CUDA device"
LONGEST = 3600  # seconds of a test that is marked long; others have pyproject.toml's
# A skip with any other reason is a failure where CI is set: something that should have run did not.
_ABSENT = () if SHARED.is_dir() else ("absent",)
EXPECTED_SKIPS = (
    NO_CUDA,
    "root may read everything",
    "mounting is not allowed here",
    "needs root to mount",
    "timm is not installed",
    "torchcodec does not load",  # FFmpeg's libraries come with the system
    "the dispatcher says no",
    *_ABSENT,
)


def pytest_sessionstart():
    # Tests start pytest themselves, and pytest-benchmark takes that for a worker of xdist as long as this is set.
    os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(LONGEST))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_CUDA))


def pytest_terminal_summary(terminalreporter, config):
    if not os.environ.get("CI"):
        return
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(expected in reason for expected in EXPECTED_SKIPS):
            terminalreporter.write_line(f"unexpected skip: {report.nodeid}: {reason}", red=True)
            config.unexpected_skip = True


def pytest_unconfigure(config):
    if getattr(config, "unexpected_skip", False):
        os._exit(6)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and parity cases beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder beside the repository is absent")
    return SHARED


@pytest.fixture(autouse=True)
def _one_thread():
    """Parity numbers were taken with one thread, and a test must not depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _ordinary_scheduling():
    """A test must not turn this process, and all that it starts from then on, into a real-time one."""
    yield
    if hasattr(os, "sched_getscheduler"):
        policy = os.sched_getscheduler(0)
        if policy in (os.SCHED_FIFO, os.SCHED_RR):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            raise AssertionError("this process has become a real-time one")


# A whole run of a tiny model on tiny videos, in seconds.
SETTINGS = """
model: {name: vit_nano, predictor_depth: 1, predictor_dim: 16, init_std: 0.04}
mask:
  sets:
    - {num_blocks: 3, spatial_scale: [0.3, 0.3], temporal_scale: [0.5, 0.5]}
    - {num_blocks: 2, spatial_scale: [0.6, 0.6], temporal_scale: [0.5, 0.5]}
  truncation: random
  group: 4
data:
  path: synthetic://moving-shapes?videos=48&size=48&frames=8
  frames: 4
  stride: 1
  crop: 32
  patch: 8
  batch_size: 4
  workers: 0
optim:
  steps: 10
  warmup_steps: 2
  global_batch: 4
  lr: 1e-3
  clip_grad: 10.0
  dtype: float32
runtime: {threads: 1, device: cpu}
log: {every: 1, images: false}
checkpoint: {every: 3, keep: 2}
eval: {probe: none}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path = tmp_path / "tiny.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def run(recipe, tmp_path):
    """Train in this process; returns (exit code, run folder)."""

    def go(*overrides, folder="runs"):
        settings = configfile.load(recipe, [f"log.folder={tmp_path / folder}", *overrides])
        code = start(settings, "tiny")
        folders = sorted((tmp_path / folder).glob("tiny-*"), key=lambda p: p.stat().st_mtime)
        return code, folders[-1] if folders else None

    return go


@pytest.fixture
def read_settings(tmp_path):
    """Settings from a YAML text and overrides."""

    def go(text="", *overrides):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return configfile.load(tmp_path / "run.yaml", list(overrides))

    return go


@pytest.fixture
def refuse_settings(read_settings, tmp_path):
    """The sentences for a wrong YAML text or override, without the path of its folder."""

    def go(text="", *overrides):
        with pytest.raises(configfile.SettingsError) as caught:
            read_settings(text, *overrides)
        mistakes = caught.value.mistakes
        assert str(caught.value) == "\n".join(mistakes)
        assert mistakes
        assert len(set(mistakes)) == len(mistakes)
        assert not any("\n" in mistake for mistake in mistakes)
        return [mistake.replace(f"{tmp_path}/", "") for mistake in mistakes]

    return go

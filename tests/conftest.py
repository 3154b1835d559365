"""Shared by all tests: where optional inputs lie, and which skips are allowed."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
NO_CUDA = "needs a CUDA device"
# A skip with any other reason is a failure where CI is set: something that should have run did not.
EXPECTED_SKIPS = (NO_CUDA, "root may read everything")


def pytest_collection_modifyitems(items):
    for item in items:
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

"""What `pytest bench --benchmark-only` adds to pytest-benchmark: result files, a time limit, and what was skipped."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.files import Row, made
from bench.recording import Kind, Session, selection_of

SESSION = pytest.StashKey[Session]()
BEGAN = pytest.StashKey[float]()
FILES = pytest.StashKey[list[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options of the benches."""
    group = parser.getgroup("bench", "measurements of fastjepa")
    group.addoption("--results", type=Path, default=Path(__file__).parent / "results", help="folder of result files")
    group.addoption("--budget", type=float, default=float("inf"), help="seconds after which no further case begins")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the session's files."""
    # What the project's own settings leave out, the long tests, are no cases.
    mark = "" if config.option.markexpr == "not long" else config.option.markexpr
    selection = selection_of(config.option.keyword, mark, config.args)
    config.stash[SESSION] = Session(config.option.results, config.invocation_params.args, selection)
    config.pluginmanager.register(_Deselection(config.stash[SESSION]))
    config.stash[BEGAN] = time.monotonic()


class _Deselection:
    """A plugin, as the hook does not say whose session it speaks of."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def pytest_deselected(self) -> None:
        # The items may be none: --lf keeps some from being collected at all.
        self.session.some_cases_only()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Make the folder of result files, before anything is measured."""
    if session.config.option.collectonly:
        return
    try:
        made(session.config.option.results, "--results")
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that figures are of: the current GPU, or else the processor with one thread."""
    found = _device()
    if found.type == "cpu":
        torch.set_num_threads(1)
    return found


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="session")
def videos() -> Iterator[Any]:
    """A `bench.data.videos.Shelf`: videos to measure with, made where they are asked for; they go with the session."""
    from bench.data.videos import Shelf  # needs PyAV, which the benches of kernels do without

    with tempfile.TemporaryDirectory() as folder:
        yield Shelf(Path(folder))


@pytest.fixture(autouse=True)
def _within_budget(request: pytest.FixtureRequest) -> None:
    budget = request.config.option.budget
    if time.monotonic() - request.config.stash[BEGAN] > budget:
        _kind(request.config, request.module).lacking = True
        pytest.skip(f"no time was left of --budget {budget:g}")


@pytest.fixture
def results(request: pytest.FixtureRequest, device: torch.device) -> Callable[[Sequence[Row]], None]:
    """Takes the rows of a case: they are in the file of the module's KIND at once, and in the case's extra_info."""
    kind = _kind(request.config, request.module)
    benchmark = request.getfixturevalue("benchmark")

    def add(rows: Sequence[Row]) -> None:
        kind.add(rows)
        benchmark.extra_info.setdefault("rows", []).extend(rows)

    return add


def _kind(config: pytest.Config, module: Any) -> Kind:
    return config.stash[SESSION].kind(module.KIND, _device() if module.ON_A_DEVICE else None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Note in its file that a case failed, or why it was skipped."""
    report = yield
    kind = _kind(item.config, item.module) if isinstance(item, pytest.Function) else None
    if kind is not None and report.skipped:
        kind.add([{"name": item.name, "skipped": _reason(report), "parameters": {}}])
    elif kind is not None and report.failed:
        kind.lacking = True
    return report


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Finish the files."""
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    session.config.stash[FILES] = session.config.stash[SESSION].close(ended=ended)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What was skipped, by reason, and the files that were written."""
    reports = terminalreporter.stats.get("skipped", [])
    for reason, count in Counter(_reason(report) for report in reports).most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    for path in config.stash.get(FILES, []):
        terminalreporter.write_line(f"wrote {path}")

"""The architecture, held by a test: which rooms exist, which way the arrows run, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "fastjepa").rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything imported anywhere in a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name: str) -> set[str]:
    """Rooms (first name below fastjepa) that a module imports."""
    return {module.split(".")[1] for module in imports(MODULES[name]) if module.startswith("fastjepa.")}


def room(prefix: str) -> list[str]:
    return [name for name in MODULES if name == prefix or name.startswith(f"{prefix}.")]


def test_settings_import_nothing_of_ours_and_no_torch():
    assert ours("fastjepa.config") == {"settings"}
    assert all(ours(name) <= {"settings"} for name in room("fastjepa.settings"))
    named = ("fastjepa", "fastjepa.config", "fastjepa.configchecks", "fastjepa.configfile", "fastjepa.expectation")
    for name in (*named, *room("fastjepa.settings")):
        assert not any(module.split(".")[0] == "torch" for module in imports(MODULES[name])), name


@pytest.mark.parametrize(
    ("prefix", "allowed"),
    [
        ("fastjepa.pixels", set()),
        ("fastjepa.models", {"models", "masks", "pixels"}),
        ("fastjepa.masks", {"masks", "streams"}),
        ("fastjepa.streams", set()),
        ("fastjepa.jepa", {"dense", "masks", "models", "pixels"}),
        ("fastjepa.dense", {"masks"}),
        ("fastjepa.masters", {"jepa"}),
        ("fastjepa.updates", {"jepa", "masters"}),
        ("fastjepa.exchange", {"jepa", "updates"}),
        ("fastjepa.schedules", {"config"}),
        ("fastjepa.optim", {"exchange", "jepa", "masters", "schedules", "updates"}),
        ("fastjepa.noise", {"masks", "models", "streams"}),
        ("fastjepa.attending", {"models"}),
        ("fastjepa.fused", {"attending", "masks", "models", "pixels"}),
        ("fastjepa.pieces", {"attending", "config", "fused", "models"}),
        ("fastjepa.compiling", {"config", "jepa", "pieces"}),
        ("fastjepa.data", {"data", "masks", "pixels", "streams"}),
        ("fastjepa.preparing", {"config", "data", "exits"}),
        (
            "fastjepa.survey",
            {"build", "config", "data", "exits", "forecast", "gpus", "memory", "plan", "preparing", "verbs"},
        ),
        ("fastjepa.opened", {"build", "config", "configfile", "fit", "interop", "models"}),
        (
            "fastjepa.interop",
            {"checkpoint", "config", "configfile", "fit", "interop", "jepa", "models", "pixels", "schedules"},
        ),
        ("fastjepa.handover", {"data", "fit", "interop", "opened"}),
        ("fastjepa.transformers_model", {"interop", "models"}),
        ("fastjepa.features", {"config", "data", "features", "interop", "opened", "parallel"}),
        ("fastjepa.verbs.parsing", set()),
        ("fastjepa.sinks", {"config"}),
        ("fastjepa.eta", set()),
        ("fastjepa.profiling", set()),
        ("fastjepa.log", {"config", "runfolder", "sinks"}),
        ("fastjepa.runstate", {"log"}),
        ("fastjepa.probe", {"data", "models", "probe", "streams"}),
        ("fastjepa.verbs.progress", set()),
        ("fastjepa.verbs.viz", {"exits", "pictures", "verbs"}),
        ("fastjepa.viz", {"masks", "pixels", "viz"}),
        (
            "fastjepa.pictures",
            {"build", "config", "configfile", "data", "interop", "opened", "probe", "viz"},
        ),
        ("fastjepa.health", set()),
        ("fastjepa.costs", set()),
        ("fastjepa.gpus", set()),
        ("fastjepa.roofline", {"costs", "gpus"}),
        ("fastjepa.memory", {"costs", "gpus"}),
        ("fastjepa.parallel", {"config", "exchange", "exits", "jepa", "models", "parallel", "updates"}),
        ("fastjepa.spreading", {"build", "config", "exchange", "jepa", "masks", "memory", "parallel", "plan"}),
        ("fastjepa.findings", {"data", "log", "parallel"}),
        ("fastjepa.keeping", {"checkpoint", "config", "log", "optim", "parallel", "runfolder"}),
        ("fastjepa.reporting", {"gpus", "health", "log", "optim", "schedules"}),
        ("fastjepa.checkpoint", {"checkpoint"}),
        ("fastjepa.signals", {"exits"}),
        ("fastjepa.badsteps", {"data", "optim", "runfolder"}),
        ("fastjepa.alarms", set()),
        ("fastjepa.verdict", {"alarms"}),
        ("fastjepa.watchdog", {"watcher"}),
        ("fastjepa.watcher", set()),
    ],
)
def test_arrows_run_one_way(prefix, allowed):
    names = room(prefix)
    assert names
    for name in names:
        assert ours(name) <= allowed, f"{name} imports {ours(name) - allowed}"


def test_peers_never_import_one_another():
    peers = {"parallel", "checkpoint", "log", "health", "probe"}
    for peer in peers:
        names = room(f"fastjepa.{peer}")
        assert names
        for name in names:
            assert not ours(name) & (peers - {peer}), name


def test_kernels_know_nothing_of_fastjepa():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(module.split(".")[0] == "fastjepa" for module in imports(path)), path


def test_models_know_no_machines():
    for name in room("fastjepa.models") + room("fastjepa.masks") + ["fastjepa.jepa", "fastjepa.pixels"]:
        banned = ("torch.distributed", "torch.cuda", "logging", "rich")
        assert not [m for m in imports(MODULES[name]) if m.startswith(banned)], name


def test_files_stay_short():
    folders = ("fastjepa", "kernels", "bench", "tests")
    long = {
        str(p): n for f in folders for p in (ROOT / f).rglob("*.py") if (n := len(p.read_text().splitlines())) > 450
    }
    assert not long


def test_importing_does_no_work():
    """Every module can be imported without output, and the package without torch."""
    code = "import sys, fastjepa; assert 'torch' not in sys.modules\n"
    code += "\n".join(f"import {name}" for name in MODULES if name != "fastjepa.__main__")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_bench_runs_the_demo_and_writes_what_it_printed(tmp_path):
    command = [sys.executable, "bench/demo.py", "--seeds", "3", "--out", str(tmp_path), "runtime.stop_at=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(next(tmp_path.glob("demo-*.json")).read_text())
    assert result["complete"]
    assert result["quick"]  # other settings than the demo's: never to be quoted
    assert result["command"] == "python bench/demo.py --seeds 3 runtime.stop_at=2"
    values = {row["name"]: row["value"] for row in result["rows"]}
    for task in ("motion", "shape"):
        assert f"{task:<14}{values[f'{task} trained']:>8.1f}%{values[f'{task} untrained']:>10.1f}%" in done.stdout
    assert values["whole command"] > 0

"""The ceilings bench: its files, its skips, its arithmetic, and the script that runs it on a GPU machine."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STAGES = ("gemm", "copy", "attention", "conv", "optimizer", "elementwise", "fp8")
# What a quick run on a CPU may leave out; everything else must have a figure.
CPU_SKIPS = (
    ".cudnn.",
    ".efficient.",
    ".varlen.",
    ".layer_norm.compiled.",
    ".layer_norm_fp32.compiled.",
    ".gelu.compiled.",  # without a C++ compiler
    ".fp8",
)


def environment(**extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def ceilings(*arguments, **extra):
    command = [sys.executable, "-m", "bench.ceilings", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of all stages: (its process, {stage: content of its file}, its folder)."""
    folder = tmp_path_factory.mktemp("ceilings") / "results"
    process = ceilings("--quick", "--device", "cpu", "--out", folder)
    assert process.returncode == 0, process.stderr
    files = {path.name.split("-")[1]: json.loads(path.read_text()) for path in folder.iterdir()}
    return process, files, folder


@pytest.fixture
def bench():
    """Imports a module of the bench folder."""
    return lambda name: importlib.import_module(f"bench.{name}")


def test_every_stage_writes_one_complete_file_and_leaves_no_temporary(quick):
    _, files, folder = quick
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == len(STAGES)
    assert set(files) == set(STAGES)
    for stage, name in zip(sorted(STAGES), names):
        assert name.startswith(f"ceilings-{stage}-cpu-")
        assert name.endswith("-quick.json"), "a quick run must not overwrite a ceiling of the same day"
    assert all(content["complete"] for content in files.values())


def test_a_file_says_where_it_comes_from_and_that_it_is_quick(quick):
    for content in quick[1].values():
        assert content["device"].startswith("CPU ")
        assert content["torch"] == torch.__version__
        assert content["command"] == "python -m bench.ceilings --device cpu --quick"
        assert content["quick"] is True
        assert {"triton", "commit", "date"} <= content.keys()
        assert content["commit"] is None or len(content["commit"]) == 40
        assert str(ROOT) not in json.dumps(content)


def test_every_row_has_a_finite_figure_or_a_reason(quick):
    for stage, content in quick[1].items():
        assert content["rows"]
        for row in content["rows"]:
            assert row["name"]
            assert row["parameters"]
            if "skipped" in row:
                assert len(row["skipped"]) > 20
                assert "value" not in row
                assert any(part in f"{stage}.{row['name']}" for part in CPU_SKIPS), row
                continue
            figures = [row[key] for key in ("min", "value", "max", "ms", "drift")]
            assert all(math.isfinite(figure) and figure > 0 for figure in figures), row
            assert row["min"] <= row["value"] <= row["max"]
            assert row["n"] >= 3


def test_rows_of_a_stage_have_different_names(quick):
    for content in quick[1].values():
        names = [row["name"] for row in content["rows"]]
        assert len(set(names)) == len(names)


def test_a_rate_is_the_stated_work_over_the_median_time(quick):
    _, files, _ = quick
    for row in files["gemm"]["rows"]:
        p = row["parameters"]
        assert row["value"] * 1e12 == pytest.approx(2 * p["m"] * p["n"] * p["k"] / (row["ms"] / 1e3))
    measured = [row for row in files["attention"]["rows"] if "value" in row]
    assert {row["parameters"]["direction"] for row in measured} == {"forward", "backward", "forward_backward"}
    for row in measured:
        p = row["parameters"]
        per_pair = {"forward": 4, "backward": 8, "forward_backward": 12}[p["direction"]]
        pairs = sum(count * int(length) ** 2 for length, count in p["lengths"].items())
        work = per_pair * p["heads"] * p["head_dim"] * pairs
        assert row["value"] * 1e12 == pytest.approx(work / (row["ms"] / 1e3))
    for row in files["copy"]["rows"]:
        assert row["value"] * 1e9 == pytest.approx(2 * row["parameters"]["bytes"] / (row["ms"] / 1e3))


def test_the_run_ends_with_one_table_of_all_rows(quick):
    process, files, _ = quick
    lines = process.stdout.splitlines()
    assert len(lines) == 1 + sum(len(content["rows"]) for content in files.values())
    assert lines[0].split() == ["name", "value", "unit", "min", "max", "ms", "n", "note"]
    unit = lines[0].index("unit")
    assert {line[unit : unit + 7].strip() for line in lines[1:]} == {"TFLOP/s", "GB/s", ""}


def test_an_unknown_stage_ends_with_one_sentence(tmp_path):
    process = ceilings("--stages", "gemm,gems", "--out", tmp_path)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [f"--stages: expected some of {','.join(STAGES)}, got 'gems'."]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_ends_with_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    process = ceilings("--quick", "--device", "cpu", "--out", tmp_path / "file")
    assert process.returncode == 2
    assert process.stderr.startswith("--out: expected a folder")
    assert len(process.stderr.splitlines()) == 1


def test_asking_for_cuda_without_it_ends_with_one_sentence(tmp_path):
    process = ceilings("--device", "cuda", "--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 2
    assert process.stderr.startswith("--device: ")
    assert len(process.stderr.splitlines()) == 1


def test_operation_counts(bench):
    measure = bench("measure")
    assert measure.gemm_flops(2, 3, 5) == 60
    assert measure.gemm_flops(37632, 3072, 1024) == 236760072192
    assert measure.attention_forward_flops(1, 1, 2, 3) == 48
    assert measure.attention_forward_flops(24, 16, 1568, 64) == 4 * 24 * 16 * 1568**2 * 64
    assert measure.attention_backward_flops(24, 16, 1568, 64) == 8 * 24 * 16 * 1568**2 * 64


def test_attention_of_unequal_samples_counts_each_at_its_own_length(bench):
    cases, shapes = bench("ceilings.cases"), bench("ceilings.shapes")
    ragged = shapes.Attention("ragged", heads=3, head_dim=5, lengths=(2, 7))
    assert cases.attention_flops(ragged, "forward") == 4 * 3 * 5 * (4 + 49)
    assert cases.attention_flops(ragged, "backward") == 8 * 3 * 5 * (4 + 49)
    assert cases.attention_flops(ragged, "forward_backward") == 12 * 3 * 5 * (4 + 49)


def test_the_full_run_covers_the_published_shapes(bench):
    cases, shapes = bench("ceilings.cases"), bench("ceilings.shapes")
    products = {name: tuple(sizes) for name, *sizes in cases.layer_products(shapes.FULL)}
    assert len(products) == 16 + 8  # four layers, two encoders, two row counts; then the predictor's
    assert products["vitl.target.qkv"] == (37632, 3072, 1024)
    assert products["vith.context.fc2"] == (11160, 1280, 5120)
    assert products["predictor.fc1"] == (55632, 1536, 384)
    assert products["predictor.embed.vith"] == (11160, 384, 1280)
    assert products["predictor.out.vitl"] == (44448, 1024, 384)
    counts = [
        sum(math.prod(size) for size in cases.parameter_shapes(width, depth))
        for _, width, depth in shapes.FULL.encoders
    ]
    assert [round(count / 1e6) for count in counts] == [304, 632]
    names = [case.name for stage in STAGES for case in cases.STAGES[stage](shapes.FULL)]
    assert "vith384.target.cudnn.backward" in names
    assert "predictor16x24.1203.efficient.forward_backward" in names


def test_patches_are_cut_in_the_order_of_a_conv3d_weight(bench):
    cut_patches = bench("ceilings.cases").cut_patches
    clips, weight = torch.randn(2, 3, 4, 32, 48), torch.randn(8, 3, 2, 16, 16)
    expected = torch.nn.functional.conv3d(clips, weight, stride=(2, 16, 16)).flatten(2).transpose(1, 2).reshape(-1, 8)
    torch.testing.assert_close(cut_patches(clips) @ weight.view(8, -1).t(), expected, rtol=1e-3, atol=1e-3)


def raising(error):
    def prepare(device):
        raise error

    return prepare


def test_what_the_machine_cannot_run_is_a_row_with_its_reason(bench):
    measure = bench("measure")
    for error in (torch.OutOfMemoryError("no room"), NotImplementedError("no kernel"), ImportError("no module")):
        case = measure.Case("x", raising(error), 1.0, "GB/s", {"m": 1})
        row = measure.measure(case, torch.device("cpu"), 0.001)
        assert row == {"name": "x", "parameters": {"m": 1}, "skipped": f"{type(error).__name__}: {error}"}


def test_a_mistake_or_a_broken_device_is_not_taken_for_a_missing_kernel(bench):
    measure = bench("measure")
    for error in (KeyError("typing error"), torch.AcceleratorError("illegal memory access")):
        with pytest.raises(type(error)):
            measure.measure(measure.Case("x", raising(error), 1.0, "GB/s", {}), torch.device("cpu"), 0.001)


def test_a_failed_write_leaves_the_earlier_file_whole(bench, tmp_path):
    write_results, path = bench("files").write_results, tmp_path / "r.json"
    write_results(path, {"device": "d"}, [{"value": 1.0}], complete=False)
    with pytest.raises(ValueError):
        write_results(path, {"device": "d"}, [{"value": math.nan}], complete=True)
    assert json.loads(path.read_text()) == {"device": "d", "complete": False, "rows": [{"value": 1.0}]}
    assert list(tmp_path.iterdir()) == [path]


def test_load_readings_are_numbers_or_none(bench):
    parse_load = bench("machine").parse_load
    assert parse_load("1755, 1980, 699.31, [N/A], 61\n") == {
        "clock_mhz": 1755.0,
        "max_clock_mhz": 1980.0,
        "power_w": 699.31,
        "power_limit_w": None,
        "temperature_c": 61.0,
    }
    assert parse_load("No devices were found\n") == {}


@pytest.mark.gpu
def test_cuda_time_is_the_kernels_own(bench):
    measure = bench("measure")
    # Two million cycles are 1.0 ms at 2 GHz and 2.0 ms at 1 GHz.
    times = measure.time_calls(lambda: torch.cuda._sleep(2_000_000), torch.device("cuda"), seconds=0.05)
    assert all(0.9 < time < 4 for time in times)


@pytest.mark.gpu
def test_a_quick_run_on_cuda_has_figures_for_what_every_card_can_do(tmp_path):
    process = ceilings("--quick", "--device", "cuda", "--out", tmp_path, "--stages", "gemm,copy,conv,optimizer")
    assert process.returncode == 0, process.stderr
    rows = [row for path in tmp_path.iterdir() for row in json.loads(path.read_text())["rows"]]
    assert not [row for row in rows if "skipped" in row]

"""Which result files speak, what the regions of a README say of them, and that nothing else is touched."""

import json
import re
from pathlib import Path

import pytest

from bench.report import plots, stored, tables
from bench.report.__main__ import main
from bench.report.regions import REGIONS
from tests.planted_results import CPU, H100, operation, pair, plant, plant_everything, row, skipped

PICTURES = ("data", "scaling", "step", "public", "kernels")


@pytest.fixture
def home(tmp_path):
    """A README with every region, and a folder of result files."""
    regions = "".join(f"<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->\n\n" for name in REGIONS)
    (tmp_path / "README.md").write_text(f"# Before\n\n{regions}After, old\n")
    plant_everything(tmp_path / "bench" / "results")
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are not drawn, as that takes most of the time: their place is taken by a word."""
    monkeypatch.setattr(plots, "png", lambda plot, files: b"drawn")


def report(home: Path, *arguments: str) -> int:
    folders = {"results": home / "bench" / "results", "readme": home / "README.md", "docs": home / "docs"}
    return main([*arguments, *(f"--{name}={path}" for name, path in folders.items())])


def region(home: Path, name: str) -> str:
    text = (home / "README.md").read_text()
    return text.partition(f"<!-- bench:{name} -->\n")[2].partition(f"\n<!-- /bench:{name} -->")[0]


def state(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (home / "README.md", *(home / "docs").glob("*"))}


def test_written_twice_nothing_changes_and_outside_of_regions_nothing_ever(home, capsys):
    assert report(home) == 0
    first = state(home)
    assert first.keys() == {"README.md", *(f"bench-{kind}.png" for kind in PICTURES)}
    text = first["README.md"].decode()
    assert text.startswith("# Before\n\n<!-- bench:demo -->\n")
    assert text.endswith("<!-- /bench:ceilings -->\n\nAfter, old\n")
    assert "\nold\n" not in text
    assert report(home) == 0
    assert state(home) == first
    assert capsys.readouterr().out.endswith("nothing changed\n")


@pytest.mark.usefixtures("undrawn")
def test_check_writes_nothing_and_says_what_would_change(home, capsys):
    before = state(home)
    assert report(home, "--check") == 1
    assert state(home) == before
    printed = capsys.readouterr().out
    assert "README.md would change:" in printed
    assert "+| loader | 1 | 20.0 (19.0 to 21.0) |" in printed
    assert "bench-data.png would be new" in printed
    report(home)
    assert report(home, "--check") == 0
    path = home / "docs" / "bench-data.png"
    path.write_bytes(path.read_bytes() + b"\n")
    assert report(home, "--check") == 1
    assert "bench-data.png would change" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\n<!-- bench:cencus -->\n", "line 2: expected a region among demo, .*, found 'cencus'"),
        ("<!-- bench:census -->\n", "expected <!-- /bench:census --> after its beginning, found none"),
        ("<!-- /bench:census -->\n", "line 1: expected a region 'census' that ends here, found none"),
        ("<!-- bench:census -->\n<!-- bench:data -->\n", "line 2: expected the end of region 'census' first"),
        ("<!-- bench:census -->\n<!-- /bench:data -->", "line 2: expected a region 'data' that ends here, found none"),
    ],
)  # fmt: skip
def test_a_wrong_mark_is_one_sentence(home, capsys, text, wanted):
    (home / "README.md").write_text(text)
    assert report(home) == 2
    printed = capsys.readouterr().err
    assert re.search(wanted, printed)
    assert printed.count("\n") == 1
    assert (home / "README.md").read_text() == text
    assert not (home / "docs").exists()


@pytest.mark.usefixtures("undrawn")
def test_what_was_not_measured_says_how_it_would_be(home):
    (home / "bench" / "results" / "step-nvidia-h100-80gb-hbm3-2026-11-27.json").unlink()
    report(home)
    assert region(home, "step") == "Not measured yet: `bench/gpu.sh step` on a machine with a GPU."
    assert region(home, "demo") == "Not measured yet: `python bench/demo.py`."
    assert not (home / "docs" / "bench-step.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_tables_show_figures_spread_and_what_was_skipped(home):
    report(home)
    assert "![Clips a second of decoders and loader](docs/bench-data.png)" in region(home, "data")
    assert "<details><summary>The figures</summary>" in region(home, "data"), "the picture says enough"
    assert "| what | workers | clips/s (p20 to p80) |\n|---|---|---|\n| loader | 1 | 20.0 (19.0 to 21.0) |" in region(
        home, "data"
    )
    across = "| size | gop | decode, ours (clips/s) | decode, PyAV (clips/s) | speed of ours over PyAV (x) |"
    assert f"Frames 16:\n\n{across}\n" in region(home, "data")
    assert "| 340x256 | 12 | 120 (114 to 126) | 28.0 (26.6 to 29.4) | 4.29 (4.07 to 4.50) |" in region(home, "data")
    assert "| masks | 120 (114 to 126) |" in region(home, "data")
    assert "The file has also: source frames, ours; loader, batches." in region(home, "data")
    assert "| waiting for data | 3.2 |" in region(home, "data")
    assert "Skipped: torchcodec is not installed (2)." in region(home, "data")
    assert "Model tiny:\n\n| what | against | at | clips/s (p20 to p80) |" in region(home, "scaling")
    assert "| step | processes | 1 | 50.0 (47.5 to 52.5) |" in region(home, "scaling")
    steps = region(home, "step")
    titles = [steps.index(f"{model}, 24 clips a step:") for model in ("ViT-L/16", "ViT-H/16", "ViT-H/16 at 384 px")]
    assert titles == sorted(titles)
    ours, other = "| packed | 240 (238 to 242) | 31.0% | 33.3 |", "reference | 120 (119 to 121) | 31.0% | 33.3 |"
    assert f"{ours} {other} 2.00 (1.98 to 2.02) |" in steps
    assert "2.00 (1.98 to 2.02), not in turns |" in steps
    assert "| ms of | target | context | predictor | loss | backward | optimizer | step |" in steps
    assert "| packed | 10.0 | 12.0 | 9.00 | 1.00 | 60.0 | 4.00 | 97.0 |" in steps  # once, from the first pair
    assert "98.0" not in steps
    assert "Skipped: packed-fused: TritonError: no." in steps
    assert "public as shipped | 110 (109 to 111) | 31.0% | 33.3 | 2.18 (2.16 to 2.20) |" in region(home, "public")
    assert "| embed: product over convolution | 1.20 (1.14 to 1.26) |" in region(home, "rejected")
    fastest = "| TFLOP/s | 500 | 450 | 520 | **610** cudnn | 80% | 0.82 (0.78 to 0.86) cudnn |"
    assert fastest in region(home, "kernels")
    assert "| gemm | 3 | 0 | TFLOP/s | 601 (gemm.1) | 602 | 603 (gemm.3) |" in region(home, "ceilings")


@pytest.mark.usefixtures("undrawn")
def test_a_region_ends_with_where_its_figures_come_from(home):
    plant(home / "bench" / "results", "data", [row("decode", 5, "clips/s")], "CPU B", modified=True, commit=None)
    report(home)
    file = "data-cpu-amd-epyc-2026-11-27.json"
    source = f"From `pytest bench --benchmark-only` on {CPU}, torch 2.13.0, commit aaaaaaa, 2026-11-27: "
    assert f"**{CPU}**" in region(home, "data")
    assert f"{source}[{file}](bench/results/{file})." in region(home, "data")
    assert "on CPU B, torch 2.13.0, commit not known, code not committed, 2026-11-27: [data-cpu-b-2026" in region(
        home, "data"
    )


def test_the_census_as_a_whole_and_without_the_kernels_of_a_piece(home):
    counts = [
        row(name, value, unit, None, model="vitl", execution=execution, component=component)
        for execution, scale in (("reference", 2), ("packed", 1))
        for component in ("total", "target linear")
        for name, value, unit in (("bytes", 170.0 * scale, "GB"), ("launches", 1116 * scale, "launches"))
    ]
    fewer = [row(f"times fewer {name}", 2.0, "x", None, model="vitl") for name in ("bytes", "launches")]
    where = {"model": "vitl", "execution": "packed", "without": "norm"}
    counts += [
        row(name, value, unit, None, model="vitl", execution="reference-stored", component="total")
        for name, value, unit in (("bytes", 255.0, "GB"), ("launches", 1500, "launches"))
    ]
    lacking = [row("bytes", 201.5, "GB", None, **where), row("launches", 1400, "launches", None, **where)]
    plant(home / "bench" / "results", "census", [*counts, *fewer, *lacking], on_a_device=False)
    report(home)
    assert "| ViT-L/16, GB moved | 340.0 | 170.0 | 2.00 |" in region(home, "census")
    assert "| ViT-L/16, launches | 2,232 | 1,116 | 2.00 |" in region(home, "census")
    assert "| ViT-L/16, nothing recomputed, GB moved | 255.0 | 170.0 | 1.50 |" in region(home, "census")
    assert "| ViT-L/16 | norm | +31.50 | +284 |" in region(home, "without")
    assert (home / "docs" / "bench-census.png").exists()


def test_several_texts_have_links_of_their_own(home):
    second = home / "bench" / "README.md"
    second.write_text("<!-- bench:data -->\n<!-- /bench:data -->\n")
    results = home / "bench" / "results"
    main(["--results", str(results), "--docs", str(home / "docs"), "--readme", str(home / "README.md"), str(second)])
    assert "](results/data-cpu-amd-epyc-2026-11-27.json)" in second.read_text()
    assert "](../docs/bench-data.png)" in second.read_text()
    assert "](docs/bench-data.png)" in region(home, "data")


def chosen(folder: Path) -> dict[str, stored.Stored]:
    return {str(one.series): one for one in stored.choose(stored.read_folder(folder))}


def test_the_newest_whole_file_of_each_series_speaks(tmp_path):
    for date, value in (("2026-11-25", 1.0), ("2026-11-26", 2.0)):
        plant(tmp_path, "executions", [row("speed", value, "x")], date=date)
        plant(tmp_path, "steps-vitl", [row("step", value, "clips/s")], H100, date, model="vitl")
    plant(tmp_path, "steps-vith_384", [row("step", 7, "clips/s")], H100, model="vith_384")
    plant(tmp_path, "steps-vitl", [row("step", 9, "clips/s")], "CPU", "2026-11-27", "quick", quick=True)
    plant(tmp_path, "executions", [row("speed", 3, "x")], date="2026-11-27", complete=False)
    plant(tmp_path, "executions", [row("speed", 4, "x")], date="2026-11-28", selection="64x3")
    plant(tmp_path, "executions", [row("speed", 5, "x")], "CPU other", date="2026-11-24")
    plant(tmp_path, "census", [row("bytes", 6, "GB", None)], on_a_device=False)
    plant(tmp_path, "census", [row("bytes", 5, "GB", None)], "CPU other", "2026-11-26", on_a_device=False)
    (tmp_path / "kernels-2026-11-27.json").write_text('{"benchmarks": []}')
    found = {series: one.rows[0]["value"] for series, one in chosen(tmp_path).items()}
    assert found == {
        "census": 6, f"executions on {CPU}": 2.0, "executions on CPU other": 5, f"steps vitl on {H100}": 2.0,
        f"steps vith_384 on {H100}": 7,
    }  # fmt: skip


def test_a_file_is_completed_by_others_of_its_commit(tmp_path):
    whole = [row("a", 1.0, "x"), skipped("b", "no time was left"), row("c", 1.0, "x", at=1)]
    plant(tmp_path, "executions", whole, date="2026-11-25")
    more = [row("a", 9.0, "x"), row("b", 2.0, "x"), row("c", 3.0, "x", at=2)]
    plant(tmp_path, "executions", more, date="2026-11-26", selection="b")
    plant(tmp_path, "executions", [row("d", 4.0, "x")], date="2026-11-27", selection="d", commit="b" * 40)
    plant(tmp_path, "executions", [row("e", 5.0, "x")], date="2026-11-28", selection="e", modified=True)
    (one,) = chosen(tmp_path).values()
    assert [(r["name"], r["value"]) for r in one.rows] == [("a", 1.0), ("b", 2.0), ("c", 1.0), ("c", 3.0)]
    assert one.completed_by == ("executions-cpu-amd-epyc-2026-11-26-b.json",)


@pytest.mark.usefixtures("undrawn")
def test_without_a_whole_file_the_newest_speaks_and_says_so(home):
    plant(home / "bench" / "results", "demo", [
        row(name, 1.0, "%", None, seed=0) for name in (*tables.DEMO, "processor time")
    ], complete=False)  # fmt: skip
    report(home)
    assert ", not all cases: [demo-cpu" in region(home, "demo")
    assert region(home, "demo-noised").startswith("Not measured yet: ")  # it compares two, and one is there


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("{", "expected JSON"), (json.dumps({"rows": []}), "expected a result file with device, torch")],
)
def test_a_broken_result_file_is_one_sentence(home, capsys, text, wanted):
    (home / "bench" / "results" / "data-2026-11-27.json").write_text(text)
    assert report(home) == 2
    assert f"data-2026-11-27.json: {wanted}" in capsys.readouterr().err


def test_a_folder_or_readme_that_is_not_there_is_one_sentence(home, capsys):
    assert main(["--results", str(home / "none"), "--readme", str(home / "README.md")]) == 2
    assert main(["--results", str(home / "bench" / "results"), "--readme", str(home / "none.md")]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["--results", "--readme"]


def test_pictures_do_not_depend_on_the_settings_of_matplotlib(home):
    import matplotlib as mpl

    report(home)
    before = state(home)
    with mpl.rc_context({"font.size": 20, "savefig.dpi": 30, "axes.facecolor": "black", "font.family": "monospace"}):
        report(home)
    assert state(home) == before


@pytest.mark.usefixtures("undrawn")
def test_what_is_of_a_tiny_model_says_so_and_variants_are_explained(home):
    report(home)
    assert region(home, "scaling").splitlines()[2] == (
        "The steps are of a tiny model on a CPU: the course of a curve, no figure for a GPU."
    )
    plant(home / "bench" / "results", "scaling", [row("step against batch", 50, "clips/s", batch=8)], H100)
    report(home)
    assert region(home, "scaling").count("tiny model") == 1
    assert "nostats: without the statistics it logs, which wait for the device" in region(home, "public")
    assert "nostats" not in region(home, "step")


@pytest.mark.parametrize(("device", "count"), [(CPU, 1), (H100, 0)])
def test_the_picture_of_the_public_code_on_a_cpu_says_what_it_is(tmp_path, device, count):
    plant(tmp_path, "public", pair("tiny", "packed", "public shipped", (5.0, 3.0)), device)
    figure = plots.steps(list(chosen(tmp_path).values()))
    assert figure is not None
    title = figure.get_suptitle()
    assert title.count("a tiny model: shows that both run, no figure for a GPU") == count


@pytest.mark.usefixtures("undrawn")
def test_ratios_over_the_first_point_stand_beside_their_point(home):
    found = []
    for tokens, share, value, ratio in ((64, 0.5, 128, None), (32, 0.75, 134, 1.05), (8, 0.9, 154, 1.2)):
        where = {"model": "tiny", "tokens": tokens, "ratio": share}
        found.append(row("step against tokens", value, "clips/s", **where))
        found += [] if ratio is None else [row("step against tokens, over the first point", ratio, "x", **where)]
    found.append(row("step against batch, over the first point", 2.0, "x", batch=4))
    plant(home / "bench" / "results", "scaling", found)
    report(home)
    table = region(home, "scaling")
    assert "| what | at | ratio | clips/s (p20 to p80) | over the first point |" in table
    assert "| step | 64 | 0.5 | 128 (122 to 134) | - |" in table
    assert "| step | 8 | 0.9 | 154 (146 to 162) | 1.20 (1.14 to 1.26) |" in table
    assert "| step, over the first point | 2.00 (1.90 to 2.10) |" in table, "without its point it is a row"


def test_ratios_over_the_first_point_are_drawn_with_their_point(tmp_path):
    found = [row("step against batch", 50.0 * at, "clips/s", batch=at) for at in (2, 4)]
    plant(tmp_path, "scaling", [*found, row("step against batch, over the first point", 2.0, "x", batch=4)])
    figure = plots.scaling(list(chosen(tmp_path).values()))
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["100", "200 (2.00x)"]


@pytest.mark.usefixtures("undrawn")
def test_many_decoders_have_their_rates_in_one_table_and_their_ratios_in_another(home):
    others = ("PyAV", "torchcodec", "decord")
    found = [
        one
        for size in ("a", "b")
        for one in (
            *(row(f"decode, {name}", 9, "clips/s", size=size) for name in ("fastjepa", "fastjepa, new video", *others)),
            *(row(f"speed of fastjepa{new} over {name}", 2, "x", size=size) for new in ("", ", new video")
              for name in others),
        )
    ]  # fmt: skip
    plant(home / "bench" / "results", "data", found)
    report(home)
    tables_ = [line for line in region(home, "data").splitlines() if line.startswith("| size |")]
    assert [line.count("(clips/s)") for line in tables_] == [5, 0]
    assert [line.count("(x)") for line in tables_] == [0, 6]


@pytest.mark.usefixtures("undrawn")
def test_the_memory_of_an_operation_stands_beside_the_smallest_of_the_others(home):
    rates = {"ours": 900.0, "eager": 300.0, "compiled": 700.0}
    rows = operation("layer_norm forward", "vith target", rates)
    for one, size in zip(rows, (12_000_000, 48_000_000, 24_000_000)):
        one["peak_bytes"] = size
    plant(home / "bench" / "results", "kernels", [*rows, *operation("gelu forward", "vith target", rates)], H100)
    report(home)
    assert " compiled | 12.0 / 24.0 |" in region(home, "kernels")
    assert " compiled | - |" in region(home, "kernels")


@pytest.mark.usefixtures("undrawn")
def test_times_of_the_host_beside_a_gpu_name_its_processor(home):
    host = row("decode, fastjepa", 9, "clips/s") | {"clock": "processor"}
    plant(home / "bench" / "results", "data", [host], H100, processor="AMD EPYC")
    report(home)
    assert f"on {H100}, processor AMD EPYC, torch" in region(home, "data")
    assert "processor" not in region(home, "kernels"), "these are times of the GPU"


def test_an_unfinished_file_speaks_only_where_no_whole_one_does(tmp_path):
    plant(tmp_path, "step", [row("a", 1.0, "x")], H100, "2026-11-25", "unfinished", complete=False)
    plant(tmp_path, "step", [row("b", 2.0, "x")], H100, "2026-11-26", "b", commit="b" * 40)
    (one,) = chosen(tmp_path).values()
    assert not one.selected
    assert [(r["name"], r["value"]) for r in one.rows] == [("a", 1.0)], "a part does not stand for all of it"
    plant(tmp_path, "step", [row("a", 3.0, "x")], H100, "2026-11-24")
    plant(tmp_path, "step", [row("a", 4.0, "x")], H100, "2026-11-26", "some-unfinished", complete=False)
    (one,) = chosen(tmp_path).values()
    assert [(r["name"], r["value"]) for r in one.rows] == [("a", 3.0)]

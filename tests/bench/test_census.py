"""The census: the reference is what was counted elsewhere, packed keeps its gates, and the counting rules hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bench.census.__main__ import main as census_main
from bench.census.counting import Census
from bench.census.figures import rows_without
from bench.census.steps import CLIPS, MODELS, _phases
from tests import small_jepa

ROOT = Path(__file__).parents[2]
# GB, launches and GFLOP a clip of the public code's step, counted at the dispatcher without its statistics.
PUBLISHED = {"vitl": (358, 5620, 2550), "vith": (541, 6980, 4687)}
MOST_GB = {"vitl": 170, "vith": 255, "vjepa2_vitl": 260, "vjepa2_vitg": 512}
GATES = {"bytes": 2.1, "launches": 5.0}
SECOND = {"vjepa2_vitl": (4153, 3491), "vjepa2_vitg": (11251, 9655)}
MORE_GATES = {"bytes": 3.0, "launches": 12.0}


@pytest.fixture(scope="session")
def rows():
    """The command's own figures, by model."""
    command = [sys.executable, "-m", "bench.census", "--json", "--items", "10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return {row["model"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_reference_is_the_public_step(rows, model):
    gigabytes, launches, work = PUBLISHED[model]
    found = rows[model]["reference"]
    assert found["bytes"] / 1e9 == pytest.approx(gigabytes, rel=0.05)
    assert found["launches"] == pytest.approx(launches, rel=0.05)
    assert found["flops_per_clip"] / 1e9 == pytest.approx(work, rel=0.005)


@pytest.mark.parametrize("model", MOST_GB)
def test_packed_moves_at_most_so_many_bytes(rows, model):
    assert rows[model]["packed"]["bytes"] / 1e9 <= MOST_GB[model]


@pytest.mark.parametrize("model", MOST_GB)
@pytest.mark.parametrize("figure", GATES)
def test_packed_keeps_its_distance(rows, model, figure):
    gates = MORE_GATES if model in SECOND else GATES
    assert rows[model][f"times_fewer_{figure}"] >= gates[figure]


@pytest.mark.parametrize("model", SECOND)
def test_the_second_generation_does_the_published_work(rows, model):
    """GFLOP a clip with every block computed again, and what the mathematics needs."""
    again, needed = SECOND[model]
    work = {name: rows[model][name]["flops_per_clip"] / 1e9 for name in ("reference", "reference-stored", "packed")}
    assert work["packed"] == pytest.approx(needed, rel=0.002)
    # A block that is computed again stops where everything that its gradient reads is there.
    assert 0.95 * again < work["reference"] < again
    assert work["packed"] < work["reference-stored"] < work["reference"]
    assert rows["vjepa2_vitg"]["reference"]["bytes"] / 1e9 == pytest.approx(1538, rel=0.03)


@pytest.mark.parametrize("model", SECOND)
def test_recomputing_costs_the_public_step_bytes_and_launches(rows, model):
    shipped, stored, packed = (rows[model][name] for name in ("reference", "reference-stored", "packed"))
    for figure in ("bytes", "launches"):
        assert 1.15 * stored[figure] < shipped[figure]
        assert 2.5 * packed[figure] < stored[figure]
    # The target encoder keeps nothing anyway.
    for name in ("target linear", "target attention", "target elementwise"):
        assert shipped["components"][name] == stored["components"][name]


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("execution", ["reference", "packed"])
def test_every_byte_has_a_component(rows, model, execution):
    found = rows[model][execution]
    for figure in ("launches", "bytes", "flops_per_clip"):
        assert sum(one[figure] for one in found["components"].values()) == pytest.approx(found[figure])
    assert {name.rpartition(" ")[0] for name in found["components"]} == {
        "patch embed", "target", "context", "predictor", "loss", "optimizer",
    }  # fmt: skip
    sizes = [item["bytes"] for item in found["items"]]
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("model", PUBLISHED)
def test_attention_counts_the_same_in_both_executions(rows, model):
    depth, width = {"vitl": (24, 1024), "vith": (32, 1280)}[model]
    # Ours runs once for both sets, and its backward pass has a second launch: the sum of the bias's partial gradients.
    for execution, launches in (("reference", 4), ("packed", 3)):
        parts = rows[model][execution]["components"]
        target, context = parts["target attention"], parts["context attention"]
        assert (target["launches"], context["launches"]) == (depth, launches * depth)
        # 8 bytes a token and channel forward, 24 backward; where clips begin, and the bias, is a few bytes more. The
        # last block of the packed target encoder asks for the union of targets alone.
        saved = 4 * CLIPS * (1568 - MODELS["vitl"].union) * width if execution == "packed" else 0
        assert target["bytes"] == pytest.approx(8 * CLIPS * 1568 * width * depth - saved, rel=1e-4)
        exact = 1e-5 if execution == "reference" else 0.02
        assert context["bytes"] == pytest.approx(32 * CLIPS * 465 * width * depth, rel=exact)
    work = [rows[model][execution]["components"]["context attention"] for execution in ("reference", "packed")]
    assert work[0]["flops_per_clip"] == work[1]["flops_per_clip"] == 12 * (365**2 + 100**2) * width * depth


def test_tables_for_people(rows):
    command = [sys.executable, "-m", "bench.census", "--model", "vitl", "--items", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    row = rows["vitl"]
    assert f"packed moves {row['times_fewer_bytes']:.2f} times fewer bytes" in done.stdout
    assert f"{row['reference']['launches']:,}" in done.stdout
    assert done.stdout.count(" launches  ") == 2


def test_the_result_file_has_the_figures_of_the_table(rows, tmp_path):
    command = [sys.executable, "-m", "bench.census", "--model", "vitl", "--json", "--out", str(tmp_path)]
    subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert result["complete"]
    assert result["command"] == "python -m bench.census --model vitl"
    found = {(row["name"], *row["parameters"].values()): row for row in result["rows"]}
    packed = rows["vitl"]["packed"]
    assert found["launches", "vitl", "packed", "total"]["value"] == packed["launches"]
    whole = [row["value"] for key, row in found.items() if key[:3] == ("bytes", "vitl", "packed")]
    assert sum(whole) == pytest.approx(2 * packed["bytes"] / 1e9)  # the total, and its parts
    assert found["times fewer bytes", "vitl"]["value"] == rows["vitl"]["times_fewer_bytes"]


def test_a_model_that_is_not_there_is_one_sentence():
    command = [sys.executable, "-m", "bench.census", "--model", "vitg"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "--model: expected some of vitl, vith, vjepa2_vitl, vjepa2_vitg, given vitg" in done.stderr


def test_a_result_folder_that_is_a_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        census_main(["--out", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert f"error: --out: expected a folder, given '{tmp_path / 'file'}' (File exists)." in capsys.readouterr().err


def counted(call, *shapes: tuple[int, ...]):
    """Figures of a call on new float32 tensors."""
    with FakeTensorMode():
        tensors = [torch.empty(shape) for shape in shapes]
        with Census() as census:
            call(*tensors)
    return census


@pytest.mark.parametrize(
    ("call", "launches", "size"),
    [
        (lambda x: x.add(x), 1, 40 + 40),  # the same input twice is read once
        (lambda x: x.mul_(2), 1, 40 + 40),  # in place: read and written
        (lambda x: x.zero_(), 1, 40),  # overwritten: not read
        (lambda x: x.view(2, 5)[1].t().detach(), 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: torch.zeros_like(x), 1, 40),
        (lambda x: x[:1].expand(10) + x, 1, 4 + 40 + 40),  # expanded: the real value alone
        (lambda x: x.index_select(0, torch.empty(3, dtype=torch.int64)), 1, 12 + 24 + 12),  # three rows are read
        (lambda x: torch._foreach_mul_([x, x.clone()], 2), 2, 80 + 160),  # one launch, and the clone's
        (lambda x: x.to(torch.bfloat16), 1, 40 + 20),
    ],
)
def test_what_a_call_counts(call, launches, size):
    total = counted(call, (10,)).total()
    assert (total.launches, total.bytes) == (launches, size)


def test_a_gradient_belongs_to_the_phase_of_its_call():
    def call(x, weight):
        x.requires_grad_(), weight.requires_grad_()
        with census.phase("first"):
            y = x @ weight
        with census.phase("second"):
            y = y.relu()
        y.sum().backward()

    with FakeTensorMode():
        x, weight = torch.empty(4, 4), torch.empty(4, 4)
        with Census() as census:
            call(x, weight)
    assert census.components["first linear"].launches == 3
    assert census.components["first linear"].flops == 3 * 2 * 4**3
    assert census.components["second elementwise"].launches == 2
    assert {phase for phase, *_ in census.items} == {"first", "first backward", "second", "second backward", "rest"}


def test_the_predictor_of_the_dense_loss_is_counted_as_the_predictor():
    jepa = small_jepa.make(levels=(0, 1), dense=True)
    with Census() as census, _phases(jepa, census):
        jepa(small_jepa.clips(2), *small_jepa.masks(2)).loss.backward()
    parts = {name.rpartition(" ")[0] for name, one in census.components.items() if one.flops}
    assert parts == {"patch embed", "target", "context", "predictor"}  # no product is anybody else's


def test_whoever_asks_the_device_for_a_number_raises():
    with pytest.raises(DataDependentOutputException):
        counted(lambda x: x.sum().item(), (3,))


@pytest.mark.parametrize(("piece", "least_gb", "launches"), [("norm", 60, 1500), ("attention", 10, 1200)])
def test_without_its_kernels_a_piece_moves_more(rows, piece, least_gb, launches):
    found = {row["name"]: row["value"] for row in rows_without("vitl", piece)}
    assert found["bytes"] > rows["vitl"]["packed"]["bytes"] / 1e9 + least_gb
    assert found["launches"] > launches


def test_a_piece_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"piece: expected one of embed, assemble, .*, given 'norms'"):
        rows_without("vitl", "norms")

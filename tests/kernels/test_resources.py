"""What the kernels need of a GPU: within its limits, as the committed table says, and counted rightly."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from fastjepa_kernels import resources
from fastjepa_kernels.__main__ import main
from fastjepa_kernels.testing.compile_only import SHARED_LIMIT, TARGETS, compile_for

TABLE = Path(__file__).parents[2] / "kernels" / "resources.tsv"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is absent: there is none for this system"
)


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request, tmp_path_factory):
    """Rows of the first and the last setting of every kernel; `compile` takes minutes and shows all."""
    from fastjepa_kernels._triton.catalogue import shipped

    settings = {}
    for entry in shipped(request.param):
        settings.setdefault(entry.kernel, []).append(entry)
    assert len(settings) >= 12
    ends = [entry for group in settings.values() for entry in {e.name: e for e in (group[0], group[-1])}.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return request.param, [resources.row_of(request.param, entry) for entry in ends]


def test_every_kernel_compiles_without_spills_and_without_float64(compiled):
    target, rows = compiled
    for row in rows:
        assert row["spilled"] == "0", row
        assert row["float64"] == "0", row
        assert int(row["shared"]) <= SHARED_LIMIT[target], row


def test_every_kernel_needs_what_the_committed_table_says(compiled):
    """Where this fails on purpose: `python -m fastjepa_kernels compile --table kernels/resources.tsv`."""
    version, table = resources.read_table(TABLE)
    if version != resources.triton_version():
        pytest.skip(f"the table is of Triton {version}, this is {resources.triton_version()}")
    _, rows = compiled
    known = {(row["kernel"], row["target"]) for row in rows}
    assert not resources.differences([row for row in table if (row["kernel"], row["target"]) in known], rows)


def test_the_committed_table_holds_every_kernel_and_none_that_is_gone():
    from fastjepa_kernels._triton.catalogue import shipped

    _, table = resources.read_table(TABLE)
    assert {(row["kernel"], row["target"]) for row in table} == {
        (entry.name, target) for target in TARGETS for entry in shipped(target)
    }
    for row in table:
        assert (row["spilled"], row["float64"]) == ("0", "0"), row
        assert int(row["shared"]) <= SHARED_LIMIT[row["target"]], row


def test_changes_of_the_table_are_shown(tmp_path, capsys):
    table = tmp_path / "table.tsv"
    some = ["compile", "--targets", "sm_90", "--only", "invert", "--processes", "1"]
    assert main([*some, "--table", str(table), "--json", str(tmp_path / "figures.json")]) == 0
    assert '"kernel": "invert"' in (tmp_path / "figures.json").read_text()
    assert main([*some, "--check", str(table)]) == 0
    assert f"as in {table}" in capsys.readouterr().out
    version, (row,) = resources.read_table(table)
    resources.write_table(table, [{**row, "registers": "7"}, {**row, "kernel": "invert again"}], "3.0")
    assert main([*some, "--check", str(table)]) == 1
    said = capsys.readouterr().out
    assert f"invert, sm_90: registers 7 -> {row['registers']}\n" in said
    assert "invert again, sm_90: gone\n" in said
    assert f"made with Triton 3.0, this is {version}" in said
    assert resources.differences([], [row]) == ["invert, sm_90: new"]


def test_mistakes_are_sentences(tmp_path, capsys):
    broken = tmp_path / "broken.tsv"
    broken.write_text("kernel\n")
    with pytest.raises(
        ValueError, match=r"broken.tsv: expected a table of `compile --table` with the columns kernel, "
    ):
        main(["compile", "--check", str(broken)])
    shutil.copy(TABLE, broken)
    _, (row, *_) = resources.read_table(broken)
    with pytest.raises(ValueError, match="1 kernels have the name of another one"):
        resources.write_table(broken, [row, row], "3.7.1")
    with pytest.raises(SystemExit, match="2"):
        main(["compile", "--targets", "sm_91"])
    assert "--targets: expected some of sm_80, sm_90, sm_100, given sm_91" in capsys.readouterr().err


def test_the_counts_are_real():
    """A kernel that needs double precision and too many registers is seen to."""
    from fastjepa_kernels._triton import gather

    types = {
        "x": "*fp64",
        "index": "*i64",
        "out": "*fp64",
        "clips": "i32",
        "kept": "i32",
        "x_clip": "i32",
        "x_token": "i32",
    }
    needs = compile_for("sm_90", gather.gather_kernel, types, {"WIDTH": 384, "LANES": 512})
    assert needs.registers > 8
    summed = {"gradient": "*fp64", "inverse": "*i32", "out": "*fp64", "clips": "i32", "kept": "i32", "tokens": "i32"}
    heavy = compile_for("sm_90", gather.sum_kernel, summed, {"MASKS": 2, "WIDTH": 8192, "LANES": 8192}, warps=1)
    assert heavy.spilled > 0


def product_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, b, out, depth, SIZE: tl.constexpr):
        line = tl.arange(0, SIZE)
        total = tl.zeros([SIZE, SIZE], dtype=tl.float32)
        for start in range(0, depth, SIZE):
            left = tl.load(a + line[:, None] * SIZE + (start + line)[None, :])
            right = tl.load(b + (start + line)[:, None] * SIZE + line[None, :])
            total = tl.dot(left, right, total)
        tl.store(out + line[:, None] * SIZE + line[None, :], total)

    return kernel


def test_products_and_copies_are_counted():
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "depth": "i32"}
    on = {target: compile_for(target, product_kernel(), types, {"SIZE": 64}) for target in ("sm_80", "sm_90")}
    assert on["sm_80"].tensor_core > 0
    assert on["sm_80"].wgmma == 0
    assert on["sm_90"].wgmma == on["sm_90"].tensor_core > 0
    assert all(needs.copies > 0 for needs in on.values())

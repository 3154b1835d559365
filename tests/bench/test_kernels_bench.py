"""The kernels bench: its places, what it counts, its turns, and what becomes of a way that is wrong, all on a CPU."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import test_kernels
from bench.kernels import turns, ways
from bench.kernels.cases import Setting, failure_of_ours, measure, measure_ceilings, prepare
from bench.kernels.work import work_of
from bench.pairing import wall_clock
from fastjepa_kernels.testing.cases import CASES
from fastjepa_kernels.testing.cases_of_steps import Place, places
from tests.pedantic import Pedantic

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
CEILINGS = {"GB/s": 50.0, "TFLOP/s": 2.0}
SETTING = Setting(
    CPU, impl="reference", clock=lambda: wall_clock, compiler="aot_eager", seconds=0, least=3, most=3, copied=1 << 12,
    side=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def small(name, **changes):
    case = BY_NAME[name]
    return Place(case, "small", {**case.shapes["small"], **changes})


def rows_of(place, which="forward", setting=SETTING):
    return measure(Pedantic(), prepare(place, setting), which, setting, CEILINGS)


def by_way(rows):
    return {row["parameters"]["way"]: row for row in rows if ", ours over" not in row["name"]}


def test_every_operation_stands_where_a_step_calls_it():
    found = places()
    assert {place.case.name for place in found} == set(BY_NAME)
    assert len({str(place) for place in found}) == len(found)
    for place in found:
        assert set(place.shape) == set(BY_NAME[place.case.name].shapes["small"]), place
        assert place.shape.get("kept", 0) <= place.shape.get("tokens", 1 << 30), place
        # A target encoder gets no gradient; everything else has what its case has.
        expected = () if place.name.endswith("-target") else BY_NAME[place.case.name].gradients
        assert place.case.gradients == expected, place
    models = list(dict.fromkeys(place.name.partition("-")[0] for place in found))
    assert models == ["vith", "predictor", "vitl", "vitg", "predictor2"], "the first must not run out of time"


def test_places_have_the_published_sizes():
    at = {str(place): place.shape for place in places()}
    assert at["indexed_attention-packed-vith-context"] | {"rows": 0} == {
        "clips": 24, "first": 365, "second": 100, "heads": 16, "width": 80, "rows": 0,
    }  # fmt: skip
    keys = ("first", "second", "heads", "width")
    names = ("vith-target", "vitl-context", "predictor-rows", "vitg-context", "predictor2-rows")
    assert {name: tuple(at[f"indexed_attention-packed-{name}"][key] for key in keys) for name in names} == {
        "vith-target": (1568, 0, 16, 80),
        "vitl-context": (365, 100, 16, 64),
        "predictor-rows": (1115, 1203, 16, 24),
        "vitg-context": (493, 128, 22, 64),
        "predictor2-rows": (1467, 1569, 12, 32),
    }
    names = ("vith-target", "vitl-context", "predictor-rows", "vitg-target", "predictor2-rows")
    assert {name: (at[f"layer_norm-{name}"]["rows"], at[f"layer_norm-{name}"]["width"]) for name in names} == {
        "vith-target": (37632, 1280),
        "vitl-context": (11160, 1024),
        "predictor-rows": (55632, 384),
        "vitg-target": (49152, 1408),
        "predictor2-rows": (72864, 384),
    }
    turned = {name: shape for name, shape in at.items() if name.startswith("indexed_attention-turned-flat-")}
    assert {name.removeprefix("indexed_attention-turned-flat-"): (s["kept"], s["heads"], s["width"])
            for name, s in turned.items()} == {
        "vitg-context": (493, 22, 64), "vitg-target": (2048, 22, 64), "vitg-88": (493, 16, 88),
        "predictor2-rows": (1569, 12, 32),
    }  # fmt: skip
    assert at["patch_embed_gather-vitg-context"]["tokens"] == 2048
    assert at["target_loss-vith-set1"]["kept"] == 1103


def test_bytes_are_what_the_operation_declares():
    norm = {"rows": 10, "width": 64}
    forward, unit = work_of(BY_NAME["layer_norm"], norm, "forward", torch.bfloat16)
    assert (forward, unit) == (2 * 10 * 64 * 2 + 2 * 64 * 2 + 2 * 10 * 4, "GB/s")
    gathered = {"masks": 1, "clips": 2, "tokens": 40, "kept": 5, "width": 64, "rows": 10}
    assert work_of(BY_NAME["gather_tokens"], gathered, "forward", torch.bfloat16)[0] == 2 * 5 * (8 + 2 * 64 * 2)
    assert work_of(BY_NAME["ema_update_"], {"rows": 100}, "forward", torch.bfloat16)[0] == 100 * (4 + 4 + 2) + 4
    # Turned back as it was turned: the forward pass is none of it.
    turned = {"clips": 2, "tokens": 40, "kept": 5, "heads": 3, "width": 32, "rows": 5}
    for which in ("forward", "backward"):
        assert work_of(BY_NAME["rope3d"], turned, which, torch.bfloat16)[0] == 2 * 5 * (2 * 3 * 32 * 2 + 8)


def test_flops_are_those_of_the_mathematics():
    packed = {"clips": 3, "first": 4, "second": 5, "heads": 2, "width": 8, "rows": 5}
    attention = BY_NAME["indexed_attention packed"]
    assert work_of(attention, packed, "forward", torch.bfloat16) == (4 * 3 * 2 * 8 * (16 + 25), "TFLOP/s")
    assert work_of(attention, packed, "backward", torch.bfloat16)[0] == 8 * 3 * 2 * 8 * (16 + 25)
    layer = {"rows": 7, "width": 8, "hidden": 32}
    assert work_of(BY_NAME["mlp"], layer, "forward", torch.bfloat16)[0] == 2 * 7 * 8 * 32 * 2
    assert work_of(BY_NAME["mlp"], layer, "backward", torch.bfloat16)[0] == 2 * (2 * 7 * 8 * 32 * 2)
    patches = {"clips": 2, "kept": 11, "width": 48, "patch": 8}
    for which in ("forward", "backward"):
        assert work_of(BY_NAME["patch_embed_gather"], patches, which, torch.bfloat16)[0] == 2 * 22 * 48 * 3 * 2 * 64


@pytest.mark.parametrize("name", [
    "layer_norm", "target_loss", "indexed_attention packed", "indexed_attention turned", "mlp", "patch_embed_gather",
    "adamw_ema_", "assemble_tokens",
])  # fmt: skip
def test_every_way_has_a_figure_or_a_reason(name):
    place = small(name)
    prepared = prepare(place, SETTING)
    for which in place.case.passes():
        rows = measure(Pedantic(), prepared, which, SETTING, CEILINGS)
        found = by_way(rows)
        assert {"ours", "eager", "compiled"} <= set(found)
        for way, row in found.items():
            assert row["name"] == f"{name} {which}"
            assert row["parameters"] == {"shape": "small", "way": way, "dtype": "bfloat16"}
            if "skipped" in row:
                assert way in ("cudnn", "efficient", "varlen", "xformers", "liger"), row
                assert len(row["skipped"]) > 20
                continue
            work, unit = work_of(place.case, place.shape, which, torch.bfloat16)
            assert row["value"] * row["ms"] / 1e3 == pytest.approx(work / {"GB/s": 1e9, "TFLOP/s": 1e12}[unit])
            assert row["p20"] <= row["value"] <= row["p80"]
            assert row["share"] == row["value"] / CEILINGS[unit]
            assert (row["n"], row["unit"], row["sizes"]) == (3, unit, place.shape)
            assert "peak_bytes" not in row, "nobody counts on a CPU"
        timed = [way for way, row in found.items() if "value" in row]
        ratios = {row["name"]: row["unit"] for row in rows if ", ours over" in row["name"]}
        assert ratios == {f"{name} {which}, ours over {way}": "x" for way in timed[1:]}
        assert timed[0] == "ours"
        assert failure_of_ours(rows) == ""


def test_attention_is_compared_with_what_this_machine_has():
    found = by_way(rows_of(small("indexed_attention packed")))
    assert {"flash", "cudnn", "efficient", "varlen", "xformers"} < set(found)
    assert "value" in found["flash"]
    assert "it needs a CUDA device" in found["cudnn"]["skipped"]


def test_a_wrong_way_is_a_row_with_its_reason_and_is_not_timed(monkeypatch):
    called = []

    def wrong(shape):
        def run(x, weight, bias):
            called.append(torch.is_grad_enabled())
            return (F.layer_norm(x, x.shape[-1:], weight, bias, 1.0),)

        return run

    monkeypatch.setitem(ways.LIBRARIES, "layer_norm", {"wrong": wrong, "right": ways._autocast_norm})
    found = by_way(rows_of(small("layer_norm")))
    assert found["wrong"]["skipped"].startswith("AssertionError: distance to float64 is ")
    assert "value" not in found["wrong"]
    assert len(called) == 1, "it is checked, and no more"
    assert "value" in found["right"]


def test_a_way_whose_gradients_are_wrong_is_seen(monkeypatch):
    def detached(shape):
        return lambda x, weight, bias: (
            F.layer_norm(x, x.shape[-1:], weight * 0.5 + weight.detach() * 0.5, bias, 1e-6),
        )

    monkeypatch.setitem(ways.LIBRARIES, "layer_norm", {"wrong": detached})
    assert "distance to float64" in by_way(rows_of(small("layer_norm")))["wrong"]["skipped"]


def test_a_broken_device_ends_the_case(monkeypatch):
    def broken(shape):
        raise torch.AcceleratorError("illegal memory access")

    monkeypatch.setitem(ways.LIBRARIES, "layer_norm", {"broken": broken})
    with pytest.raises(torch.AcceleratorError):
        prepare(small("layer_norm"), SETTING)


def workbench(setting=SETTING):
    made = object.__new__(test_kernels.Workbench)
    made.setting, made.unrecorded, made.ceilings, made.prepared = setting, [{"name": "ceiling"}], CEILINGS, None
    return made


def test_where_ours_is_wrong_the_case_fails_and_keeps_the_figures_of_others():
    right, rows = small("layer_norm"), []
    wrong = replace(right.case, run=lambda impl, *inputs: tuple(1.1 * x for x in right.case.run(impl, *inputs)))
    with pytest.raises(pytest.fail.Exception, match="ours: AssertionError: distance to float64"):
        test_kernels.test_operation(Pedantic(), workbench(), rows.extend, right._replace(case=wrong), "forward")
    assert rows[0] == {"name": "ceiling"}
    found = by_way(rows[1:])
    assert "value" in found["eager"]
    assert "skipped" in found["ours"]
    assert not [row for row in rows if "ours over" in row["name"]]


def test_ceilings_are_recorded_once_and_a_place_is_prepared_once():
    bench, rows, place = workbench(), [], small("layer_norm")
    for which in ("forward", "backward"):
        before = bench.prepared
        test_kernels.test_operation(Pedantic(), bench, rows.extend, place, which)
        assert before in (None, bench.prepared)
    assert [row["name"] for row in rows].count("ceiling") == 1
    bench.clear()
    assert bench.prepared is None


def test_ceilings_say_what_they_are_of():
    copy, gemm = measure_ceilings(SETTING)
    assert (copy["name"], copy["unit"], copy["parameters"]) == ("ceiling copy", "GB/s", {"bytes": 4096})
    assert copy["value"] * copy["ms"] == pytest.approx(1e3 * 2 * 4096 / 1e9)
    assert (gemm["name"], gemm["unit"], gemm["parameters"]) == ("ceiling gemm", "TFLOP/s", {"side": 16})
    assert gemm["value"] * gemm["ms"] == pytest.approx(1e3 * 2 * 16**3 / 1e12)


def test_copies_exceed_twice_the_cache_within_bounds():
    memory = 1e12
    assert turns.copies_needed(30, cache=100, memory=memory) == 7
    assert turns.copies_needed(100, cache=100, memory=memory) == 3
    assert turns.copies_needed(201, cache=100, memory=memory) == 1
    assert turns.copies_needed(1, cache=100, memory=memory) == turns.MOST_COPIES
    assert turns.copies_needed(30, cache=100, memory=16 * 90) == 3
    assert turns.copies_needed(30, cache=100, memory=1) == 1


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_calls_go_from_copy_to_copy_whichever_way_they_belong_to(which):
    case, place = BY_NAME["layer_norm"], small("layer_norm")
    inputs = case.make(place.shape, CPU, torch.float32)
    size = sum(x.numel() * 4 for x in inputs)
    copies = turns.copies_of(case, inputs, cache=size)
    assert len({copy[0].data_ptr() for copy in copies}) == 3
    seen = []
    passes = turns.passes(case, case.eager, copies, which)
    watched = [lambda n=n, call=call: seen.append(n) or call() for n, call in enumerate(passes)]
    rotation = turns.Rotation(len(copies))
    ours, other = rotation.through(watched), rotation.through(watched)
    for call in (ours, other, other, ours, ours):
        call()
    assert seen == [0, 1, 2, 0, 1]


def test_a_pass_reads_the_copy_it_is_of_and_has_a_graph_of_its_own():
    case, place = BY_NAME["layer_norm"], small("layer_norm")
    copies = turns.copies_of(case, case.make(place.shape, CPU, torch.float32), cache=1 << 20)[:2]
    with torch.no_grad():
        copies[1][1].mul_(2)
    first, second = (call()[0] for call in turns.passes(case, case.eager, copies, "backward"))
    torch.testing.assert_close(second, 2 * first)
    (kept,), _ = (call() for call in turns.passes(case, case.eager, copies, "forward"))
    assert kept.requires_grad, "a forward pass keeps what its backward pass needs"


class Device:
    """Stands for a CUDA device whose calls take `ms` each, and notes what is asked of it."""

    def __init__(self, monkeypatch, ms):
        self.log, self.now = [], 0.0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now
                device.log.append("event")

            def synchronize(self):
                device.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at

        def sleep(cycles):
            self.log.append("sleep")
            self.slept = cycles

        def call():
            self.now += ms
            self.log.append("call")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("wait"))
        # The host's clock: 0.1 ms to launch, then the device's own time.
        reads = iter([0.0, 1e-4, 1e-4 + 1e-3 * ms])
        monkeypatch.setattr(turns.time, "perf_counter", lambda: next(reads))
        self.call = call


def test_a_sample_is_queued_behind_a_busy_device_and_waited_for_at_its_end(monkeypatch):
    device = Device(monkeypatch, ms=0.4)
    clock = turns.DeviceClock()
    assert clock(device.call) == pytest.approx(0.4)
    assert device.log == ["wait", "call", "wait", "sleep", "event", "call", "call", "event", "wait"]
    # At 2 GHz: one and a half times the launches of both calls, at the least.
    assert device.slept >= 1.5 * 2 * 1e-4 * 2e9
    device.log.clear()
    clock(device.call)
    assert device.log == ["sleep", "event", "call", "call", "event", "wait"]


def test_long_calls_are_timed_one_by_one_and_short_ones_not_endlessly():
    assert turns.Pace.of(1e-4, 5e-3).calls == 1
    assert turns.Pace.of(1e-5, 1e-6).calls == 20


def test_rounds_fill_the_time_within_bounds():
    ticks = iter([10.0, 10.5])
    rounds = partial(turns.rounds_within, calls=[list, dict], clock=lambda call: 0.0, least=10, most=50)
    assert rounds(10.0, now=lambda: next(ticks)) == 20
    assert rounds(0.0, now=iter([1.0, 2.0]).__next__) == 10
    assert rounds(1e9, now=iter([1.0, 2.0]).__next__) == 50


def test_norms_of_liger_are_called_with_its_arguments(monkeypatch):
    module = ModuleType("liger_kernel.transformers.functional")
    module.liger_layer_norm = lambda X, W, B, eps: F.layer_norm(X, X.shape[-1:], W, B, eps)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("layer_norm", "add_layer_norm"):
        assert "value" in by_way(rows_of(small(name)))["liger"]


def test_a_way_is_compiled_once_for_its_check_and_both_passes():
    for name in ("layer_norm", "ema_update_"):
        counters.clear()
        place = small(name)
        prepared = prepare(place, SETTING)
        for which in place.case.passes():
            measure(Pedantic(), prepared, which, SETTING, CEILINGS)
        assert counters["stats"]["unique_graphs"] == 1, name


def test_every_place_can_be_made_and_its_ways_agree_in_shape():
    with FakeTensorMode():
        for place in places():
            inputs = place.case.make(place.shape, CPU, torch.bfloat16)
            calls = (place.case.ours("reference"), place.case.eager, place.case.best or place.case.eager)
            ours, *others = [[(x.shape, x.dtype) for x in call(*inputs)] for call in calls]
            assert others == [ours, ours], place


def test_a_library_that_is_missing_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert "liger_kernel" in by_way(rows_of(small("layer_norm")))["liger"]["skipped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a CPU alone")
def test_without_a_gpu_all_is_skipped_for_one_reason(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_kernels.py", "--benchmark-only", "--results", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"skipped {len(test_kernels.CASES)}: needs a CUDA device" in done.stdout
    assert not list(tmp_path.iterdir())


def test_kernels_are_timed_without_what_reads_videos_and_settings():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('av', 'pydantic', 'ruamel.yaml')))"
    code = f"{blocked}; import bench.conftest, bench.test_kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

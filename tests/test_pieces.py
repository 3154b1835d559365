"""Which implementation computes each piece of the packed step: by name, by the table, and together."""

import json
from pathlib import Path

import pytest
import torch

from fastjepa import configfile, pieces
from fastjepa.attending import Dispatched, Indexed
from fastjepa.exits import Exit
from fastjepa.fused import Fused
from fastjepa.masks import target_union
from fastjepa.models.operations import LIBRARY, Operations
from fastjepa.pieces import METHODS, PIECES, Composite, build_operations, choices, update_kernels
from tests.small_jepa import assert_same, clips, gradients, make, masks

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
WIDTHS = (32, 48)


def numbers(operations, truncation="group"):
    jepa = make(widths=WIDTHS, operations=operations)
    context, target = masks(4, group=2, truncation=truncation)
    loss = jepa(clips(4), context, target, union=target_union(target, 32)).loss
    loss.backward()
    return loss.item(), gradients(jepa)


@pytest.fixture(scope="module")
def library():
    return {truncation: numbers(LIBRARY, truncation) for truncation in ("group", "none")}


@pytest.mark.parametrize("piece", PIECES)
def test_each_piece_alone_can_be_another_implementation(library, piece):
    operations, lines = build_operations({piece: "reference"}, "auto", CPU)
    others = dict(operations.pieces)
    assert isinstance(others.pop(piece), Indexed if piece == "attention" else Fused)
    assert all(other is LIBRARY or type(other) is Dispatched for other in others.values())
    loss, found = numbers(operations)
    assert loss == pytest.approx(library["group"][0], rel=1e-10)
    assert_same(found, library["group"][1], rel=1e-9)
    if piece != "attention":
        assert f"kernels    {piece}: fastjepa_kernels, reference implementations, asked for" in lines
    assert update_kernels({piece: "reference"}, CPU) == ("reference" if piece == "update" else None)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("truncation", ["group", "none"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math", "padded", "indexed"])
def test_every_backend_of_attention_gives_the_same_numbers(library, backend, truncation, flat):
    operations, _ = build_operations("library", backend, CPU, flat=flat)
    loss, found = numbers(operations, truncation)
    assert loss == pytest.approx(library[truncation][0], rel=1e-10)
    assert_same(found, library[truncation][1], rel=1e-8)


def test_every_method_of_the_seam_belongs_to_one_piece():
    named = [name for names in METHODS.values() for name in names]
    assert len(named) == len(set(named))
    assert list(METHODS) == list(PIECES)
    whole = {"check", "check_layers", "block", "last_block", "finish", "feed_forward"}
    within = {"cross", "mix"}  # which only attention calls
    public = {name for name, one in vars(Operations).items() if callable(one) and not name.startswith("_")}
    assert public == set(named) | whole | within


def test_dense_calls_are_cut_to_groups_of_one_size():
    """Two groups that happen to keep equally many tokens are neighbours of one length."""
    from fastjepa.models.rows import Stretch

    merged = [Stretch(6, 10), Stretch(2, 7)]
    assert Dispatched(group=2).layout(merged, CPU).stretches == [Stretch(2, 10)] * 3 + [Stretch(2, 7)]
    assert Dispatched(group=4).layout(merged, CPU).stretches == [Stretch(4, 10), Stretch(2, 10), Stretch(2, 7)]
    assert Dispatched().layout(merged, CPU).stretches == merged


def test_without_a_measurement_the_library_is_taken_and_the_reason_is_told():
    assert {name for name, _ in choices("auto", "cpu").values()} == {"library"}
    _, lines = build_operations("auto", "auto", CPU)
    assert lines == ["kernels    torch's own functions: no measurement says that fastjepa_kernels are faster here"]


def test_the_table_decides_for_its_architecture_and_a_name_overrides_it(monkeypatch, tmp_path):
    table = {piece: {} for piece in PIECES}
    table["mlp"]["sm_90"] = {"kernels": "fused", "speed": 1.21, "results": "kernels-h200.json"}
    (tmp_path / "pieces.json").write_text(json.dumps(table))
    monkeypatch.setattr(pieces.resources, "files", lambda _: tmp_path)
    assert choices("auto", "sm_90")["mlp"] == ("fused", "measured 1.21 times as fast (kernels-h200.json)")
    assert choices("auto", "sm_80")["mlp"][0] == "library"
    assert choices({"norm": "triton"}, "sm_90")["mlp"][0] == "fused"
    assert choices({"mlp": "triton"}, "sm_90")["mlp"] == ("triton", "asked for")
    assert choices("library", "sm_90")["mlp"] == ("library", "asked for")


def test_the_table_names_every_piece_and_a_committed_result_for_each_entry():
    table = json.loads((ROOT / "fastjepa" / "pieces.json").read_text())
    assert list(table) == list(PIECES)
    for measured in table.values():
        for architecture, entry in measured.items():
            assert architecture.startswith("sm_")
            assert entry["speed"] >= 1.1
            assert (ROOT / "bench" / "results" / entry["results"]).is_file()


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_takes_pieces_and_backends_by_name(run):
    common = ("model.predictor_dim=48", "runtime.stop_at=3", "log.every=1")
    _, plain = run(*common, folder="plain")
    code, mixed = run(
        *common, "runtime.kernels={mlp: reference, update: reference}", "runtime.attention=padded", folder="mixed"
    )
    assert code == Exit.DONE
    assert losses(mixed) == pytest.approx(losses(plain), rel=1e-4)
    told = (mixed / "train.log").read_text()
    assert "kernels    mlp, update: fastjepa_kernels, reference implementations, asked for" in told
    assert "attention  padded, asked for by name" in told
    assert "attention  sdpa, the first that fits of sdpa, math (order: static)" in (plain / "train.log").read_text()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ("runtime.attention=cudnn",),
            "runtime.attention: backend='cudnn' was asked for, but it needs a CUDA device",
        ),
        (("runtime.kernels={norm: triton}",), "runtime.kernels: expected what runs on this machine, given triton: "),
        (("runtime.kernels={mlp: fused}",), "runtime.kernels: expected what runs on this machine, given fused: "),
    ],
)
def test_what_cannot_run_here_is_refused_before_any_work(run, capsys, settings, sentence):
    code, folder = run(*settings, "runtime.device=cpu")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["runtime.kernels={norm: fused}"], "expected fused for embed or mlp, whose kernels have a matrix product"),
        (
            ["runtime.kernels={nrom: triton}"],
            "runtime.kernels: expected one of auto, library, reference, triton or a map",
        ),
        (["runtime.kernels={norm: fast}"], "a map from embed, assemble, norm, mlp, attention, loss, update to auto"),
        (
            ["runtime.execution=reference", "runtime.kernels={norm: reference}"],
            "expected auto or library with runtime.execution reference, which runs like the public code, given {norm:",
        ),
        (
            ["runtime.execution=reference", "runtime.attention=flash"],
            "runtime.attention: expected auto with runtime.ex",
        ),
        (
            ["runtime.kernels={attention: reference}", "runtime.attention=sdpa", "model.predictor_dim=48"],
            "runtime.attention: expected auto beside attention in runtime.kernels, which names another way, given sdpa",
        ),
        (["runtime.attention=xformers", "runtime.compile=true"], "expected another than xformers with runtime.compile"),
        (
            ["runtime.attention=indexed", "model.predictor_dim=12"],
            "runtime.attention: expected another with a predictor head size of 6",
        ),
    ],
)
def test_contradictions_are_sentences(recipe, settings, sentence):
    with pytest.raises(configfile.SettingsError) as caught:
        configfile.load(recipe, settings)
    assert sentence in str(caught.value)


MIXES = {
    "library": "library",
    "reference": "reference",
    "mlp": {"mlp": "reference"},
    "norm": {"norm": "reference"},
    "products": {"mlp": "library"},
}


@pytest.mark.parametrize("mix", MIXES)
def test_residual_streams_are_bfloat16_in_encoders_and_float32_in_the_predictor(mix):
    operations, _ = build_operations(MIXES[mix], "auto", CPU)
    if mix == "products":  # whose bias the norm of the library adds
        operations = Composite({**operations.pieces, "mlp": Fused("reference", with_product=True)})
    seen, plain = [], operations.block

    def block(number, block, after, normed, x, layout, kept, dropped=None):
        normed, rows = plain(number, block, after, normed, x, layout, kept, dropped)
        seen.append((x.shape[1], x.dtype, rows.dtype))
        return normed, rows

    operations.block = block
    jepa = make(widths=WIDTHS, operations=operations).float()
    with torch.autocast("cpu", torch.bfloat16):
        jepa(clips(2).float(), *masks(2))
    wide, narrow = WIDTHS
    half = {(wide, torch.bfloat16, torch.bfloat16)}
    assert set(seen) == half | {(narrow, torch.float32, torch.float32)}

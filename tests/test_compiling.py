"""Compiled and recomputed blocks: the numbers of plain ones, one graph each, and nothing compiled again."""

import json
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

from fastjepa import compiling
from fastjepa.config import Runtime
from fastjepa.exits import Exit
from fastjepa.masks import target_union
from fastjepa.optim import OptimizerPass
from fastjepa.pieces import build_operations
from fastjepa.schedules import Schedule
from fastjepa_kernels import attention_dispatch
from tests.small_jepa import assert_same, clips, gradients, make, masks

CPU = torch.device("cpu")
WIDTHS = (32, 48)
SCHEDULE = Schedule(100, 2, 1e-3, 1e-3, 1e-4, 0.04, 0.4, 0.9, 1.0)
needs_compiler = pytest.mark.skipif(bool(compiling.why_not_compile(Runtime(), CPU)), reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prepared(
    kernels="library", truncation="group", compile=None, recompute=0, dtype=torch.float64, attention="auto", **more
):
    """A small JEPA as the settings would set it up where blocks are compiled."""
    own = truncation == "none"
    operations, _ = build_operations(kernels, attention, CPU, flat=own, group=1 if own else 2)
    operations.run_blocks_by(compile, recompute)
    return make(widths=WIDTHS, operations=operations, **more).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("truncation", "group"), [("group", 4), ("group", 2), ("none", 4)])
@pytest.mark.parametrize("kernels", ["library", "reference"])
def test_nothing_is_compiled_again_over_50_mask_draws(kernels, truncation, group, dtype):
    counter = CompileCounterWithBackend("eager")
    compile = partial(compiling.COMPILE, backend=counter)
    jepa = prepared(kernels, truncation, compile, dtype=torch.float32)
    update = OptimizerPass(jepa, SCHEDULE, copies=dtype if dtype is torch.bfloat16 else None)
    video, graphs, lengths = clips(4).float(), [], set()
    for step in range(50):
        context, target = masks(4, group=group, truncation=truncation, first=4 * step, step=step)
        lengths.add(tuple(part.numel() if truncation == "group" and group == 4 else part.lengths for part in context))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = jepa(video, context, target, union=target_union(target, 32)).loss
        update.backward(loss)
        update.step(step, loss.detach())
        graphs.append(counter.frame_count)
    assert len(lengths) > 6
    # Target encoder, its last block, context encoder, predictor, its last block.
    assert 5 <= graphs[0] <= 8
    assert graphs[-1] == graphs[0], graphs


@pytest.mark.parametrize("truncation", ["group", "none"])
@pytest.mark.parametrize(
    ("kernels", "attention"),
    [
        ("library", "sdpa"),
        ("library", "padded"),
        ("library", "indexed"),
        ({"attention": "reference"}, "auto"),
        ({"norm": "reference"}, "auto"),
        ({"mlp": "reference", "embed": "reference"}, "sdpa"),
    ],
)
def test_whatever_computes_attention_compiles_once(kernels, attention, truncation):
    counter = CompileCounterWithBackend("eager")
    jepa = prepared(kernels, truncation, partial(compiling.COMPILE, backend=counter), attention=attention)
    plain = prepared("library", truncation)
    graphs = []
    for step in range(8):
        context, target = masks(4, group=2, truncation=truncation, first=4 * step, step=step)
        loss = jepa(clips(4), context, target, union=target_union(target, 32)).loss
        loss.backward()
        torch.testing.assert_close(loss, plain(clips(4), context, target).loss, rtol=1e-10, atol=0)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0], graphs


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("truncation", ["group", "none"])
@pytest.mark.parametrize("kernels", ["library", "reference"])
def test_rotary_positions_and_stochastic_depth_compile_once(kernels, truncation, drop_path):
    """Clips of two lengths, and of one in every second step."""
    counter = CompileCounterWithBackend("eager")
    more = {"rotary": "v2", "drop_path": drop_path}
    jepa = prepared(kernels, truncation, partial(compiling.COMPILE, backend=counter), **more)
    plain = prepared("library", truncation, **more)
    graphs = []
    for step in range(8):
        sides = [masks(4, group=2, truncation=truncation, first=4 * step, step=step, frames=n) for n in (4, 2)]
        video = [clips(4), clips(4, 2)]
        if step % 2:
            video, sides = video[:1], sides[:1]
        context, target = zip(*sides)
        unions = [target_union(sets, 8 * one.shape[2]) for sets, one in zip(target, video)]
        found = []
        for one in (jepa, plain):
            torch.manual_seed(step)
            found.append(one(video, context, target, union=unions).loss)
        found[0].backward()
        torch.testing.assert_close(*found, rtol=1e-10, atol=0)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1], graphs


def test_the_order_of_a_gpu_compiles_where_its_first_choice_refuses(monkeypatch):
    """Ragged clips in float64, which neither torch's varlen attention nor xformers takes."""
    monkeypatch.setitem(attention_dispatch.ORDER, ("other", "ragged"), attention_dispatch.ORDER["cuda", "ragged"])
    jepa = prepared("library", "none", partial(compiling.COMPILE, backend="eager"))
    context, target = masks(4, truncation="none")
    want = prepared("library", "none")(clips(4), context, target).loss
    torch.testing.assert_close(jepa(clips(4), context, target).loss, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("truncation", ["group", "none"])
@pytest.mark.parametrize("kernels", ["library", "reference"])
def test_compiled_and_recomputed_blocks_give_the_same_numbers(kernels, truncation):
    compile = partial(compiling.COMPILE, backend="aot_eager")
    plain = prepared(kernels, truncation)
    results = []
    for more in ({}, {"compile": compile}, {"recompute": 1}, {"compile": compile, "recompute": 9}):
        jepa = prepared(kernels, truncation, **more)
        jepa.load_state_dict(deepcopy(plain.state_dict()))
        context, target = masks(4, group=2, truncation=truncation)
        loss = jepa(clips(4), context, target, union=target_union(target, 32)).loss
        loss.backward()
        results.append((loss, gradients(jepa)))
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-12, atol=0)
        assert_same(found, results[0][1])


def kept_bytes(jepa):
    """Bytes that the forward pass keeps for the backward pass, shared ones once."""
    seen = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        jepa(clips(4), *masks(4))
    weights = {p.untyped_storage().data_ptr() for p in jepa.parameters()}
    return sum(size for address, size in seen.items() if address not in weights)


@pytest.mark.parametrize("execution", ["packed", "reference"])
def test_every_recomputed_block_keeps_less(execution):
    kept = []
    for count in (0, 1, 2):
        jepa = prepared(recompute=count) if execution == "packed" else make("reference", widths=WIDTHS)
        jepa.encoder.recomputed = jepa.predictor.recomputed = count
        kept.append(kept_bytes(jepa))
    assert kept[0] > 1.3 * kept[1] > 1.3 * kept[2]


def losses(folder, name="loss"):
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@needs_compiler
@pytest.mark.parametrize("execution", ["packed", "reference"])
def test_a_run_compiles_its_blocks_when_asked(run, execution):
    settings = ("runtime.stop_at=2", f"runtime.execution={execution}", "log.images=false")
    _, plain = run(*settings, folder="plain")
    code, compiled = run(*settings, "runtime.compile=true", folder="compiled")
    assert code == Exit.DONE
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(compiled, "grad_norm") == pytest.approx(losses(plain, "grad_norm"), rel=1e-4)
    assert compiled.name == plain.name
    assert "compile    off: on a CPU it does not pay; nothing recomputed" in (plain / "train.log").read_text()
    assert "compile    every block, one graph each, asked for" in (compiled / "train.log").read_text()


def test_a_run_recomputes_the_blocks_it_is_told_to(run, monkeypatch):
    from fastjepa.loop import Trainer

    seen = []
    monkeypatch.setattr(Trainer, "train", lambda self: seen.append(self.jepa.operations) or Exit.DONE)
    _, folder = run("runtime.recompute=2")
    assert seen[0].recomputed == 2
    told = (folder / "train.log").read_text()
    assert "; 2 of 3 blocks of the encoder and 0 of the predictor recomputed" in told


def test_a_run_of_the_reference_execution_recomputes_too(run):
    _, plain = run("runtime.stop_at=2", "runtime.execution=reference", folder="plain")
    settings = ("runtime.stop_at=2", "runtime.execution=reference", "runtime.recompute=9")
    code, again = run(*settings, folder="again")
    assert code == Exit.DONE
    assert losses(again) == losses(plain)
    assert again.name == plain.name
    assert "; 3 of 3 blocks of the encoder and 1 of the predictor recomputed" in (again / "train.log").read_text()


@pytest.mark.parametrize(("named", "reason"), [("", "no C++ compiler (g++, clang++)"), ("icc", "CXX names icc")])
def test_without_a_compiler_a_run_that_asks_for_one_ends_with_a_sentence(run, capsys, monkeypatch, named, reason):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("CXX", named)
    code, folder = run("runtime.compile=true")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    told = capsys.readouterr().err
    assert f"runtime.compile: expected auto or false on this machine, given true: {reason}" in told
    assert "Traceback" not in told


def test_auto_compiles_on_a_gpu_with_a_compiler_alone(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++")
    found = [[compiling.compiles(Runtime(compile=wanted), device) for wanted in ("auto", True, False)]
             for device in (cuda, CPU)]  # fmt: skip
    assert found == [[True, True, False], [False, True, False]]
    assert not compiling.compiles(Runtime(attention="xformers"), cuda)
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    assert not compiling.compiles(Runtime(), cuda)
    assert compiling.why_not_compile(Runtime(), cuda) == "Triton is not installed"
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiling.compiles(Runtime(), cuda)

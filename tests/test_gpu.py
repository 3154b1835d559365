"""What only a GPU can show: whole steps in every precision and way, the fused optimizer, pinned batches, resume."""

import json
from contextlib import closing

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from fastjepa import configfile
from fastjepa.build import build_dataset, build_jepa, build_masks
from fastjepa.data.loader import make_loader, running
from fastjepa.data.source import open_videos
from fastjepa.data.upload import uploaded
from fastjepa.exits import Exit
from fastjepa.loop import Trainer

pytestmark = pytest.mark.gpu


FUSED = "runtime.kernels={mlp: fused, embed: fused}"
# What runs by default on a GPU compiles its blocks; the kernels take heads of 16 channels and more.
WAYS = {
    "default": (),
    "not compiled": ("runtime.compile=false",),
    "triton": ("runtime.kernels=triton",),
    "triton, not compiled": ("runtime.kernels=triton", "runtime.compile=false"),
    "fused": (FUSED,),
    "fused, not compiled": (FUSED, "runtime.compile=false"),
    "recomputed": ("runtime.recompute=2",),
    "triton, recomputed": ("runtime.kernels=triton", "runtime.recompute=2"),
}
WIDE = "model.predictor_dim=32"
NETWORKS = {
    "tables": (),
    "rotary": ("model.positions=rope_v2", "model.predictor_heads=2", "model.drop_path=0.1"),
    "dense": ("model.positions=rope", "model.predictor_heads=2", "model.levels=deep", "loss.context=0.5"),
}


def figures(folder, name):
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return figures(folder, "loss")


def saved(folder):
    """Every tensor of the newest checkpoint."""
    shards = sorted((folder / "checkpoints" / "latest").glob("*.safetensors"))
    assert shards
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_every_name_of_the_device_works(run, device):
    code, folder = run(f"runtime.device={device}", "runtime.stop_at=2")
    assert code == Exit.DONE
    assert len(losses(folder)) == 2


@pytest.mark.parametrize("truncation", ["group", "random", "none"])
@pytest.mark.parametrize("execution", ["packed", "reference"])
@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-4), ("bfloat16", 0.02), ("float16", 0.02)])
def test_losses_follow_those_of_the_cpu(run, dtype, rel, execution, truncation):
    settings = (f"mask.truncation={truncation}", "mask.group=2", f"runtime.execution={execution}", "runtime.stop_at=4")
    _, cpu = run(*settings, "optim.dtype=float32", folder="cpu")
    code, gpu = run(*settings, f"optim.dtype={dtype}", "runtime.device=cuda", "data.workers=2", folder="gpu")
    assert code == Exit.DONE
    for one, other in zip(losses(cpu), losses(gpu), strict=True):
        assert other == pytest.approx(one, rel=rel)


@pytest.mark.parametrize("networks", ["tables", "rotary", "dense"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_every_way_of_taking_the_packed_step_follows_the_cpu(run, dtype, rel, way, networks):
    # Without stochastic depth, whose draws are those of the device.
    settings = (
        *NETWORKS[networks],
        "model.drop_path=0",
        WIDE,
        "mask.truncation=group",
        "mask.group=2",
        "runtime.stop_at=5",
        "log.images=false",
    )
    _, cpu = run(*settings, "optim.dtype=float32", folder="cpu")
    code, gpu = run(*settings, *WAYS[way], f"optim.dtype={dtype}", "runtime.device=cuda", folder="gpu")
    assert code == Exit.DONE
    assert len(losses(gpu)) == 5
    assert losses(gpu) == pytest.approx(losses(cpu), rel=rel)
    # Losses of the first steps hardly tell what a backward pass did.
    assert figures(gpu, "grad_norm") == pytest.approx(figures(cpu, "grad_norm"), rel=5 * rel)


@pytest.mark.parametrize("kernels", ["library", "triton"])
@pytest.mark.parametrize("truncation", ["group", "none"])
def test_nothing_is_compiled_after_the_second_step(run, monkeypatch, kernels, truncation):
    """Over 20 mask draws, whose lengths differ."""
    torch._dynamo.reset()
    counters.clear()
    step, next_batch, graphs, shapes = Trainer._step, Trainer._next, [], set()

    def counted(self, number, batches, look):
        done = step(self, number, batches, look)
        graphs.append(counters["stats"]["unique_graphs"])
        return done

    def noted(self, batches):
        batch = next_batch(self, batches)
        shapes.add(tuple(one.shape if isinstance(one, torch.Tensor) else one.lengths for one in batch.masks_context))
        return batch

    monkeypatch.setattr(Trainer, "_step", counted)
    monkeypatch.setattr(Trainer, "_next", noted)
    code, _ = run(
        WIDE, "runtime.device=cuda", "optim.dtype=bfloat16", "optim.steps=20", f"mask.truncation={truncation}",
        "mask.group=4", f"runtime.kernels={kernels}", "log.every=100", "log.images=false",
    )  # fmt: skip
    assert code == Exit.DONE
    assert len(shapes) > 3
    assert len(graphs) == 20
    # Target encoder, its last block, context encoder, predictor, its last block.
    assert 5 <= graphs[0] <= graphs[1]
    assert graphs[-1] == graphs[1], graphs


@pytest.mark.parametrize("kernels", ["library", "triton"])
@pytest.mark.parametrize("compile", ["auto", "false"])
def test_a_deterministic_run_continues_bitwise(run, kernels, compile):
    """Losses, and the float32 masters and moments that a step in bfloat16 leaves."""
    settings = (
        WIDE, "runtime.device=cuda", "runtime.deterministic=true", "optim.dtype=bfloat16",
        f"runtime.kernels={kernels}", f"runtime.compile={compile}",
    )  # fmt: skip
    try:
        _, whole = run(*settings, folder="whole")
        run(*settings, "runtime.stop_at=4", folder="parts")
        _, parts = run(*settings, folder="parts")
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(parts) == losses(whole)
    one, other = saved(whole), saved(parts)
    assert one.keys() == other.keys()
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_step_that_is_not_finite_changes_nothing(run):
    code, folder = run(
        "runtime.device=cuda", "optim.lr=1e30", "optim.start_lr=1e30", "optim.warmup_steps=0", "optim.clip_grad=null"
    )
    assert code == Exit.NON_FINITE
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("execution", ["packed", "reference"])
@pytest.mark.parametrize("targets", [(), ("model.targets=noised", "model.noise=linear")], ids=["mask_tokens", "noised"])
@pytest.mark.parametrize("truncation", ["group", "none"])
@pytest.mark.parametrize("networks", ["tables", "rotary", "dense"])
def test_the_host_never_waits_for_the_device_in_a_step(run, monkeypatch, execution, targets, truncation, networks):
    """Five whole steps of a run, from the uploaded batch to the moving average; the first one sets up libraries."""
    step, checked = Trainer._step, []

    def strict(self, number, batches, look):
        if number == 0 or look:  # log steps may ask
            return step(self, number, batches, look)
        torch.cuda.set_sync_debug_mode("error")
        try:
            done = step(self, number, batches, look)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        checked.append(number)
        return done

    monkeypatch.setattr(Trainer, "_step", strict)
    code, folder = run(
        *targets, *NETWORKS[networks], f"runtime.execution={execution}", f"mask.truncation={truncation}",
        "mask.group=2", "log.every=100", "runtime.device=cuda", "runtime.stop_at=7", "optim.dtype=bfloat16",
    )  # fmt: skip
    assert code == Exit.DONE
    assert checked == [1, 2, 3, 4, 5]
    assert len(losses(folder)) == 1


def test_uploaded_batches_hold_what_the_loader_gave(recipe):
    """Values after many copies while the computing stream is busy: memory is not handed out again too early."""
    device = torch.device("cuda", torch.cuda.current_device())
    settings = configfile.load(recipe, [])
    dataset = build_dataset(settings, open_videos(settings.data.path, settings.optim.seed))
    loader = make_loader(
        dataset, build_masks(settings), first_step=0, last_step=12, global_batch=4, batch_size=4, workers=0,
        pin_memory=True, tokens=build_jepa(settings).encoder.num_patches,
    )  # fmt: skip
    with running(loader) as batches:
        wanted = [(batch.clips.double().sum().item(), batch.masks_target[0].sum().item()) for batch in batches]
    busy, sums = torch.randn(4096, 4096, device=device), []
    with running(loader) as loaded, closing(uploaded(loaded, device)) as batches:
        for batch in batches:
            assert (batch.clips.device, batch.clips.dtype) == (device, torch.uint8)
            for _ in range(20):
                busy = (busy @ busy).tanh()
            sums.append((batch.clips.double().sum(), batch.masks_target[0].sum()))
    assert [(clips.item(), tokens.item()) for clips, tokens in sums] == wanted

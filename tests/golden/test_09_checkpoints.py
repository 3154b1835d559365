"""Checkpoints of the public training script: what is in them, features after loading, and training that goes on."""

from functools import partial

import pytest
import torch
from torch import nn

from fastjepa.interop import NETWORKS, load_meta_checkpoint, load_moments, load_weights
from fastjepa.jepa import JEPA
from fastjepa.models import VisionTransformer, vit_predictor
from fastjepa.optim import OptimizerPass
from fastjepa.schedules import Schedule

CASES = ["09_checkpoint_v1_fp32", "09_checkpoint_v1_scaler"]
EXECUTIONS = ["reference", "packed"]


@pytest.fixture(params=CASES)
def golden(request, case, shared):
    found = case(request.param)
    found.file = shared / "golden" / "cases" / f"{request.param}.pth.tar"
    return found


def fresh(golden, execution="reference"):
    e, p = (dict(golden.info["constructor"][k]) for k in ("encoder", "predictor"))
    norm = partial(nn.LayerNorm, eps=e.pop("norm_eps"))
    shared = {k: e[k] for k in ("img_size", "patch_size", "num_frames", "tubelet_size", "uniform_power")}
    predictor = vit_predictor(embed_dim=e["embed_dim"], num_heads=e["num_heads"], use_mask_tokens=True, **shared, **p)
    return JEPA(VisionTransformer(**e, norm_layer=norm), predictor, execution=execution)


def test_every_entry_is_the_recorded_one(golden):
    loaded, recorded = load_meta_checkpoint(golden.file), golden.info["checkpoint"]
    assert loaded.facts == {key: recorded[key] for key in ("epoch", "loss", "batch_size", "world_size", "lr")}
    assert loaded.scaler == recorded["scaler"]
    for network in NETWORKS:
        state = loaded.networks[network]
        assert [f"module.backbone.{key}" for key in state] == list(recorded[network])
        for key, tensor in state.items():
            facts = recorded[network][f"module.backbone.{key}"]
            assert list(tensor.shape) == facts["shape"]
            assert tensor.double().sum().item() == pytest.approx(facts["sum"], rel=1e-9, abs=1e-9)
            assert tensor.double().abs().sum().item() == pytest.approx(facts["abs_sum"], rel=1e-9)


def test_moments_carry_the_recorded_names(golden):
    loaded = load_meta_checkpoint(golden.file)
    index = golden.info["checkpoint"]["optimizer_index"]
    assert list(loaded.moments()) == [entry["name"] for entry in index if entry["has_state"]]
    stored = {entry["name"]: loaded.optimizer["state"][entry["index"]] for entry in index if entry["has_state"]}
    for name, slots in loaded.moments().items():
        assert all(torch.equal(slots[slot], stored[name][slot]) for slot in ("step", "exp_avg", "exp_avg_sq"))


def test_features_after_loading(golden):
    jepa, x = fresh(golden), golden.tensors["in.x"]
    load_weights(jepa, load_meta_checkpoint(golden.file))
    golden.assert_max(jepa.target_encoder(x), "out.target", "out")
    golden.assert_max(jepa.encoder(x), "out.encoder", "out")


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_training_goes_on(golden, execution):
    """The second epoch: schedules at their place, moments and loss scale from the file."""
    o, loss, loaded = (
        *(golden.info["constructor"][k] for k in ("optimization", "loss")),
        load_meta_checkpoint(golden.file),
    )
    jepa = fresh(golden, execution)
    assert (loss["loss_exp"], loss["reg_coeff"]) == (jepa.loss_exp, jepa.reg_coeff)
    load_weights(jepa, loaded)
    scaler = None
    if loaded.scaler is not None:
        scaler = torch.amp.GradScaler("cpu")
        scaler.load_state_dict(loaded.scaler)
    names = ("lr", "start_lr", "final_lr", "weight_decay", "final_weight_decay")
    schedule = Schedule(
        o["epochs"] * o["ipe"],
        o["warmup"] * o["ipe"],
        *(o[name] for name in names),
        *o["ema"],
        ipe_scale=o["ipe_scale"],
    )
    update = OptimizerPass(
        jepa,
        schedule,
        eps=o["eps"],
        clip_grad=o["clip_grad"],
        clip_from_step=(o["warmup"] + 1) * o["ipe"],
        clip_per_network=True,
        ema_positions=True,
        scaler=scaler,
    )
    load_moments(update.state(), loaded)
    losses, rates, decays = [], [], []
    first = loaded.facts["epoch"] * o["ipe"]
    for number in range(2):
        masks = [[golden.tensors[f"resume.batch{number}.mask_{side}{i}"] for i in (0, 1)] for side in ("enc", "pred")]
        out = jepa(golden.tensors[f"resume.batch{number}.clip0"], *masks)
        update.backward(out.loss)
        update.step(first + number, out.loss.detach())
        losses.append(out.loss.item())
        rates.append(schedule.lr_at(first + number))
        decays.append(schedule.weight_decay_at(first + number))
    limits = {k: golden.info["tolerance"]["resume.loss"][k] for k in ("rtol", "atol")}
    torch.testing.assert_close(torch.tensor(losses), golden.tensors["resume.loss"], **limits)
    torch.testing.assert_close(torch.tensor(rates), golden.tensors["resume.lr"])
    torch.testing.assert_close(torch.tensor(decays), golden.tensors["resume.wd"])
    assert losses == pytest.approx(golden.info["resume"]["loss"], rel=limits["rtol"], abs=limits["atol"])
    default = {k: golden.info["tolerance"]["default"][k] for k in ("rtol", "atol")}
    after = golden.group("resume.after.target_encoder.")
    assert len(after) == 2
    for key, want in after.items():
        torch.testing.assert_close(jepa.target_encoder.state_dict()[key], want, **default)


def test_without_the_moments_the_losses_are_others(golden):
    """So that the test above would notice if they were not loaded: the second loss depends on the first update."""
    o, loaded = golden.info["constructor"]["optimization"], load_meta_checkpoint(golden.file)
    jepa = fresh(golden)
    load_weights(jepa, loaded)
    update = OptimizerPass(
        jepa, Schedule(4, 2, o["lr"], o["start_lr"], o["final_lr"], 0.04, 0.4, *o["ema"]), eps=o["eps"]
    )
    for number in range(2):
        masks = [[golden.tensors[f"resume.batch{number}.mask_{side}{i}"] for i in (0, 1)] for side in ("enc", "pred")]
        out = jepa(golden.tensors[f"resume.batch{number}.clip0"], *masks)
        update.backward(out.loss)
        update.step(2 + number, out.loss.detach())
    assert out.loss.item() != pytest.approx(golden.info["resume"]["loss"][1], rel=1e-3)

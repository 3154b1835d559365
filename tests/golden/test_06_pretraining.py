"""The published training loop, replayed: losses, norms, gradients, parameters and schedules, step by step."""

import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fastjepa.jepa import JEPA
from fastjepa.models import VisionTransformer, vit_predictor
from fastjepa.optim import OptimizerPass
from fastjepa.schedules import Schedule

HERE = Path(__file__).parent
# Which variants of 06_pretrain_step carry parameters after the first and after the last step.
RECORDED_PARAMETERS = [("step0", "final"), (), ("step0",), ("final",)]
EXECUTIONS = ["reference", "packed"]


def networks(golden, **jepa_arguments):
    e, p = (dict(golden.info["constructor"][k]) for k in ("encoder", "predictor"))
    norm = partial(nn.LayerNorm, eps=e.pop("norm_eps"))
    p.pop("norm_eps", None)
    shared = {k: e[k] for k in ("img_size", "patch_size", "num_frames", "tubelet_size", "uniform_power")}
    jepa = JEPA(VisionTransformer(**e, norm_layer=norm), vit_predictor(**{**shared, **p}), **jepa_arguments)
    for name in ("encoder", "predictor", "target_encoder"):
        getattr(jepa, name).load_state_dict(golden.group(f"init.{name}."))
    return jepa


def schedule(o):
    steps = o["epochs"] * o["ipe"]
    return Schedule(
        steps, int(o["warmup"] * o["ipe"]), o["lr"], o["start_lr"], o["final_lr"],
        o["weight_decay"], o["final_weight_decay"], *o["ema"], ipe_scale=o["ipe_scale"],
    )  # fmt: skip


def optimizer_pass(jepa, o):
    return OptimizerPass(
        jepa,
        schedule(o),
        betas=tuple(o.get("betas", (0.9, 0.999))),
        eps=o.get("eps", 1e-8),
        clip_grad=o["clip_grad"],
        clip_from_step=(int(o["warmup"]) + 1) * o["ipe"] if o["warmup"] >= 1 else 2 * o["ipe"],
        clip_per_network=True,
        ema_positions=True,
    )


def batch(golden, step):
    t = golden.tensors
    count = sum(k.startswith(f"batch{step}.mask_enc") for k in t)
    masks = [[t[f"batch{step}.mask_{side}{i}"] for i in range(count)] for side in ("enc", "pred")]
    return t[f"batch{step}.clip0"], *masks


def gradients(jepa):
    return {
        f"{net}.{name}": p.grad.clone()
        for net in ("encoder", "predictor")
        for name, p in getattr(jepa, net).named_parameters()
        if p.grad is not None
    }


def check_gradients(golden, got, prefix):
    tolerance = golden.info["tolerance"]["grad"]
    wanted = golden.group(prefix)
    recorded = {name.split(".")[0] for name in wanted}
    assert recorded, prefix
    assert {name for name in got if name.split(".")[0] in recorded} == set(wanted)
    for name, want in wanted.items():
        error = ((got[name] - want).abs().max() / want.abs().max()).item()
        assert error <= tolerance["max_error_over_tensor_max"], (name, error)


def check_parameters(golden, jepa, prefix, atol, rtol):
    skip = {r["tensor"]: (r["first"], r["last_exclusive"]) for r in golden.info["ill_conditioned"]["ranges"]}
    checked = 0
    for name, want in golden.group(prefix).items():
        got = jepa.state_dict()[name]
        keep = torch.ones(want.shape[0], dtype=torch.bool)
        first, last = skip.get(prefix + name, (0, 0))
        keep[first:last] = False
        torch.testing.assert_close(got[keep], want[keep], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        checked += 1
    assert checked > 0


def check_trajectory(golden, prefix, rows):
    tolerance = golden.info["tolerance"]
    for name, values in rows.items():
        want = golden.tensors[f"{prefix}traj.{name}"]
        exact = name in ("lr", "wd", "momentum")
        limits = tolerance["traj.lr_wd_momentum" if exact else "traj.loss"]
        torch.testing.assert_close(
            torch.tensor(values, dtype=want.dtype), want, **{k: limits[k] for k in ("rtol", "atol")}
        )


def after_tolerance(golden, o):
    after = golden.info["tolerance"]["after"]
    return after["atol"] if o.get("eps", 1e-8) > 1e-8 else after["atol_when_eps_is_1e_8"], after["rtol"]


def test_every_variant_is_replayed(case):
    assert [c["prefix"] for c in case("06_pretrain_step").info["calls"]] == ["v0.", "v1.", "v2.", "v3."]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("variant", range(4))
def test_five_steps(case, variant, execution):
    golden = case("06_pretrain_step")
    call = golden.info["calls"][variant]
    o, loss = call["optimization"], call["loss"]
    jepa = networks(golden, loss_exp=loss["loss_exp"], reg_coeff=loss["reg_coeff"], execution=execution)
    update = optimizer_pass(jepa, o)
    rows = {"loss": [], "loss_jepa": [], "lr": [], "wd": [], "momentum": []}
    if loss["reg_coeff"]:
        rows["loss_reg"] = []
    for step in range(5):
        out = jepa(*batch(golden, step), collect=step == 0)
        if step == 0 and variant == 0:
            for i in range(2):
                golden.assert_max(out.predictions[i], f"v0.step0.out.pred{i}", "out")
                golden.assert_max(out.targets[i], f"v0.step0.out.target{i}", "out")
            golden.assert_max(jepa.target_features(batch(golden, 0)[0]), "v0.step0.out.target_full", "out")
        update.backward(out.loss)
        if step == 0:
            check_gradients(golden, gradients(jepa), f"{call['prefix']}step0.grad.")
        update.step(step, out.loss.detach())
        if step == 0 and "step0" in RECORDED_PARAMETERS[variant]:
            check_parameters(golden, jepa, f"{call['prefix']}step0.after.", *after_tolerance(golden, o))
        for name in rows:
            rows[name].append(_value(name, out, update.schedule, step))
    check_trajectory(golden, call["prefix"], rows)
    if "final" in RECORDED_PARAMETERS[variant]:
        check_parameters(golden, jepa, f"{call['prefix']}final.after.", **_loose(golden))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_noised_targets(case, execution):
    golden = case("06_pretrain_step_diffusion")
    o, loss = golden.info["constructor"]["optimization"], golden.info["constructor"]["loss"]
    jepa = networks(golden, loss_exp=loss["loss_exp"], reg_coeff=loss["reg_coeff"], execution=execution)
    update = optimizer_pass(jepa, o)
    rows = {"loss": [], "loss_jepa": [], "loss_reg": [], "lr": [], "wd": []}
    for step in range(2):
        draws = [tuple(golden.tensors[f"draw{2 * step + i}.{k}"] for k in ("T", "noise")) for i in range(2)]
        out = jepa(*batch(golden, step), draws=draws, collect=True)
        if step == 0:
            for i in range(2):
                golden.assert_max(out.predictions[i], f"step0.out.pred{i}", "out")
        update.backward(out.loss)
        if step == 0:
            check_gradients(golden, gradients(jepa), "step0.grad.")
        update.step(step, out.loss.detach())
        if step == 0:
            check_parameters(golden, jepa, "step0.after.", *after_tolerance(golden, o))
        for name in rows:
            rows[name].append(_value(name, out, update.schedule, step))
    check_trajectory(golden, "", rows)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_clipping_starts_late_and_is_per_network(case, execution):
    golden = case("06_pretrain_clip")
    o = golden.info["constructor"]["optimization"]
    jepa = networks(golden, execution=execution)
    update = optimizer_pass(jepa, o)
    assert update.clip_from_step == golden.info["first_clipped_step"]
    rows = {"loss": [], "lr": [], "wd": [], "momentum": [], "enc_norm": [], "pred_norm": []}
    clipped = {}
    apply = update.optimizer.step

    def step_and_keep_the_clipped_gradients():
        clipped.update(gradients(jepa))
        apply()

    update.optimizer.step = step_and_keep_the_clipped_gradients
    for step in range(8):
        out = jepa(*batch(golden, step))
        update.backward(out.loss)
        norms = update.step(step, out.loss.detach())
        if step == update.clip_from_step:
            check_gradients(golden, clipped, "step4.grad.")
        for name in rows:
            if name.endswith("norm"):
                value = norms.encoder if name == "enc_norm" else norms.predictor
                rows[name].append(value.item() if step >= update.clip_from_step else 0.0)
            else:
                rows[name].append(_value(name, out, update.schedule, step))
    check_trajectory(golden, "", rows)


def _value(name, out, plan, step):
    if name in ("lr", "wd", "momentum"):
        return {"lr": plan.lr_at, "wd": plan.weight_decay_at, "momentum": plan.momentum_at}[name](step)
    return getattr(out, name).item()


def _loose(golden):
    return {k: golden.info["tolerance"]["final.after"][k] for k in ("atol", "rtol")}


def test_committed_cases_are_unchanged_copies(shared):
    index = json.loads((shared / "golden" / "cases" / "index.json").read_text())
    sums = {file["name"]: file["sha256"] for entry in index["cases"] for file in entry["files"]}
    committed = [p for p in HERE.iterdir() if p.name in sums]
    assert len(committed) >= 20
    for path in committed:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[path.name], path.name

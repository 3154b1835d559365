"""The published training loop of the second generation, replayed: clips of two lengths in every step."""

from functools import partial

import pytest
import torch
from torch import nn

from fastjepa.jepa import JEPA
from fastjepa.masks.union import target_union
from fastjepa.models import VisionTransformer, vit_predictor
from fastjepa.optim import OptimizerPass
from fastjepa.schedules import Schedule

NAME = "23_v2_pretrain_step"


def networks(golden, execution):
    encoder, predictor = (dict(golden.info["constructor"][k]) for k in ("encoder", "predictor"))
    norm = partial(nn.LayerNorm, eps=encoder.pop("norm_eps"))
    predictor.pop("norm_eps")
    jepa = JEPA(
        VisionTransformer(**encoder, norm_layer=norm),
        vit_predictor(**predictor),
        loss_exp=golden.info["constructor"]["loss"]["loss_exp"],
        execution=execution,
        mask_token_by="length",
    )
    for name in ("encoder", "predictor", "target_encoder"):
        getattr(jepa, name).load_state_dict(golden.group(f"init.{name}."))
    return jepa


def optimizer_pass(golden, jepa):
    o = golden.info["constructor"]["optimization"]
    return OptimizerPass(
        jepa,
        Schedule(
            o["epochs"] * o["ipe"], int(o["warmup"] * o["ipe"]), o["lr"], o["start_lr"], o["final_lr"],
            o["weight_decay"], o["final_weight_decay"], *o["ema"], ipe_scale=o["ipe_scale"],
        ),
        eps=o["eps"],
        clip_grad=None,
    )  # fmt: skip


def batch(golden, step):
    t = golden.tensors
    groups = range(len(golden.info["constructor"]["data"]["dataset_fpcs"]))
    groups = [g for g in groups if f"batch{step}.group{g}.clips" in t]
    sets = range(len(golden.info["constructor"]["mask"]))
    masks = [[[t[f"batch{step}.group{g}.mask_{side}{m}"] for m in sets] for g in groups] for side in ("enc", "pred")]
    return [t[f"batch{step}.group{g}.clips"] for g in groups], *masks


@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("execution", ["reference", "packed"])
def test_every_step(case, execution, union):
    golden = case(NAME)
    jepa = networks(golden, execution)
    update = optimizer_pass(golden, jepa)
    losses, rates = [], []
    for step in range(len(golden.tensors["traj.loss"])):
        clips, context, target = batch(golden, step)
        assert step or len(clips) == 2
        unions = None
        if union:
            tokens = [one[0, 0].numel() // 32 for one in clips]  # two frames of four by four pixels
            unions = [target_union(sets, count) for sets, count in zip(target, tokens)]
        output = jepa(clips, context, target, collect=step == 0, union=unions)
        if step == 0:
            check_first_forward(golden, output)
        update.backward(output.loss)
        if step == 0:
            check_first_gradients(golden, jepa)
        rates.append(update.schedule.lr_at(step))
        update.step(step, output.loss.detach())
        if step == 0:
            check_first_parameters(golden, jepa)
        losses.append(output.loss.item())
    limits = golden.info["tolerance"]["traj.loss"]
    torch.testing.assert_close(
        torch.tensor(losses), golden.tensors["traj.loss"].float(), rtol=limits["rtol"], atol=limits["atol"]
    )
    torch.testing.assert_close(torch.tensor(rates), golden.tensors["traj.lr"].float(), rtol=1e-6, atol=0.0)


def check_first_forward(golden, output):
    for group, (predictions, targets) in enumerate(zip(output.predictions, output.targets)):
        for number, (prediction, target) in enumerate(zip(predictions, targets)):
            golden.assert_max(prediction, f"step0.out.group{group}.pred{number}", "out")
            golden.assert_max(target, f"step0.out.group{group}.target{number}", "out")


def check_first_gradients(golden, jepa):
    for name in ("encoder", "predictor"):
        wanted = golden.group(f"step0.grad.{name}.")
        assert wanted
        parameters = dict(getattr(jepa, name).named_parameters())
        # Mask tokens of lengths that no step has get no gradient.
        assert set(wanted) == {key for key, p in parameters.items() if p.grad is not None}
        for key, gradient in wanted.items():
            golden.assert_max(parameters[key].grad, gradient, "grad")


def check_first_parameters(golden, jepa):
    after = golden.info["tolerance"]["after"]
    skip = {r["tensor"]: (r["first"], r["last_exclusive"]) for r in golden.info["ill_conditioned"]["ranges"]}
    wanted = golden.group("step0.after.")
    assert {name.split(".")[0] for name in wanted} == {"encoder", "predictor", "target_encoder"}
    for name, want in wanted.items():
        keep = torch.ones(want.shape[0], dtype=torch.bool)
        first, last = skip.get(f"step0.after.{name}", (0, 0))
        keep[first:last] = False
        got = jepa.state_dict()[name]
        torch.testing.assert_close(
            got[keep], want[keep], rtol=after["rtol"], atol=after["atol"], msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_length_weighs_as_much_as_it_is_told(case):
    golden = case(NAME)
    for execution in ("reference", "packed"):
        jepa = networks(golden, execution)
        clips, context, target = batch(golden, 0)
        alone = [jepa([c], [e], [p]).loss.item() for c, e, p in zip(clips, context, target)]
        # By itself, the second length is the first of its step, with the token of the first.
        both = jepa(clips, context, target, shares=[1.0, 0.0]).loss.item()
        assert both == pytest.approx(alone[0], rel=1e-6)
        equal = jepa(clips, context, target).loss.item()
        half = jepa(clips, context, target, shares=[0.5, 0.5]).loss.item()
        assert equal == pytest.approx(half, rel=1e-6)
        assert equal != pytest.approx(jepa(clips, context, target, shares=[0.9, 0.1]).loss.item(), rel=1e-4)
        with pytest.raises(ValueError, match="shares come one a length"):
            jepa(clips, context, target, shares=[1.0])


def test_what_does_not_belong_together_is_refused(case):
    golden = case(NAME)
    jepa = networks(golden, "packed")
    clips, context, target = batch(golden, 0)
    union = target_union(target[0], clips[0][0, 0].numel() // 32)
    with pytest.raises(ValueError, match="unions come for every length or for none"):
        jepa(clips, context, target, union=[union, None])
    with pytest.raises(ValueError, match="draws come for every length or for none"):
        jepa(clips, context, target, draws=[None, []])
    larger = torch.nn.functional.pad(clips[0], (0, 4))
    with pytest.raises(ValueError, match=r"built for frames of \(4, 4\) tokens, the clips have \(4, 5\)"):
        jepa([larger], context[:1], target[:1])

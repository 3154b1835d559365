"""The packed pass through the kernels' plain form: the same numbers as through torch's own functions."""

import json
from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa import configfile
from fastjepa.exits import Exit
from fastjepa.fused import Fused
from fastjepa.jepa import JEPA
from fastjepa.masks import target_union
from fastjepa.models.operations import LIBRARY
from fastjepa.noise import noise_draws
from tests.small_jepa import assert_same, clips, gradients, make, masks, ragged

CPU = torch.device("cpu")
WIDTHS = (32, 48)  # two heads of 16 and of 24: the kernels take 16 to 128 in steps of 8
CASES = {
    "mask_tokens": {},
    "noised": {"noised": True},
    "squared": {"loss_exp": 2.0},
    "regularised": {"reg_coeff": 0.1},
}


class Counted(TorchDispatchMode):
    """Which operators of the kernels were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastjepa":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def draws_for(jepa, sets):
    """Recorded draws of a noised predictor."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for token_set in sets:
        index = token_set if isinstance(token_set, torch.Tensor) else token_set.index
        clips_in = len(token_set if isinstance(token_set, torch.Tensor) else token_set.lengths)
        steps = torch.randint(6, (clips_in,), generator=generator)
        made.append((steps, torch.randn(*index.shape, WIDTHS[1], dtype=torch.float64, generator=generator)))
    return made


@pytest.mark.parametrize("lengths", ["dense", "groups", "equal rows, as ragged", "every clip its own"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_product", [False, True], ids=["", "products"])
def test_losses_and_gradients_are_those_of_the_library(case, lengths, with_product):
    jepa = make(widths=WIDTHS, **CASES[case])
    video = clips(6)
    context, target = masks(
        6, group=2 if lengths == "groups" else 6, truncation="none" if "own" in lengths else "group"
    )
    if "ragged" in lengths:
        context, target = ([ragged(s) for s in side] for side in (context, target))
    draws = draws_for(jepa, target) if "noised" in case else None
    union = target_union(target, 32)
    found = []
    for operations in (LIBRARY, Fused("reference", with_product=with_product)):
        one = deepcopy(jepa)
        one.operations = operations
        with Counted() as counted:
            out = one(video, context, target, draws, collect=True, union=union)
            out.loss.backward()
        found.append((out, gradients(one), counted.names))
    (library, expected, none), (fused, got, names) = found
    torch.testing.assert_close(fused.loss, library.loss, rtol=1e-10, atol=0)
    assert_same(got, expected, rel=1e-9)
    for ours, theirs in zip(fused.targets + fused.predictions, library.targets + library.predictions):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert not none
    forward = "layer_norm add_layer_norm indexed_attention patch_embed_gather target_loss assemble_tokens"
    forward += " mlp gelu_product_backward" if with_product else " bias_gelu bias_gelu_backward"
    assert {f"{name}_reference" for name in forward.split()} <= names, names


def test_the_moving_average_is_that_of_the_library():
    jepa = make(widths=WIDTHS).float()
    other = deepcopy(jepa)
    other.operations = Fused("reference")
    for one in (jepa, other):
        one.update_target(0.99)
    for ours, theirs in zip(other.target_encoder.parameters(), jepa.target_encoder.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_in_bfloat16_it_stays_as_near_to_full_precision_as_the_library():
    jepa = make(widths=WIDTHS)
    video, sets = clips(4), masks(4)
    exact = jepa(video, *sets).loss
    jepa.float()
    distance = []
    for operations in (LIBRARY, Fused("reference")):
        jepa.operations = operations
        with torch.autocast("cpu", torch.bfloat16):
            distance.append((jepa(video.float(), *sets).loss - exact).abs().item())
    assert distance[1] <= 2 * distance[0] + 1e-3 * exact.item()


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [(), ("model.targets=noised", "model.noise=linear")], ids=["mask_tokens", "noised"])
def test_a_run_takes_the_kernels_it_is_told_to(run, more):
    common = ("log.every=1", "model.predictor_dim=48", *more)
    code, library = run("runtime.kernels=library", *common, folder="library")
    assert code == Exit.DONE
    code, reference = run("runtime.kernels=reference", *common, folder="reference")
    assert code == Exit.DONE
    assert "kernels    fastjepa_kernels, reference implementations, asked for" in (reference / "train.log").read_text()
    assert library.name == reference.name, "kernels are no part of a run's identity"
    assert losses(reference) == pytest.approx(losses(library), rel=1e-3)


def test_without_a_measurement_the_library_is_taken(run):
    _, folder = run("runtime.stop_at=1")
    assert "kernels    torch's own functions: no measurement says" in (folder / "train.log").read_text()


def test_triton_without_a_gpu_is_refused_before_any_work(run, capsys):
    code, folder = run("runtime.kernels=triton", "runtime.device=cpu", "model.predictor_dim=48")
    assert (code, folder) == (Exit.WRONG_INPUT, None)
    assert "runtime.kernels: expected what runs on this machine, given triton: " in capsys.readouterr().err


def test_a_head_size_that_kernels_do_not_take_is_refused(recipe):
    with pytest.raises(ValueError, match=r"runtime\.kernels: expected auto or library with a predictor head size of 8"):
        configfile.load(recipe, ["runtime.kernels=reference"])


def test_the_public_codes_way_takes_no_kernels(recipe):
    with pytest.raises(ValueError, match=r"runtime\.kernels: expected auto or library"):
        configfile.load(recipe, ["model.predictor_dim=48", "runtime.kernels=reference", "runtime.execution=reference"])
    with pytest.raises(ValueError, match="only packed execution"):
        make(execution="reference", operations=Fused("reference"))


def test_networks_that_the_kernels_would_compute_otherwise_are_refused():
    jepa = make(widths=WIDTHS)
    arguments = {"operations": Fused("reference")}
    jepa.predictor.predictor_blocks[1].attn.attn_drop.p = 0.1
    with pytest.raises(ValueError, match=r"expected no dropout and use_sdpa=True in predictor_blocks\.1\.attn"):
        JEPA(jepa.encoder, jepa.predictor, **arguments)
    jepa.predictor.predictor_blocks[1].attn.attn_drop.p = 0.0
    jepa.encoder.blocks[0].mlp.act = torch.nn.GELU("tanh")
    with pytest.raises(ValueError, match=r"expected the exact GELU in blocks\.0\.mlp"):
        JEPA(jepa.encoder, jepa.predictor, **arguments)


def test_draws_with_two_seeds_are_refused():
    jepa = make(widths=WIDTHS, noised=True, operations=Fused("reference"))
    context, target = masks(2)
    draws = noise_draws(1, range(2), target, WIDTHS[1], CPU, keyed=True)
    draws[1] = noise_draws(2, range(2), target, WIDTHS[1], CPU, keyed=True)[1]
    with pytest.raises(ValueError, match="one seed"):
        jepa(clips(2), context, target, draws)


def test_keyed_noise_is_the_noise_of_the_same_draws():
    """The kernels make from its keys what the library is handed in, in groups or all together."""
    context, target = masks(4)
    made = noise_draws(3, range(8, 12), target, WIDTHS[1], CPU)
    keyed = noise_draws(3, range(8, 12), target, WIDTHS[1], CPU, keyed=True)
    jepa = make(widths=WIDTHS, noised=True).float()
    expected = jepa(clips(4).float(), context, target, made).loss
    jepa.operations = Fused("reference")
    torch.testing.assert_close(jepa(clips(4).float(), context, target, keyed).loss, expected)
    alone = noise_draws(3, [10], [s[2:3] for s in target], WIDTHS[1], CPU)
    for (steps, noise), (one_step, one) in zip(made, alone):
        assert one_step.equal(steps[2:3])
        assert one.equal(noise[2:3])

"""Rotary positions in the packed pass: clips of two lengths give the same numbers however attention is computed."""

from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa.fused import Fused
from fastjepa.masks import target_union
from fastjepa.models.operations import LIBRARY
from fastjepa.noise import noise_draws, noise_seed
from fastjepa.pieces import build_operations
from tests.small_jepa import assert_same, clips, gradients, make, masks

CPU = torch.device("cpu")
WIDTHS = (32, 48)  # two heads of 16 and of 24: rows of an axis, and channels that stay
FRAMES = (4, 2)
OPERATIONS = {
    "library": LIBRARY,
    "dense calls": build_operations("library", "auto", CPU)[0],
    "ragged calls": build_operations("library", "auto", CPU, flat=True)[0],
    "indexed": build_operations({"attention": "reference"}, "auto", CPU)[0],
    "indexed, ragged in the last block": build_operations({"attention": "reference"}, "auto", CPU, flat=True)[0],
    "fused": Fused("reference"),
}


def step(jepa, truncation="group", noised=False, keyed=False):
    """A forward and backward pass over clips of two lengths."""
    pairs = [masks(3, group=3 - number, truncation=truncation, frames=frames) for number, frames in enumerate(FRAMES)]
    context, target = zip(*pairs)
    unions = [target_union(sets, 8 * frames) for sets, frames in zip(target, FRAMES)]
    draws = None
    if noised:
        seed = noise_seed(0, CPU) if keyed else 0
        draws = [
            noise_draws(seed, range(4 * n, 4 * n + 3), sets, WIDTHS[1], CPU, keyed=keyed)
            for n, sets in enumerate(target)
        ]
    video = [clips(3, frames) for frames in FRAMES]
    out = jepa(video, context, target, draws, collect=True, union=unions)
    out.loss.backward()
    return out


def found(jepa, operations, **named):
    one = deepcopy(jepa)
    one.operations = operations
    return step(one, **named), gradients(one)


@pytest.mark.parametrize("truncation", ["group", "none"])
@pytest.mark.parametrize("style", ["v2", "interleaved"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_losses_and_gradients_are_those_of_the_public_codes_way(name, style, truncation):
    jepa = make("reference", widths=WIDTHS, rotary=style)
    expected = step(jepa, truncation)
    packed = make(widths=WIDTHS, rotary=style)
    out, got = found(packed, OPERATIONS[name], truncation=truncation)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=0)
    assert_same(got, gradients(jepa), rel=1e-9)
    other = make(widths=WIDTHS, rotary="v2" if style == "interleaved" else "interleaved")
    assert abs(found(other, OPERATIONS[name], truncation=truncation)[0].loss - expected.loss) > 1e-6


@pytest.mark.parametrize("keyed", [False, True], ids=["drawn before", "by key"])
def test_noised_targets_without_a_table_are_assembled_by_the_kernels(keyed):
    jepa = make(noised=True, widths=WIDTHS, rotary="v2")
    expected, theirs = found(jepa, LIBRARY, noised=True)
    out, ours = found(jepa, Fused("reference"), noised=True, keyed=keyed)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
    assert_same(ours, theirs, rel=1e-5)


class Angles(TorchDispatchMode):
    """Counts cosines of the library, and calls of the kernels by name."""

    def __init__(self):
        super().__init__()
        self.cosines, self.names = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.cosines += function._opname == "cos"
        if function.namespace == "fastjepa":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def test_angles_are_made_once_for_all_layers_and_not_at_all_for_the_kernels():
    counts = {}
    for depth in (2, 4):
        for name, operations in OPERATIONS.items():
            jepa = deeper(make(widths=WIDTHS, rotary="v2", operations=operations), depth)
            with Angles() as angles:
                step(jepa)
            counts[name, depth] = angles.cosines
            if name in ("indexed", "fused"):
                assert angles.cosines == 0
                assert "indexed_attention_reference" in angles.names
        with Angles() as angles:
            step(deeper(make("reference", widths=WIDTHS, rotary="v2"), depth))
        counts["public", depth] = angles.cosines
    # A table each for the rows of target encoder, encoder and predictor, and for those that their last blocks ask for.
    assert counts["library", 2] == counts["library", 4] == 5
    assert counts["dense calls", 4] == counts["ragged calls", 4] == 5
    assert counts["public", 4] == 2 * counts["public", 2] > 50
    assert {"assemble_tokens_reference", "patch_embed_gather_reference"} <= angles_of_fused()


def angles_of_fused():
    with Angles() as angles:
        step(make(widths=WIDTHS, rotary="v2", operations=Fused("reference")))
    return angles.names


def deeper(jepa, depth):
    """The same networks with their blocks several times."""
    for blocks in (jepa.encoder.blocks, jepa.target_encoder.blocks, jepa.predictor.predictor_blocks):
        blocks.extend(deepcopy(block) for block in list(blocks)[: depth - len(blocks)])
    return jepa

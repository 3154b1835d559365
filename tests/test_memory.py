"""What a step holds: against the published table, and the rules of each precision."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastjepa import memory
from fastjepa.gpus import GPUS
from fastjepa.memory import STATE, held_bytes, usable_memory
from fastjepa.models.layers import MLP, SwiGLU
from tests.published import published_shape
from tests.small_jepa import clips, make, masks


def held(recipe: str, **more) -> dict[str, float]:
    return held_bytes(published_shape(recipe, **more))


@pytest.mark.parametrize(("recipe", "packed", "reference"), [("L", 20, 29), ("H", 32, 44), ("H384", 40, 56)])
def test_totals_of_the_published_recipes(recipe, packed, reference):
    assert sum(held(recipe, kernels="triton").values()) / 1e9 == pytest.approx(packed, rel=0.15)
    assert sum(held(recipe, execution="reference").values()) / 1e9 == pytest.approx(reference, rel=0.15)


@pytest.mark.parametrize(
    ("recipe", "packed", "reference"), [("L", 13.1, 20.2), ("H", 17.5, 27.1), ("H384", 25.5, 39.2)]
)
def test_activations_of_the_published_recipes(recipe, packed, reference):
    assert held(recipe, kernels="triton")["activations"] / 1e9 == pytest.approx(packed, rel=0.05)
    assert held(recipe, execution="reference")["activations"] / 1e9 == pytest.approx(reference, rel=0.05)


def a_parameter(**more) -> list[float]:
    """Bytes a trained parameter, but for the target encoder a parameter of the encoder; frozen tables taken out."""
    shape = published_shape("L", **more)
    shape = replace(shape, encoder=replace(shape.encoder, frozen=0), predictor=replace(shape.predictor, frozen=0))
    trained = shape.encoder.trained + shape.predictor.trained
    *state, target = (held_bytes(shape)[name] for name in STATE)
    return [*(number / trained for number in state), target / shape.encoder.trained]


@pytest.mark.parametrize(
    ("way", "state"),
    [
        ({}, [4, 2, 2, 8, 6]),
        ({"parts": 2}, [4, 2, 6, 8, 6]),
        ({"execution": "reference"}, [4, 2, 4, 8, 4]),
        ({"execution": "reference", "parts": 2}, [4, 2, 4, 8, 4]),
        ({"dtype": "float16"}, [4, 2, 4, 8, 4]),
        ({"dtype": "float32"}, [4, 0, 4, 8, 4]),
        ({"dtype": "float32", "execution": "reference"}, [4, 0, 4, 8, 4]),
    ],
)
def test_state_bytes_of_a_parameter(way, state):
    """Weights, half-precision copies, gradients, moments; target encoder."""
    assert a_parameter(**way) == state


def test_position_tables_count_as_weights_alone():
    shape = published_shape("L")
    bare = replace(shape, encoder=replace(shape.encoder, frozen=0), predictor=replace(shape.predictor, frozen=0))
    tables = 1568 * (2 * 1024 + 384)
    assert sum(held_bytes(shape).values()) - sum(held_bytes(bare).values()) == 4 * tables


def test_activations_and_clips_follow_the_batch_and_state_does_not():
    shape = published_shape("L")
    once, twice = held_bytes(shape), held_bytes(replace(shape, batch=48))
    for name in ("activations", "input clips"):
        assert twice[name] == 2 * once[name]
    assert all(twice[name] == once[name] for name in STATE)


def test_this_batch_and_the_next_one_are_held_in_bytes_or_floats():
    shape = published_shape("L")
    values = 24 * 3 * 16 * 224 * 224
    assert held_bytes(shape)["input clips"] == 2 * values
    assert held_bytes(replace(shape, pixel_bytes=4))["input clips"] == 8 * values


def test_recomputed_blocks_keep_their_rows_alone():
    plain = published_shape("L", kernels="triton")
    kept = [held_bytes(replace(plain, recomputed=count))["activations"] for count in (0, 6, 12, 24)]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert kept[3] < 0.35 * kept[0]


def test_float32_and_unfused_kernels_keep_more():
    fused, library, whole = (
        held("L", **way)["activations"] for way in ({"kernels": "triton"}, {}, {"dtype": "float32"})
    )
    assert fused < 0.7 * library
    assert library < 0.7 * whole


def test_the_target_pass_counts_where_it_holds_more_than_what_is_kept():
    shape = published_shape("L")
    few = tuple(replace(s, context=1.0, target=1.0) for s in shape.sets)
    small = held_bytes(replace(shape, sets=few))["activations"]
    assert small == 24 * 1568 * 1024 * (4 + 2 + 4 * 4)


def test_a_gpu_gives_nine_tenths_and_a_computer_six_of_its_memory_or_of_its_container(monkeypatch, tmp_path):
    assert usable_memory(GPUS["h200"]) == 0.9 * 141e9
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "Path", lambda text: limit)
    whole = usable_memory(torch.device("cpu"))
    assert whole == pytest.approx(0.6 * memory.os.sysconf("SC_PAGE_SIZE") * memory.os.sysconf("SC_PHYS_PAGES"))
    limit.write_text("1000000\n")
    assert usable_memory(torch.device("cpu")) == 600_000
    limit.write_text("max\n")
    assert usable_memory(torch.device("cpu")) == whole
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 100_000))
    assert usable_memory(torch.device("cuda", 0)) == 90_000


@pytest.mark.parametrize("half", [True, False])
def test_a_gated_layer_keeps_two_more_tensors_of_its_width(half):
    kept = {}
    for name, layer in (("mlp", MLP(8, 24)), ("gated", SwiGLU(8, 24, wide_silu=False))):
        kept[name] = []
        note = saved_tensors_hooks(lambda x, found=kept[name]: found.append(x) or x, lambda x: x)
        with note, torch.autocast("cpu", torch.bfloat16, enabled=half):
            layer(torch.randn(5, 8))
        sizes = {x.untyped_storage().data_ptr(): x.nbytes for x in kept[name] if x.shape == (5, 24)}
        kept[name] = sum(sizes.values())
    size = 2 if half else 4
    assert kept["gated"] - kept["mlp"] == 2 * 5 * 24 * size
    plain = published_shape("L", dtype="bfloat16" if half else "float32")
    gated = replace(plain, encoder=replace(plain.encoder, gated=True))
    more = held_bytes(gated)["activations"] - held_bytes(plain)["activations"]
    assert more == pytest.approx(2 * size * 24 * plain.context * plain.encoder.depth * plain.encoder.hidden)


def kept_by_torch(**arguments) -> float:
    """Bytes that a step of a small JEPA in float64 keeps for its backward pass, weights and clips apart."""
    jepa, video, sets, found = make(**arguments), clips(4), masks(4), {}
    draws = None
    if arguments.get("noised"):
        draws = [(torch.zeros(4, dtype=torch.int64), torch.zeros(*t.shape, 12, dtype=torch.float64)) for t in sets[1]]
    apart = {x.untyped_storage().data_ptr() for x in (*jepa.parameters(), *jepa.buffers(), video)}

    def note(x):
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in apart:
            found[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with saved_tensors_hooks(note, lambda x: x):
        jepa(video, *sets, draws)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("noised", [False, True])
def test_levels_keep_their_features_and_a_hidden_layer_of_the_predictor(noised):
    """Beside what is compared, of which torch keeps a difference."""
    context, target = (sum(s.numel() for s in sets) for sets in masks(4))
    more = kept_by_torch(levels=(0, 1), noised=noised) - kept_by_torch(noised=noised) - target * 24 * 8
    per_value = more / ((context + noised * target) * 24 * 8)
    plain = replace(published_shape("L", dtype="float32"), noised=noised)
    deep = replace(plain, levels=2)
    modelled = held_bytes(deep)["activations"] - held_bytes(plain)["activations"]
    modelled -= 24 * 1024 * (20 * plain.target + 4 * plain.tokens)  # compared, and the features of the target encoder
    assert modelled / (24 * 1024 * 4 * (plain.context + noised * plain.target)) == pytest.approx(3)
    assert per_value == pytest.approx(3, rel=0.05)


def test_the_dense_loss_compares_context_tokens_of_every_level():
    deep = replace(published_shape("L"), levels=4)
    more = held_bytes(replace(deep, dense=True))["activations"] - held_bytes(deep)["activations"]
    assert more == pytest.approx(24 * deep.context * 4 * 1024 * 20)
    more = kept_by_torch(levels=(0, 1), dense=True, execution="reference")
    more -= kept_by_torch(levels=(0, 1), execution="reference")
    assert more > 2 * 24 * 8 * sum(s.numel() for s in masks(4)[0])

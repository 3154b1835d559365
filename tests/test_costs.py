"""FLOP and bytes of a step: against the counts of the published recipes, and against torch's own counter."""

from dataclasses import replace
from functools import cache
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastjepa.build import build_jepa, build_masks
from fastjepa.config import Data, Loss, Mask, MaskSet, Model, Optim, Runtime, Settings
from fastjepa.costs import COMPONENTS, StepShape, step_work
from fastjepa.plan import make_plan
from tests.published import RECIPES, published_shape

REFERENCE = {"execution": "reference"}
FUSED = {"kernels": "triton"}
# What the public code does beside: 28 bytes a parameter for its statistics.
STATISTICS_GB = {"L": 9.1, "H": 18.3}


@cache
def shape(recipe: str, execution: str = "packed", kernels: str = "auto") -> StepShape:
    return published_shape(recipe, execution=execution, kernels=kernels)


def flop(s: StepShape, *components: str) -> float:
    return sum(item.flop for item in step_work(s) if not components or item.component in components)


def moved(s: StepShape, *components: str) -> float:
    return sum(item.bytes for item in step_work(s) if not components or item.component in components)


# Against the published recipes


@pytest.mark.parametrize(
    ("recipe", "minimal", "reference"), [("L", 2516, 2550), ("H", 4644, 4687), ("H384", 19080, 19240)]
)
def test_flop_of_a_clip_are_those_of_the_published_recipes(recipe, minimal, reference):
    clips = RECIPES[recipe][2]
    assert flop(shape(recipe)) / clips / 1e9 == pytest.approx(minimal, rel=0.01)
    assert flop(shape(recipe, **REFERENCE)) / clips / 1e9 == pytest.approx(reference, rel=0.01)


AGAIN = 1000  # every block, as the second generation is published


@pytest.mark.parametrize(
    ("recipe", "minimal", "reference", "context", "predictor"),
    [("V2L", 3491, 4153, (1502, 1126), (523, 388)), ("V2g", 9655, 11251, (5019, 3764), (525, 391))],
)
def test_flop_of_the_second_generation(recipe, minimal, reference, context, predictor):
    published = replace(shape(recipe, **REFERENCE), recomputed=AGAIN)
    assert published.rotary
    for s, total, number in ((published, reference, 0), (shape(recipe), minimal, 1)):
        assert flop(s) / 24e9 == pytest.approx(total, rel=0.01)
        assert flop(s, "context linear") / 24e9 == pytest.approx(context[number], rel=0.01)
        assert flop(s, "predictor linear") / 24e9 == pytest.approx(predictor[number], rel=0.01)


@pytest.mark.parametrize(("recipe", "counted"), [("V2L", (800, 675, 259)), ("V2g", (1559, 1339, 510))])
def test_bytes_of_the_second_generation_are_those_of_the_census(recipe, counted):
    """As published, with nothing recomputed, and packed with kernels."""
    stored = shape(recipe, **REFERENCE)
    steps = replace(stored, recomputed=AGAIN), stored, shape(recipe, **FUSED)
    assert [moved(s) / 1e9 for s in steps] == pytest.approx(counted, rel=0.08)


def test_turning_queries_and_keys_costs_bytes_and_no_products():
    turned = shape("V2L")
    plain = replace(turned, rotary=False)
    assert flop(turned) == flop(plain)
    rows = 24 * 2048 * 1024 * 24
    # Counted by the census: 87.4 GB with a table of sines, 14.4 GB where the kernel turns what it reads.
    for more, gigabytes in (({}, 87.4), ({"fused": True}, 14.4)):
        one, other = (replace(s, **more) for s in (turned, plain))
        difference = moved(one, "target elementwise") - moved(other, "target elementwise")
        assert difference / 1e9 == pytest.approx(gigabytes, rel=0.02)
        assert difference < 80 * rows


@pytest.mark.parametrize(
    ("component", "minimal", "reference"),
    [
        ("patch embedding", 7.9, 24.7),
        ("target linear", 939, 947),
        ("target attention", 239, 242),
        ("context linear", 843, 843),
        ("context attention", 43.9, 43.9),
        ("predictor linear", 297, 301),
        ("predictor attention", 147, 149),
    ],
)
def test_flop_of_every_component_are_those_of_vit_l(component, minimal, reference):
    assert flop(shape("L"), component) / 24e9 == pytest.approx(minimal, rel=0.01)
    assert flop(shape("L", **REFERENCE), component) / 24e9 == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize(("recipe", "gigabytes"), [("L", 162), ("H", 245), ("H384", 322)])
def test_bytes_of_the_fused_packed_step(recipe, gigabytes):
    assert moved(shape(recipe, **FUSED)) / 1e9 == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize(
    ("component", "gigabytes"),
    [
        ("target elementwise", 14.7),
        ("context elementwise", 13.3),
        ("optimizer, EMA, casts", 12.8),
    ],
)
def test_bytes_of_components_of_the_fused_packed_step(component, gigabytes):
    assert moved(shape("L", **FUSED), component) / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "products", "attention"),
    [("L", (83.1, 85.5), 24.4), ("H", (123, 127), 35.1), ("H384", (166, 170), 48.4)],
)
def test_bytes_of_products_and_of_attention(recipe, products, attention):
    parts = ("target", "context", "predictor")
    for way, gigabytes in zip((FUSED, REFERENCE), products):
        s = shape(recipe, **way)
        assert moved(s, *(f"{part} linear" for part in parts)) / 1e9 == pytest.approx(gigabytes, rel=0.02)
        assert moved(s, *(f"{part} attention" for part in parts)) / 1e9 == pytest.approx(attention, rel=0.02)


@pytest.mark.parametrize(("recipe", "counted", "with_statistics"), [("L", 358, 394), ("H", 541, 604)])
def test_bytes_of_the_reference_step(recipe, counted, with_statistics):
    """Counted at the dispatcher without statistics; modelled with them."""
    gigabytes = moved(shape(recipe, **REFERENCE)) / 1e9
    assert gigabytes == pytest.approx(counted, rel=0.1)
    assert gigabytes + STATISTICS_GB[recipe] == pytest.approx(with_statistics, rel=0.1)


@pytest.mark.parametrize(("part", "gigabytes"), [("target", 62.9), ("context", 73.1), ("predictor", 72.9)])
def test_bytes_of_unfused_elementwise_work(part, gigabytes):
    assert moved(shape("L", **REFERENCE), f"{part} elementwise") / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize(("part", "gigabytes"), [("target", 29.6), ("context", 28.7), ("predictor", 27.1)])
def test_bytes_of_compiled_elementwise_work(part, gigabytes):
    """What the predictor reads is put together outside its blocks, uncompiled."""
    s = replace(shape("L", **REFERENCE), compiled=True)
    assert moved(s, f"{part} elementwise") / 1e9 == pytest.approx(gigabytes, rel=0.1)


def test_a_recomputed_block_runs_forward_once_more():
    plain = shape("L", **FUSED)
    for part, net in (("context", plain.encoder), ("predictor", plain.predictor)):
        name = f"{part} linear"
        again = [flop(replace(plain, recomputed=count), name) - flop(plain, name) for count in (1, 3, 99)]
        assert again[1] == pytest.approx(3 * again[0])
        assert again[2] == pytest.approx((net.depth - (part == "predictor")) * again[0])
        whole = flop(plain, name) / net.depth / 3
        assert again[0] == pytest.approx(whole, rel=0.1)


def test_the_packed_step_of_torchs_own_functions_lies_between():
    fused, library, reference = (moved(shape("L", **way)) for way in (FUSED, {}, REFERENCE))
    assert fused < 0.7 * library
    assert library < 0.95 * reference


# Against torch's counter

DEEP = {"levels": "deep", "context": 0.5}
GATED = {"mlp": "swiglu", "predictor_mlp": "swiglu_full", "positions": "rope_v2"}


def small(
    targets: str = "mask_tokens",
    truncation: str = "group",
    execution: str = "packed",
    context: float = 0.0,
    **model: str,
) -> Settings:
    return Settings(
        loss=Loss(context=context),
        model=Model(name="vit_nano", predictor_depth=3, predictor_dim=48, targets=targets, **model),
        mask=Mask(
            sets=(MaskSet(num_blocks=1, spatial_scale=(0.3, 0.3)), MaskSet(num_blocks=2, spatial_scale=(0.5, 0.5))),
            group=4,
            truncation=truncation,
        ),
        data=Data(frames=4, crop=64, patch=8, batch_size=4),
        optim=Optim(global_batch=4, dtype="float32", steps=10, warmup_steps=1),
        runtime=Runtime(execution=execution),
    )


@pytest.mark.parametrize("execution", ["packed", "reference"])
@pytest.mark.parametrize("targets", ["mask_tokens", "noised"])
@pytest.mark.parametrize("truncation", ["group", "none"])
@pytest.mark.parametrize("gated", [{}, GATED, DEEP, DEEP | GATED], ids=["", "gated", "deep", "deep, gated"])
def test_products_and_attention_are_what_torch_counts_in_a_real_step(execution, targets, truncation, gated):
    s = small(targets, truncation, execution, **gated)
    jepa, masks = build_jepa(s), build_masks(s)
    drawn = masks.draw(0, range(4))
    plan = make_plan(s, jepa, type("One", (), {"draw": staticmethod(lambda step, slots: drawn)}), 1e12)
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * prod(q) * k[2],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: 8 * prod(q) * k[2],
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        jepa(torch.randn(4, 3, 4, 64, 64), *drawn).loss.backward()
    assert attention.keys() <= counter.get_flop_counts()["Global"].keys()
    # The last target block may be computed whole, more than is needed.
    modelled = [flop(plan.shape), flop(replace(plan.shape, union=plan.tokens))]
    assert any(counter.get_total_flops() == pytest.approx(work, rel=1e-9) for work in modelled)


# Properties


def test_every_item_belongs_to_a_named_component():
    for way in (FUSED, {}, REFERENCE):
        assert {item.component for item in step_work(shape("L", **way))} == set(COMPONENTS)


def test_accumulation_repeats_all_but_the_update():
    """With gradients added up, which are read again by the update in float32."""
    once, twice = shape("L"), replace(shape("L"), parts=2)
    assert flop(twice) == 2 * flop(once)
    blocks = COMPONENTS[:-1]
    assert moved(twice, *blocks) == 2 * moved(once, *blocks)
    trained = once.encoder.trained + once.predictor.trained
    update, more = moved(once, COMPONENTS[-1]), moved(twice, COMPONENTS[-1])
    assert update < more < 2 * update + 20 * trained
    assert more - update == pytest.approx(trained * (20 + 2 * 2 + 4), rel=1e-6)  # added; norm, AdamW; clipping


def test_noised_targets_cost_one_more_projection_and_the_gradient_of_its_weight():
    plain = shape("L")
    noised = replace(plain, noised=True)
    assert flop(noised) - flop(plain) == pytest.approx(2 * 2 * 24 * plain.target * 1024 * 384)
    assert moved(noised) > moved(plain)


def test_float32_moves_twice_the_bytes_in_products_and_casts_nothing():
    half, whole = shape("L"), replace(shape("L"), value_bytes=4, masters=False)
    assert moved(whole, "context linear") == 2 * moved(half, "context linear")
    assert flop(whole) == flop(half)
    cast = replace(whole, value_bytes=2)
    assert cast.autocast
    assert not half.autocast
    assert not whole.autocast
    trained, encoder = half.encoder.trained + half.predictor.trained, half.encoder.trained
    assert moved(cast, COMPONENTS[-1]) - moved(whole, COMPONENTS[-1]) == pytest.approx(12 * trained + 6 * encoder)


def test_fused_kernels_move_fewer_bytes_in_every_precision():
    for size in (2, 4):
        for part in ("target", "context", "predictor"):
            library = replace(shape("L"), value_bytes=size, masters=False)
            name = f"{part} elementwise"
            assert moved(replace(library, fused=True), name) < 0.6 * moved(library, name)


def test_clips_that_keep_their_own_lengths_cost_attention_calls_without_fused_kernels():
    def launches(s: StepShape) -> float:
        return sum(item.launches for item in step_work(s))

    one, ragged = shape("L"), replace(shape("L"), runs=24)
    assert launches(ragged) > launches(one) + 23 * 2 * 24 * 3
    assert launches(replace(ragged, fused=True)) == launches(replace(one, fused=True))
    whole = shape("L", **REFERENCE)
    assert launches(replace(whole, runs=24)) > 10 * launches(whole)
    assert flop(replace(whole, runs=24)) == pytest.approx(flop(whole))


def test_clips_of_floats_are_read_at_four_bytes_a_value():
    bytes_, floats = shape("L"), replace(shape("L"), pixel_bytes=4)
    assert moved(floats) - moved(bytes_) == 3 * 24 * 16 * 3 * 224 * 224

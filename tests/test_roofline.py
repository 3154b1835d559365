"""Times of a step: against the published model of an H200, and how they follow the GPU."""

from dataclasses import replace
from functools import cache

import pytest

from fastjepa.costs import COMPONENTS, Attention, Pass, Product, step_work
from fastjepa.gpus import GPUS
from fastjepa.roofline import (
    WAITING,
    component_costs,
    expected_seconds,
    floor_seconds,
    product_seconds,
    total,
)
from tests.published import RECIPES, published_shape

H200 = GPUS["h200"]


@cache
def costs(recipe: str, execution: str = "packed", kernels: str = "auto"):
    return component_costs(step_work(published_shape(recipe, execution=execution, kernels=kernels)), H200)


def clips_a_second(recipe: str, seconds: float) -> float:
    return RECIPES[recipe][2] / seconds


@pytest.mark.parametrize(("recipe", "floor", "expected"), [("L", 261, 182), ("H", 146, 106), ("H384", 36, 23.4)])
def test_clips_a_second_of_the_fused_packed_step(recipe, floor, expected):
    whole = total(costs(recipe, kernels="triton"))
    assert clips_a_second(recipe, whole.floor) == pytest.approx(floor, rel=0.1)
    assert clips_a_second(recipe, whole.expected) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("recipe", "floor", "expected", "shipped"), [("V2L", 191, 132, 52), ("V2g", 72, 55, 26)])
def test_clips_a_second_of_the_second_generation(recipe, floor, expected, shipped):
    """Packed with kernels, and as published with every block recomputed."""
    whole = total(costs(recipe, kernels="triton"))
    assert clips_a_second(recipe, whole.floor) == pytest.approx(floor, rel=0.1)
    assert clips_a_second(recipe, whole.expected) == pytest.approx(expected, rel=0.15)
    public = replace(published_shape(recipe, execution="reference"), recomputed=1000)
    seconds = total(component_costs(step_work(public), H200)).expected
    assert clips_a_second(recipe, seconds) == pytest.approx(shipped, rel=0.15)


# The public code's statistics and its float upload, in ms, are in its figures and no part of our reference.
@pytest.mark.parametrize(
    ("recipe", "shipped", "beside", "bare"),
    [("L", 91, 30.47 + 4.62, 182 / 1.77), ("H", 58, 39.03 + 4.62, 106 / 1.63)],
)
def test_clips_a_second_of_the_reference_step(recipe, shipped, beside, bare):
    seconds = total(costs(recipe, execution="reference")).expected
    assert clips_a_second(recipe, seconds) == pytest.approx(bare, rel=0.15)
    assert clips_a_second(recipe, seconds + beside / 1e3) == pytest.approx(shipped, rel=0.15)


@pytest.mark.parametrize(
    ("part", "linear", "attention", "elementwise"),
    [("target", 34.3, 13.4, 4.0), ("context", 31.1, 4.0, 3.6), ("predictor", 11.9, 21.0, 4.5)],
)
def test_milliseconds_of_the_parts_of_vit_l(part, linear, attention, elementwise):
    """The predictor's elementwise work includes a float32 residual, 1.1 ms above the published minimum."""
    table = costs("L", kernels="triton")
    for kind, milliseconds in (("linear", linear), ("attention", attention), ("elementwise", elementwise)):
        assert table[f"{part} {kind}"].expected * 1e3 == pytest.approx(milliseconds, rel=0.07), kind


def test_milliseconds_of_the_reference_parts_of_vit_l():
    table = costs("L", execution="reference")
    published = {"target linear": 34.6, "predictor attention": 31.8, "target attention": 20.1, "context linear": 33.9}
    for name, milliseconds in published.items():
        assert table[name].expected * 1e3 == pytest.approx(milliseconds, rel=0.05), name
    assert table[WAITING].expected * 1e3 == pytest.approx(11.9, rel=0.2)


@pytest.mark.parametrize("name", GPUS)
def test_nothing_is_expected_to_pass_the_floor(name):
    for way in ({"kernels": "triton"}, {"execution": "reference"}):
        for item in step_work(published_shape("L", **way)):
            assert expected_seconds(item, GPUS[name]) >= 0.999 * floor_seconds(item, GPUS[name]), item


def test_rows_add_up_to_the_total_in_the_order_of_the_components():
    table = costs("L")
    assert list(table) == [*COMPONENTS, WAITING]
    whole = total(table)
    for figure in ("flop", "bytes", "floor", "expected"):
        assert getattr(whole, figure) == pytest.approx(sum(getattr(cost, figure) for cost in table.values()))


def test_a_large_product_runs_at_the_sustained_ceiling_and_a_small_one_in_one_wave():
    seconds = product_seconds(H200, 16384, 16384, 16384, 2)
    assert 2 * 16384**3 / seconds == pytest.approx(0.9 * 790e12, rel=0.05)
    # A tile more than fills the SMs is another wave; fewer tiles are no faster than one.
    assert product_seconds(H200, 64, 64, 4096, 2) == product_seconds(H200, 32, 32, 4096, 2)
    assert product_seconds(H200, 128 * 132 * 4, 256, 1024, 2) < product_seconds(H200, 128 * 132 * 4 + 1, 256, 1024, 2)
    assert product_seconds(H200, 0, 256, 1024, 2) == 0


def test_a_thin_product_takes_the_time_of_its_bytes():
    m, n, k = 1_000_000, 128, 128
    assert product_seconds(H200, m, n, k, 2) == pytest.approx(2 * (m * k + k * n + m * n) / (0.92 * 4.3e12))


def test_float32_products_run_at_the_float32_peak():
    half, whole = (Product("context linear", 4096, 4096, 4096, size) for size in (2, 4))
    assert floor_seconds(half, H200) == pytest.approx(2 * 4096**3 / 790e12)
    assert floor_seconds(whole, H200) == pytest.approx(2 * 4096**3 / (0.8 * 67e12))


def attention(head_size: int, **more) -> Attention:
    given = {"backward": False, "fused": False, "calls": 1, "value_bytes": 2, **more}
    return Attention("target attention", 24 * 4000.0**2, 24 * 4000.0, 16, head_size, **given)


def test_attention_rates_are_the_known_ones_and_lie_on_lines_between():
    def rate(size: int, **more) -> float:
        item = attention(size, **more)
        return item.flop / expected_seconds(item, H200) / 1e12 / (4000 / 4150 * 1.09)

    assert rate(64) == pytest.approx(290)
    assert rate(64, backward=True) == pytest.approx(215)
    assert rate(64, fused=True) == pytest.approx(430)
    assert rate(48) == pytest.approx(245)
    assert rate(80) == pytest.approx(265)
    assert rate(128) == pytest.approx(265)
    assert rate(16) == pytest.approx(150)
    assert rate(64, value_bytes=4) < 0.5 * 67


def test_the_floor_of_large_heads_is_that_of_their_products_with_scores_computed_again_on_the_way_back():
    pairs = 24 * 4000.0**2 * 16 * 64
    assert floor_seconds(attention(64), H200) == pytest.approx(4 * pairs / 790e12)
    assert floor_seconds(attention(64, backward=True), H200) == pytest.approx(10 * pairs / 790e12)


def test_small_heads_are_bound_by_exponentials():
    item = attention(24)
    exponentials = 24 * 4000.0**2 * 16 / (16 * 132 * 1.98e9)
    assert floor_seconds(item, H200) == pytest.approx(exponentials)
    # However fast the products become.
    fast = replace(H200, measured_product=100 * 790e12)
    assert expected_seconds(item, fast) == pytest.approx(exponentials / 0.85)


def test_the_host_is_the_limit_where_kernels_are_short():
    """Copies of a kilobyte wait for the host; copies of a gigabyte leave gaps only."""
    short, long = ([Pass("loss", size, 1, 1000)] for size in (1e3, 1e9))
    assert total(component_costs(short, H200)).expected == pytest.approx(1000 * 8.5e-6)
    assert component_costs(long, H200)[WAITING].expected == pytest.approx(1000 * 2e-6)


def test_a_gpu_of_twice_the_ceilings_is_nearly_twice_as_fast():
    work = step_work(published_shape("L", kernels="triton"))
    double = replace(H200, measured_product=2 * 790e12, measured_copy=2 * 4.3e12, clock=2 * 1.98e9)
    ratio = total(component_costs(work, H200)).floor / total(component_costs(work, double)).floor
    assert ratio == pytest.approx(2)
    assert 1.9 < total(component_costs(work, H200)).expected / total(component_costs(work, double)).expected < 2

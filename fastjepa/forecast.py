"""What a run takes on one GPU, in lines for a person: work and time by component, memory by category, days."""

from fastjepa.config import Settings
from fastjepa.costs import StepShape
from fastjepa.gpus import GPU
from fastjepa.memory import GPU_SHARE, usable_memory
from fastjepa.plan import Plan, batch_sizes, largest_fitting
from fastjepa.roofline import Cost, component_costs, total


def forecast(s: Settings, plan: Plan, gpu: GPU) -> list[str]:
    """The tables and figures of `python -m fastjepa plan`; where the run does not fit, its last line says so."""
    costs = component_costs(plan.work, gpu)
    whole = total(costs)
    return [
        "",
        f"One step: {s.optim.global_batch} clips = {plan.batch_size} x {plan.accumulation}, {_kernels(s, plan.shape)}. "
        "Figures of a model, not measurements: times may be 15 % off, more for small networks and where ceilings are "
        "assumed.",
        f"{'component':<24}{'TFLOP':>10}{'GB':>10}{'floor ms':>12}{'expected ms':>13}{'share':>7}",
        *(_row(name, cost, whole) for name, cost in costs.items()),
        _row("total", whole, whole),
        "",
        f"{'memory':<24}{'GB':>10}",
        *(f"{name:<24}{_number(held / 1e9):>10}" for name, held in plan.held.items()),
        f"{'total':<24}{_number(sum(plan.held.values()) / 1e9):>10}  of {gpu.memory / 1e9:.0f}",
        "",
        *_speed(s, plan, gpu, whole),
        *_fit(s, plan, gpu),
    ]


def expected_rate(s: Settings, plan: Plan, gpu: GPU) -> float:
    """Clips/s that a run is expected to reach if the data keeps up."""
    return s.optim.global_batch / total(component_costs(plan.work, gpu)).expected


def heading(gpu: GPU, reason: str) -> str:
    """Which GPU the figures are for, and what they rest on."""
    measured = "measured" if gpu.measured_product and gpu.measured_copy else "assumed"
    reached = f"{gpu.product(2) / 1e12:.0f} and {gpu.copy / 1e12:.2g}"
    return (
        f"for        one {gpu.name} ({reason}): {gpu.memory / 1e9:.0f} GB; data sheet {gpu.bf16 / 1e12:.0f} TFLOP/s in "
        f"bf16 and {gpu.bandwidth / 1e12:.3g} TB/s, {measured} to reach {reached}"
    )


def _kernels(s: Settings, shape: StepShape) -> str:
    own = "torch's own functions" + (", compiled" if shape.compiled else "")
    kind = "fused kernels" if shape.fused else own
    most = min(shape.recomputed, shape.encoder.depth)
    again = f", {most} blocks recomputed" if most else ""
    return f"{s.optim.dtype}, {s.runtime.execution} execution, {kind}{again}"


def _row(name: str, cost: Cost, whole: Cost) -> str:
    return (
        f"{name:<24}{_number(cost.flop / 1e12):>10}{_number(cost.bytes / 1e9):>10}{_number(cost.floor * 1e3):>12}"
        f"{_number(cost.expected * 1e3):>13}{cost.expected / whole.expected:>7.0%}"
    )


def _number(value: float) -> str:
    """Three digits and no exponent; a dash for nothing."""
    if value == 0:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" if value >= 1e-3 else "<0.001"


def _speed(s: Settings, plan: Plan, gpu: GPU, whole: Cost) -> list[str]:
    clips, peak = s.optim.global_batch, gpu.bf16 / 1e12
    mfu = plan.flop_per_clip * clips / whole.expected / gpu.bf16
    return [
        f"speed      {_clips_a_second(clips / whole.expected)} expected, MFU {mfu:.1%} of {peak:.0f} TFLOP/s; "
        f"floor {_clips_a_second(clips / whole.floor)}",
        f"time       {_span(whole.expected)} a step; {s.optim.steps} steps of {clips} clips: "
        f"{_span(whole.expected * s.optim.steps)} on one GPU (floor {_span(whole.floor * s.optim.steps)}), "
        "if the data keeps up",
    ]


def _clips_a_second(rate: float) -> str:
    return f"{rate:,.0f} clips/s" if rate >= 100 else f"{rate:.3g} clips/s"


def _span(seconds: float) -> str:
    """A duration in the unit that a person would take."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def _fit(s: Settings, plan: Plan, gpu: GPU) -> list[str]:
    """One sentence where the batch in force needs more than the GPU gives."""
    needed, usable = sum(plan.held.values()), usable_memory(gpu)
    if needed <= usable:
        return []
    problem = (
        f"DOES NOT FIT: data.batch_size {plan.batch_size} needs {_number(needed / 1e9)} GB by the model, one "
        f"{gpu.name} gives {_number(usable / 1e9)} GB ({GPU_SHARE:.0%} of its {gpu.memory / 1e9:.0f}); "
    )
    largest = largest_fitting(s, plan.shape, usable, batch_sizes(s))
    if largest is None:
        return ["", f"{problem}no batch does, the smallest possible one is {batch_sizes(s)[0]}"]
    videos = f" in videos of {s.data.clips_per_video} clips" if s.data.clips_per_video > 1 else ""
    way = f"the largest divisor of optim.global_batch {s.optim.global_batch}{videos} that fits is {largest}"
    return ["", f"{problem}{way}: data.batch_size={largest}"]

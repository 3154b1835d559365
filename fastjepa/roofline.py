"""How long the items of a step take on a GPU: a floor that nothing passes, and what good kernels can be expected to do.

A model, not a measurement: about 15 % either way at the sizes of ViT-L and ViT-H on an H200.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, inf

from fastjepa.costs import COMPONENTS, Attention, Product, Work
from fastjepa.gpus import GPU

# Shares of the copy bandwidth that elementwise kernels and products bound by memory reach; attention like the former.
STREAMED, STREAMED_BY_PRODUCTS = 0.85, 0.92
SUSTAINED = 0.88  # of the product ceiling over minutes: clocks under load, and what a library picks
GAP = 2e-6  # seconds in which the GPU waits from one kernel to the next
HOST = 8.5e-6  # seconds in which the host prepares one kernel, hidden as long as the GPU is slower
WAITING = "waiting for launches"

# Tiles (rows, columns, share of the ceiling) that libraries cut products into; the small ones are for small products.
TILES = (
    (128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.96), (128, 128, 0.86), (64, 256, 0.80), (64, 128, 0.68),
    (64, 64, 0.50), (32, 32, 0.20),
)  # fmt: skip

# TFLOP/s of long attention on an H200 by head size, forward and backward. `False`: torch's default kernels, 64 and 80
# as published (PyTorch issue 142132, flash-attention issue 1777), 24 and 32 split into product and softmax parts.
# `True`: what kernels written for the head size should reach; ours have not been measured.
ATTENTION: dict[bool, dict[int, tuple[float, float]]] = {
    False: {24: (150, 105), 32: (200, 140), 64: (290, 215), 80: (265, 190)},
    True: {24: (210, 160), 32: (260, 195), 64: (430, 330), 80: (400, 305)},
}
ATTENTION_MEASURED_AT = 790e12  # bf16 product ceiling of that GPU: rates on others scale with theirs


@dataclass
class Cost:
    """FLOP, bytes and seconds of one component of a step."""

    flop: float = 0.0
    bytes: float = 0.0
    floor: float = 0.0
    expected: float = 0.0

    def add(self, other: "Cost") -> None:
        """Sum up in place."""
        self.flop += other.flop
        self.bytes += other.bytes
        self.floor += other.floor
        self.expected += other.expected


def component_costs(work: Iterable[Work], gpu: GPU) -> dict[str, Cost]:
    """The cost of a step by component, in the order of `COMPONENTS`; last what the GPU waits for launches."""
    costs = {name: Cost() for name in (*COMPONENTS, WAITING)}
    launches = 0.0
    for item in work:
        costs[item.component].add(Cost(item.flop, item.bytes, floor_seconds(item, gpu), expected_seconds(item, gpu)))
        launches += item.launches
    busy = sum(cost.expected for cost in costs.values())
    costs[WAITING].expected = max(launches * GAP, launches * HOST - busy)
    return costs


def total(costs: dict[str, Cost]) -> Cost:
    """All components together."""
    whole = Cost()
    for cost in costs.values():
        whole.add(cost)
    return whole


def floor_seconds(item: Work, gpu: GPU) -> float:
    """The slowest of products, bytes and exponentials, everything else hidden behind it."""
    bound = item.bytes / gpu.copy
    if isinstance(item, Product):
        return max(bound, item.flop / gpu.product(item.value_bytes))
    if isinstance(item, Attention):
        executed = item.flop * (1.25 if item.backward else 1.0)  # scores are computed again
        return max(bound, executed / gpu.product(item.value_bytes), _exponential_seconds(item, gpu))
    return bound


def expected_seconds(item: Work, gpu: GPU) -> float:
    """What good kernels can be expected to take."""
    if isinstance(item, Product):
        return item.count * item.slowdown * product_seconds(gpu, item.m, item.n, item.k, item.value_bytes)
    bound = item.bytes / (gpu.copy * STREAMED)
    if isinstance(item, Attention):
        return max(bound, item.flop / _attention_rate(item, gpu), _exponential_seconds(item, gpu) / STREAMED)
    return bound


def product_seconds(gpu: GPU, m: float, n: float, k: float, value_bytes: int) -> float:
    """One product [m, k] x [k, n]: the best tile in whole waves over the SMs, never under the time of its bytes.

    `k` may be split over several tiles where it is long; each costs a fixed start of its inner loop.
    """
    if min(m, n, k) < 1:
        return 0.0
    rate = gpu.product(value_bytes) * 1.045 / gpu.sms
    best = inf
    for rows, columns, share in TILES:
        tiles = ceil(m / rows) * ceil(n / columns)
        for splits in (1, 2, 3, 4, 6, 8, 12, 16):
            if splits > 1 and k / splits < 1024:
                break
            waves = ceil(tiles * splits / gpu.sms)
            best = min(best, waves * 2 * rows * columns * (k / splits + 128) / (rate * share))
    moved = value_bytes * (m * k + k * n + m * n)
    return max(best / SUSTAINED, moved / (gpu.copy * STREAMED_BY_PRODUCTS))


def _exponential_seconds(item: Attention, gpu: GPU) -> float:
    """One exponential for each query-key pair and head: what binds small heads, however fast products are."""
    return item.count * item.pairs * item.heads / gpu.exponentials


def _attention_rate(item: Attention, gpu: GPU) -> float:
    """FLOP/s: by head size, between the known ones on a line, beyond them as at the end; short sequences are slower."""
    known = ATTENTION[item.fused]
    sizes, side = sorted(known), int(item.backward)
    size = min(max(item.head_size, sizes[0]), sizes[-1])
    upper = next(s for s in sizes if s >= size)
    lower = max(s for s in sizes if s <= size)
    part = (size - lower) / (upper - lower) if upper > lower else 0.0
    rate = (known[lower][side] * (1 - part) + known[upper][side] * part) * 1e12
    rate *= gpu.product(2) / ATTENTION_MEASURED_AT
    length = item.pairs / item.rows if item.rows else 1.0
    rate *= length / (length + 150.0) * 1.09
    return rate if item.value_bytes == 2 else min(rate, 0.5 * gpu.product(4))

"""What one optimizer step does on one device, item by item: matrix products, attention, passes over memory.

Only shapes and the way of execution count here; how long it takes is `fastjepa.roofline`'s business. B clips a forward
pass, N tokens, K kept tokens, E encoder width, P predictor width, r MLP ratio. A multiply-add counts 2 FLOP; attention
4 N N E forward and 8 backward. Bytes are what the items read and write where nothing stays in a cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

PARTS = ("target", "context", "predictor")
COMPONENTS = (
    "patch embedding",
    *(f"{part} {kind}" for part in PARTS for kind in ("linear", "attention", "elementwise")),
    "loss",
    "optimizer, EMA, casts",
)


@dataclass(frozen=True)
class Network:
    """One transformer: widths, depth, and its trained and frozen parameters.

    A `gated` feed-forward layer has two products of `hidden` channels before its last.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    trained: int
    frozen: int
    gated: bool = False


@dataclass(frozen=True)
class SetTokens:
    """Mean tokens a clip of one mask set, and the mean products that attention needs."""

    context: float
    target: float
    context_squared: float
    sequence_squared: float
    target_sequence: float


@dataclass(frozen=True)
class StepShape:
    """Everything that the cost of a step depends on.

    `batch` clips a forward pass, `parts` of them accumulated; `runs` stretches of clips with equally many tokens in a
    pass; `union` the tokens that are a target of some set. `packed` against the public code's way; `fused` kernels
    against torch's own functions, which may be `compiled`; `masters`: bf16 weights beside float32 masters, against
    float32 under autocast. `rotary` attention turns queries and keys. The first `recomputed` blocks of a network run
    forward twice. `levels` of the encoder are predicted, with `dense` at context tokens too. Of `processes` each does
    this with its own clips, and holds one of the `shards` of every weight.
    """

    encoder: Network
    predictor: Network
    tokens: int
    patch_values: int
    sets: tuple[SetTokens, ...]
    union: float
    batch: int
    parts: int
    runs: int
    packed: bool
    fused: bool
    compiled: bool
    recomputed: int
    value_bytes: int
    pixel_bytes: int
    masters: bool
    loss_scaled: bool
    noised: bool
    clipped: bool
    regularised: bool
    rotary: bool = False
    levels: int = 1
    dense: bool = False
    processes: int = 1
    shards: int = 1

    @property
    def autocast(self) -> bool:
        """Whether float32 weights are cast for every forward pass."""
        return self.value_bytes == 2 and not self.masters

    @property
    def context(self) -> float:
        """Context tokens a clip, of all sets."""
        return sum(s.context for s in self.sets)

    @property
    def target(self) -> float:
        """Target tokens a clip, of all sets."""
        return sum(s.target for s in self.sets)


@dataclass(frozen=True)
class Product:
    """[m, k] x [k, n]; `slowdown` against a plain product of these sizes."""

    component: str
    m: float
    n: float
    k: float
    value_bytes: int
    count: float = 1.0
    slowdown: float = 1.0

    @property
    def flop(self) -> float:
        """FLOP of all of them."""
        return self.count * 2.0 * self.m * self.n * self.k

    @property
    def bytes(self) -> float:
        """Bytes of all of them: both operands and the result."""
        return self.count * self.value_bytes * (self.m * self.k + self.k * self.n + self.m * self.n)

    @property
    def launches(self) -> float:
        """Kernels of all of them."""
        return self.count


@dataclass(frozen=True)
class Attention:
    """Softmax attention: `pairs` query-key pairs a head, over `rows` rows of `heads` times `head_size` channels."""

    component: str
    pairs: float
    rows: float
    heads: int
    head_size: int
    backward: bool
    fused: bool
    calls: int
    value_bytes: int
    count: float = 1.0

    @property
    def flop(self) -> float:
        """FLOP of all layers."""
        return self.count * (8.0 if self.backward else 4.0) * self.pairs * self.heads * self.head_size

    @property
    def bytes(self) -> float:
        """Bytes of all layers: q, k, v and the result; backward their gradients too."""
        return (
            self.count * (12.0 if self.backward else 4.0) * self.value_bytes * self.rows * self.heads * self.head_size
        )

    @property
    def launches(self) -> float:
        """Kernels of all layers."""
        return self.count * self.calls * (2 if self.backward else 1)


@dataclass(frozen=True)
class Pass:
    """Reading and writing without a product worth counting, in some kernels."""

    component: str
    moved: float
    kernels: float = 1.0
    count: float = 1.0
    flop: float = 0.0

    @property
    def bytes(self) -> float:
        """Bytes of all of them."""
        return self.count * self.moved

    @property
    def launches(self) -> float:
        """Kernels of all of them."""
        return self.count * self.kernels


Work = Product | Attention | Pass


def step_work(s: StepShape) -> list[Work]:
    """All items of one optimizer step: `s.parts` forward and backward passes, then the update."""
    once = [*_patches(s), *_target(s), *_context(s), *_predictor(s), *_loss(s), *_casts(s)]
    return [*(replace(item, count=item.count * s.parts) for item in once), *_update(s)]


def _patches(s: StepShape) -> Iterator[Work]:
    """From pixels to embedded tokens: every token for the target encoder, kept ones for the context."""
    name, width, values, size = COMPONENTS[0], s.encoder.width, s.patch_values, s.value_bytes
    every, kept = s.batch * s.tokens, s.batch * s.context
    pixels = every * values
    if s.packed:
        yield Pass(name, pixels * (s.pixel_bytes + size) + kept * (values * 2 * size + width * size), 3)
        yield Product(name, every, width, values, size)
        yield Product(name, kept, width, values, size)
        yield Product(name, width, values, kept, size)
        return
    # A 3-d convolution of the whole clip in every pass; cuDNN takes four times the time of the product.
    passes = 1 + len(s.sets)
    yield Pass(name, pixels * (s.pixel_bytes + 4), 2)
    yield Pass(name, pixels * (4 + size) + every * width * 3 * size, 2, passes)
    yield Product(name, every, width, values, size, passes, slowdown=4)
    yield Pass(name, kept * width * 17 * size + len(s.sets) * every * width * 2 * size, 5 * len(s.sets))
    yield Product(name, width, values, every, size, len(s.sets), slowdown=4)


def _target(s: StepShape) -> Iterator[Work]:
    rows, n = float(s.batch * s.tokens), s.tokens
    if s.packed:  # the last block computes what some mask set asks for
        yield from _blocks(s, "target", rows, rows * n, s.encoder.depth - 1, training=False)
        union = s.batch * s.union
        yield from _blocks(s, "target", rows, rows * n, 1, training=False, queries=union, query_pairs=union * n)
    else:
        yield from _blocks(s, "target", rows, rows * n, s.encoder.depth, training=False)


def _context(s: StepShape) -> Iterator[Work]:
    pairs = [s.batch * t.context_squared for t in s.sets]
    rows = [s.batch * t.context for t in s.sets]
    yield from _packed_or_apart(s, "context", rows, pairs, s.encoder.depth)
    yield Pass("context elementwise", sum(rows) * s.encoder.width * (6 if s.fused else 30) * s.value_bytes, 6)


def _predictor(s: StepShape) -> Iterator[Work]:
    narrow, wide, size = s.predictor.width, s.encoder.width, s.value_bytes
    contexts, targets = [s.batch * t.context for t in s.sets], [s.batch * t.target for t in s.sets]
    pairs = [s.batch * t.sequence_squared for t in s.sets]
    sequences = [c + t for c, t in zip(contexts, targets)]
    for context, target in [(sum(contexts), sum(targets))] if s.packed else zip(contexts, targets):
        embeds = [(context, narrow, wide)]
        if s.levels > 1:  # by way of the encoder's width
            embeds.append((context, wide, s.levels * wide))
        for m, n, k in (*embeds, (target + (context if s.dense else 0), s.levels * wide, narrow)):
            yield from _with_gradients("predictor linear", m, n, k, size)
        if s.noised:  # target features are projected too; nothing flows back into them
            for _, n, k in embeds:
                yield Product("predictor linear", target, n, k, size)
                yield Product("predictor linear", n, k, target, size)
            if s.levels > 1:  # but into what lies between both products
                yield Product("predictor linear", target, wide, narrow, size)
    if s.packed and not s.dense:
        yield from _packed_or_apart(s, "predictor", sequences, pairs, s.predictor.depth - 1)
        asked, rows = s.batch * sum(t.target_sequence for t in s.sets), sum(sequences)
        yield from _blocks(s, "predictor", rows, sum(pairs), 1, training=True, queries=sum(targets), query_pairs=asked)
    else:
        yield from _packed_or_apart(s, "predictor", sequences, pairs, s.predictor.depth)
    name, context, target = "predictor elementwise", sum(contexts), sum(targets)
    if s.fused:
        yield Pass(name, (context + target * (2 if s.noised else 1)) * narrow * 10 * size, 4)
    else:
        positions = 0 if s.packed else s.batch * s.tokens * 12
        noise = target * 60 if s.noised else 0  # normalised, drawn, scaled, added
        yield Pass(name, (positions + context * 60 + target * 150 + noise) * narrow, 30)


def _packed_or_apart(s: StepShape, part: str, rows: list[float], pairs: list[float], layers: int) -> Iterator[Work]:
    """All sets as one matrix, or run by run, as the public code does."""
    if s.packed:
        yield from _blocks(s, part, sum(rows), sum(pairs), layers, training=True)
        again = min(s.recomputed, layers)
        if again:
            yield from _blocks(s, part, sum(rows), sum(pairs), again, training=False)
        return
    for set_rows, set_pairs in zip(rows, pairs):
        for training, blocks in ((True, layers), (False, min(s.recomputed, layers))):
            for item in _blocks(s, part, set_rows / s.runs, set_pairs / s.runs, blocks, training=training):
                yield replace(item, count=item.count * s.runs)


def _blocks(
    s: StepShape,
    part: str,
    rows: float,
    pairs: float,
    layers: int,
    *,
    training: bool,
    queries: float | None = None,
    query_pairs: float | None = None,
) -> Iterator[Work]:
    """Transformer blocks; with `queries` keys and values come from all rows, everything else from these alone."""
    net, size = (s.predictor if part == "predictor" else s.encoder), s.value_bytes
    asked = rows if queries is None else queries
    linear, d, hidden = f"{part} linear", net.width, net.hidden
    shapes = [(asked, d, d), (asked, hidden, d), (asked, d, hidden)] + [(asked, hidden, d)] * net.gated
    shapes += [(rows, 3 * d, d)] if queries is None else [(rows, 2 * d, d), (asked, d, d)]
    for m, n, k in shapes:
        if training:
            yield from _with_gradients(linear, m, n, k, size, layers)
        else:
            yield Product(linear, m, n, k, size, layers)
    stretches = 1 if part == "target" or not s.packed or s.fused else s.runs * len(s.sets)
    wanted = pairs if query_pairs is None else query_pairs
    forward = Attention(
        f"{part} attention", wanted, rows, net.heads, d // net.heads, False, s.fused, stretches, size, layers
    )
    yield forward
    ahead, back = _elementwise(s, hidden / d, part == "predictor", training)
    kernels = (2, 5) if s.fused else (5, 13) if s.compiled else (13, 25) if s.packed else (15, 31)
    if net.gated:  # by the library, whatever runs the rest
        ahead, back = ahead + 3 * hidden / d * s.value_bytes, back + 5 * hidden / d * s.value_bytes
    yield Pass(f"{part} elementwise", asked * d * ahead, kernels[0], layers)
    if s.rotary:
        turned = _turning(s)
        yield Pass(f"{part} elementwise", rows * d * turned[0], turned[2], layers)
        if training:
            yield Pass(f"{part} elementwise", rows * d * turned[1], turned[3], layers)
    if training:
        yield replace(forward, backward=True)
        yield Pass(f"{part} elementwise", asked * d * back, kernels[1], layers)


def _elementwise(s: StepShape, r: float, wide: bool, training: bool) -> tuple[float, float]:
    """Bytes a row and channel of one block, forward and backward, beside what products and attention move.

    `wide`: the residual stream is float32 whatever the products are, as in the predictor.
    """
    if s.fused:
        extra = 4 * (4 - s.value_bytes) if wide else 0
        return (8 + (r if training else 0)) * s.value_bytes + extra, (8 + r) * s.value_bytes + extra
    if s.compiled:  # norms, sums, casts and GELU share passes; products and attention stay apart
        scale = s.value_bytes / 2
        return (16 + 4 * r) * scale, (48 + 6 * r) * scale
    # Taking q, k and v out of the packed projection: the public way fills three copies of the gradient with zeros, adds
    # and packs them; the packed pass concatenates once, and the outputs too.
    mixed, unpacked = (2 * s.value_bytes, 9 * s.value_bytes) if s.packed else (0, 39 * s.value_bytes)
    if s.value_bytes == 4:  # two norms, two sums, GELU; biases read their gradients once more
        return mixed + 40 + 8 * r, unpacked + 68 + 16 * r
    # Norms in float32 with a cast on either side.
    return mixed + (48 if wide else 52) + 4 * r, unpacked + (98 if wide else 86) + 8 * r


def _turning(s: StepShape) -> tuple[float, float, int, int]:
    """Bytes a row and channel of turning queries and keys, forward and backward, and kernels; counted by the census."""
    scale = s.value_bytes / 2
    if s.fused:  # q, k and v are written once more, and so are their gradients
        return 12 * scale, 25 * scale, 3, 6
    if s.compiled:
        return 8 * scale, 8 * scale, 1, 1
    if s.packed:  # by a table that is made once
        return 72 * scale, 100 * scale, 9, 9
    return 79 * scale, 97 * scale, 101, 106  # axis by axis, angles made every time


def _with_gradients(name: str, m: float, n: float, k: float, size: int, count: float = 1.0) -> Iterator[Work]:
    """A product, the gradient of its input, and that of its weight."""
    yield Product(name, m, n, k, size, count)
    yield Product(name, m, k, n, size, count)
    yield Product(name, n, k, m, size, count)


def _loss(s: StepShape) -> Iterator[Work]:
    """Target features normalised and compared with the predictions, and the gradient of that."""
    width, rows = s.levels * s.encoder.width, s.batch * (s.target + (s.context if s.dense else 0))
    if s.fused:
        moved = s.batch * s.union * 2 * s.value_bytes + rows * 6 * s.value_bytes
        yield Pass("loss", moved * width, 2)
    else:
        compared = 94 + (50 if s.regularised else 0)  # gathered, widened, subtracted; all of it backward
        yield Pass("loss", (s.batch * s.tokens * 22 + rows * compared) * width, 33)


def _casts(s: StepShape) -> Iterator[Work]:
    """What every forward and backward pass does to weights and gradients as a whole."""
    trained = s.encoder.trained + s.predictor.trained
    moved = 0.0
    if s.autocast:  # float32 weights are read and written in half precision, gradients the other way
        moved += 6 * s.encoder.trained + 12 * trained
    if not s.packed:  # gradients of the further passes are added to those of the first
        moved += (s.runs * len(s.sets) - 1) * 3 * s.value_bytes * s.encoder.trained
    if s.parts > 1:
        moved += (10 if s.masters else 12) * trained
    if moved:
        yield Pass(COMPONENTS[-1], moved, 0)  # these kernels are few beside those of the blocks


def _update(s: StepShape) -> Iterator[Work]:
    """Norm, clipping, AdamW, moving average of the target encoder, and bf16 copies where there are masters."""
    encoder, trained = s.encoder.trained, s.encoder.trained + s.predictor.trained
    gradient = 2 if s.masters and s.parts == 1 else 4
    adam = 24 + gradient  # weight and both moments read and written
    if s.fused and s.masters:
        moved, kernels = trained * (gradient + adam + 2) + encoder * (8 + 2), 4
    else:
        moved = trained * (gradient + (2 * gradient if s.clipped else 0) + adam + (8 if s.loss_scaled else 0))
        moved += encoder * (12 if s.fused else 32)
        moved += (trained + encoder) * 6 if s.masters else 0
        kernels = 2 * ceil(12 * (s.encoder.depth + s.predictor.depth) / 32) + 60
    yield Pass(COMPONENTS[-1], moved, kernels)

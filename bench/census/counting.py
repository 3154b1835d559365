"""What one training step asks of a device, counted call by call below autograd: launches, bytes and FLOPs.

One call of an ATen operation is one launch: views and allocations are none, a foreach call is one however many
tensors it takes, and what the library may split inside (a layer norm's gradient, a large sum) is one as well. Bytes are
each distinct input read once and each output written once; values of an expanded tensor count once, and of a gather the
rows that are taken. Attention is one forward and one backward kernel of 8 and 24 bytes a token and channel in half
precision. Operations of `fastjepa_kernels` have launches and bytes of their own, in `fastjepa_kernels.traffic`.
"""

import contextlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastjepa_kernels.traffic import Traffic, attention_bytes, real_bytes, traffic

ATEN = torch.ops.aten
# No kernel runs: memory is reserved or only described anew (these carry no alias in their schema), or the host asks for
# its own numbers, such as AdamW's step counts; a fake tensor has none to give.
FREE = {
    ATEN.empty, ATEN.empty_like, ATEN.empty_strided, ATEN.new_empty, ATEN.new_empty_strided, ATEN._unsafe_view,
    ATEN.promote_types, ATEN._local_scalar_dense,
}  # fmt: skip
# What was there before is not read; of the `_like` and `new_` forms only the shape is.
WRITTEN_ONLY = {
    ATEN.zeros, ATEN.ones, ATEN.full, ATEN.arange, ATEN.scalar_tensor, ATEN.zeros_like, ATEN.ones_like, ATEN.full_like,
    ATEN.new_zeros, ATEN.new_ones, ATEN.new_full, ATEN.zero_, ATEN.zero, ATEN.fill_, ATEN.fill,
}  # fmt: skip
# What is changed in place is not read.
COPIES = {ATEN.copy_, ATEN._foreach_copy_}
# Of the first input the rows that the result has are read, and no others.
TAKEN = {ATEN.gather, ATEN.index_select, ATEN.index}
# The gradient of an indexed or sliced tensor: zeros, then a copy into their midst.
INTO_ZEROS = {ATEN.select_backward, ATEN.slice_backward}
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm, ATEN.convolution, ATEN.convolution_backward}
ATTENTION = {ATEN._scaled_dot_product_flash_attention_for_cpu, torch.ops.fastjepa.indexed_attention}
ATTENTION_BACKWARD = {
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
    torch.ops.fastjepa.indexed_attention_backward,
}
LINEAR_OPERATIONS = {"gelu_product_backward", "linear_gelu", "mlp", "patch_embed_gather", "patch_embed_gather_backward"}


@dataclass
class Figures:
    """Launches, bytes in and out of device memory, FLOPs (a multiply-add is two)."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def add(self, launches: int, size: int, flops: int) -> None:
        """Count one call."""
        self.launches += launches
        self.bytes += size
        self.flops += flops


class Census(TorchDispatchMode):
    """Counts everything inside, by component and by single item.

    A component is what runs: names given by `phase`, with ` linear`, ` attention`, ` elementwise` or ` casts` after
    them. The backward pass of a call belongs to the phase in which autograd recorded it. `lengths` of flat attention
    are rows of each clip by the storage of the tensor that says where clips begin: `mark_lengths` notes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.components: dict[str, Figures] = defaultdict(Figures)
        self.items: dict[tuple[str, str, str], Figures] = defaultdict(Figures)
        self.phases = ["rest"]
        # Where phases begin in autograd's own count of recorded calls.
        self.boundaries: list[tuple[int, str]] = [(0, "rest")]
        self.last = "rest"
        self.lengths: dict[int, tuple[Tensor, list[int]]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Calls inside, and their gradients, belong to `name`; the innermost name counts."""
        self._enter(name)
        try:
            yield
        finally:
            self.phases.pop()
            self._enter(self.phases.pop())

    def during(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a phase."""

        def run(*arguments: Any, **named: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **named)

        return run

    def mark_lengths(self, starts: Tensor, lengths: list[int]) -> None:
        """Rows of the clips whose beginnings `starts` holds, which has no numbers itself."""
        self.lengths[starts.untyped_storage()._cdata] = (starts, lengths)

    def total(self) -> Figures:
        """The sum of all components."""
        every = Figures()
        for one in self.components.values():
            every.add(one.launches, one.bytes, one.flops)
        return every

    def _enter(self, name: str) -> None:
        self.phases.append(name)
        self.boundaries.append((torch.autograd._get_sequence_nr(), name))

    def _phase(self) -> tuple[str, bool]:
        """What runs, and whether it is a gradient."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self.phases[-1], False
        number = node._sequence_nr()
        # What gathers the gradient of a parameter has no number of its own and comes right after what made it.
        if number < torch.autograd._get_sequence_nr():
            place = bisect_right(self.boundaries, number, key=lambda boundary: boundary[0])
            self.last = self.boundaries[place - 1][1]
        return self.last, True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the call, count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        phase, gradient = self._phase()
        if func.namespace == "fastjepa":
            results = list(out) if isinstance(out, tuple | list) else [out]
            found = traffic(func._schema.name.partition("::")[2], args, results)
        else:
            found = aten_traffic(func, args, kwargs, out)
        if found.launches:
            flops = self._flops(func, args, kwargs, out)
            self.components[f"{phase} {kind_of(func, args, out)}"].add(found.launches, found.bytes, flops)
            item = (phase + " backward" * gradient, func._schema.name, _shapes(args))
            self.items[item].add(found.launches, found.bytes, flops)
        return out

    def _flops(self, func: Any, args: tuple, kwargs: dict, out: Any) -> int:
        packet = func.overloadpacket
        if packet in ATTENTION or packet in ATTENTION_BACKWARD:
            # Scores that a backward kernel computes again are not counted.
            return (8 if packet in ATTENTION_BACKWARD else 4) * self._pairs(func, args)
        return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0

    def _pairs(self, func: Any, args: tuple) -> int:
        """Products of a query and a key, in channels of all heads."""
        backward = func.overloadpacket in ATTENTION_BACKWARD
        if func.namespace == "aten":
            q, k = args[1:3] if backward else args[:2]
            return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        q, k, _, _, _, _, _, starts = (args[3:] if backward else args)[:8]
        if starts is None:
            return q.shape[0] * q.shape[1] * (q if k is None else k).shape[1] * q.shape[-2] * q.shape[-1]
        return sum(n * n for n in self.lengths[starts.untyped_storage()._cdata][1]) * q.shape[-2] * q.shape[-1]


def kind_of(func: Any, args: tuple, out: Any) -> str:
    """linear, attention, casts (a change of dtype alone) or elementwise."""
    packet, name = func.overloadpacket, func._schema.name.partition("::")[2]
    if packet in PRODUCTS or name in LINEAR_OPERATIONS:
        return "linear"
    if packet in ATTENTION or packet in ATTENTION_BACKWARD:
        return "attention"
    return "casts" if packet is ATEN._to_copy and out.dtype != args[0].dtype else "elementwise"


def aten_traffic(func: Any, args: tuple, kwargs: dict, out: Any) -> Traffic:
    """Launches and bytes of a call of the library."""
    packet, schema = func.overloadpacket, func._schema
    results = _tensors(out)
    # A view, or what may be one: `contiguous` is where nothing has to be copied.
    viewed = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    if func.namespace != "aten" or packet in FREE or (viewed and _shared(results, _tensors(args))):
        return Traffic(0, 0)
    if packet in ATTENTION:
        return Traffic(1, attention_bytes(args[0], args[1], backward=False))
    if packet in ATTENTION_BACKWARD:
        return Traffic(1, attention_bytes(args[1], args[2], backward=True))
    if packet in INTO_ZEROS:
        return Traffic(2, real_bytes(out) + 2 * real_bytes(args[0]))
    if packet is ATEN.scatter_add:
        # Autograd writes it out of place only where a mode such as this one looks on: in truth the sums are added into
        # the fresh zeros, which are counted, row by row.
        return Traffic(1, real_bytes(args[2]) + 3 * real_bytes(args[3]))
    if packet in TAKEN:
        return Traffic(1, 2 * sum(map(real_bytes, results)) + sum(map(real_bytes, _tensors(args[1:]))))
    named = {argument.name: value for argument, value in zip(schema.arguments, args)} | kwargs
    read, written = [], list(results)
    for argument in schema.arguments:
        given = _tensors(named.get(argument.name))
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += given
            read += [] if packet in COPIES else given
        else:
            read += given
    read = [] if packet in WRITTEN_ONLY else read
    return Traffic(1, _distinct(read) + _distinct(written))


def _tensors(given: Any) -> list[Tensor]:
    return [one for one in tree_leaves(given) if isinstance(one, Tensor)]


def _shared(some: list[Tensor], others: list[Tensor]) -> bool:
    storages = {one.untyped_storage()._cdata for one in others}
    return all(one.untyped_storage()._cdata in storages for one in some)


def _distinct(tensors: list[Tensor]) -> int:
    """Bytes of the tensors, of the same stretch of a storage once."""
    return sum(
        {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): real_bytes(x) for x in tensors}.values()
    )


def _shapes(args: tuple) -> str:
    """Shapes and dtypes of the tensors among the arguments, of a list the first and their number."""
    parts = []
    for one in args:
        if isinstance(one, Tensor):
            parts.append(_shape(one))
        elif isinstance(one, list | tuple) and one and isinstance(one[0], Tensor):
            parts.append(f"{len(one)} x {_shape(one[0])}")
    return " ".join(parts)


def _shape(x: Tensor) -> str:
    name = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64"}.get(x.dtype, str(x.dtype)[6:])
    return f"{name}[{','.join(map(str, x.shape))}]" if x.ndim else f"{name}[]"

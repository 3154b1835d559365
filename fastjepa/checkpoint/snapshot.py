"""Copies of tensors in host memory, taken while the device works on and before anything changes them."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Pinned memory comes in powers of two: slabs of one waste none of it, which buffers of their own would.
SLAB_BYTES = 1 << 30
ALIGNMENT = 64  # of every buffer in its slab, in bytes: a multiple of the size of any dtype


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor, all of any other."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class Snapshot:
    """Buffers for what this process holds of some tensors, used again for every snapshot of the same shapes.

    They take as much host memory as the tensors take on the device (for a CUDA device pinned, of which the last GiB may
    be rounded up to twice its size), and keep it.
    """

    def __init__(self) -> None:
        self._layout: list[tuple[str, torch.Size, torch.dtype, torch.device]] = []
        self._buffers: dict[str, Tensor] = {}
        self.device: torch.device | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy the tensors as they are after the work that the current stream has been given so far.

        Without a wait of the host: whatever the current stream is given from now on runs after the copies.
        Errors: MemoryError or RuntimeError where the host lacks the memory.
        """
        parts = {name: local(tensor) for name, tensor in tensors.items()}
        devices = {part.device for part in parts.values() if part.is_cuda}
        layout = [(name, part.shape, part.dtype, part.device) for name, part in parts.items()]
        if layout != self._layout:
            # The old ones go first: there may be no room for both.
            self._layout, self._buffers = [], {}
            self._buffers = _buffers(parts, pinned=bool(devices))
            self._layout = layout
        if not devices:
            self._copy(parts)
            return
        assert len(devices) == 1, "a process has one device"
        (self.device,) = devices
        current = torch.cuda.current_stream(self.device)
        if self._stream is None:
            self._stream, self._copied = torch.cuda.Stream(self.device), torch.cuda.Event(blocking=True)
        assert self._copied is not None
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._copy(parts)
            self._copied.record(self._stream)
        current.wait_event(self._copied)

    def _copy(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            self._buffers[name].copy_(part, non_blocking=True)

    def parts(self) -> dict[str, Tensor]:
        """The copies by name, on the CPU, after a wait until they are there. The next `take` overwrites them."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(self._buffers)


def _buffers(parts: dict[str, Tensor], *, pinned: bool) -> dict[str, Tensor]:
    """A contiguous CPU tensor for each, of the same shape and dtype, cut from as few slabs as will do."""
    ends, places = [0], {}
    for name, part in parts.items():
        size = -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        if ends[-1] and ends[-1] + size > SLAB_BYTES:
            ends.append(0)
        places[name] = len(ends) - 1, ends[-1]
        ends[-1] += size
    slabs = [torch.empty(end, dtype=torch.uint8, pin_memory=pinned) for end in ends]
    return {
        name: slabs[number][start : start + parts[name].nbytes].view(parts[name].dtype).view(parts[name].shape)
        for name, (number, start) in places.items()
    }

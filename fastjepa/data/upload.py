"""Batches on their way to the GPU while it computes: copied on a stream of their own, one batch ahead."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from fastjepa.data.batches import Batch, MixedBatch

Taken = Batch | MixedBatch


def uploaded(batches: Iterator[Taken], device: torch.device) -> Generator[Taken, None, None]:
    """The same batches on the device, in order; a CPU gets them as they are.

    For a GPU the next batch is fetched, and its copy begun on a side stream, before one is handed out: a loader that is
    late is waited for one step sooner, and what the GPU still computes meanwhile counts as waiting too. The stream that
    computes waits for the copy, the host for nothing as long as batches lie in page-locked memory. What the source
    raises ends the run, and comes out at once: the batch that is ready then is not handed out any more.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    coming: tuple[Taken, torch.cuda.Event] | None = None
    for batch in batches:
        begun = _begin(batch, device, side)
        if coming is not None:
            yield _arrived(*coming, device)
        coming = begun
    if coming is not None:
        yield _arrived(*coming, device)


def _begin(batch: Taken, device: torch.device, side: torch.cuda.Stream) -> tuple[Taken, torch.cuda.Event]:
    """Start the copy; the event says when it is done."""
    with torch.cuda.stream(side):
        return batch.to(device), side.record_event()


def _arrived(batch: Taken, copied: torch.cuda.Event, device: torch.device) -> Taken:
    """Order the computing stream after the copy, and keep the memory until that stream is done with it."""
    computing = torch.cuda.current_stream(device)
    computing.wait_event(copied)
    for tensor in (tensor for group in batch.groups for tensor in _tensors(group)):
        # The allocator knows the side stream only, and would hand the memory to the next copy too early.
        tensor.record_stream(computing)
    return batch


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield from (batch.clips, batch.union.index)
    for token_set in (*batch.masks_context, *batch.masks_target, *batch.union.places):
        yield token_set if isinstance(token_set, Tensor) else token_set.index

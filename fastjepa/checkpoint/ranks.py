"""Processes that save and load together: whatever fails in one of them fails in all, and none waits for ever."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from fastjepa.checkpoint.errors import CheckpointError, NotDamaged, SaveFailed, one_line

T = TypeVar("T")
# Failures whose text is a sentence for the user: they are the same in every process.
FORESEEN: dict[str, type[Exception]] = {kind.__name__: kind for kind in (CheckpointError, NotDamaged, SaveFailed)}


class Ranks:
    """The processes of a gloo group, or this one alone where there is none.

    Every process calls the same methods in the same order, also after one of them has failed. Nobody else may use the
    group meanwhile: collectives of two threads would be taken for one another.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def each(self, action: Callable[[], T]) -> list[T]:
        """Every process does this; what came of it, by rank. Results are plain values, for they travel.

        Errors: a foreseen one of any process is raised in all of them, that of the lowest rank. Any other is raised
        where it happened, and told as a RuntimeError elsewhere.
        """
        if self.group is None:
            return [action()]
        error: BaseException | None = None
        # Everything is caught, for the others would wait for the answer of a process that left; it is raised below.
        try:
            answer: tuple[Any, str, str] = (action(), "", "")
        except BaseException as caught:  # noqa: BLE001
            error = caught
            answer = (None, type(caught).__name__, str(caught) if _foreseen(caught) else one_line(caught))
        answers: list[tuple[Any, str, str]] = [answer] * self.size
        dist.all_gather_object(answers, answer, group=self.group)
        if error is not None and not _foreseen(error):
            raise error
        for rank, (_, kind, text) in enumerate(answers):
            if kind in FORESEEN:
                raise FORESEEN[kind](text) from error
            if kind:
                raise RuntimeError(f"process {rank} failed: {kind}: {text}") from error
        return [value for value, _, _ in answers]

    def first(self, action: Callable[[], T]) -> T:
        """The first process does this; every one has what came of it, or its error."""
        return self.each(lambda: action() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def _foreseen(error: BaseException) -> bool:
    return FORESEEN.get(type(error).__name__) is type(error)

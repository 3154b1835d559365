"""torch's distributed checkpoint in a single process."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def single_process() -> Iterator[None]:
    """torch warns at every save that no process group exists; with one process that is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield

"""How saving and loading a checkpoint can fail."""

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

# What parsing a damaged or a hostile file can raise; a RecursionError for brackets in brackets without end.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, SafetensorError)
# What writing can raise on a disk that is full or gone. torch's own derives from BaseException.
UNWRITABLE = (OSError, SafetensorError, CheckpointException)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used. The text is one sentence."""


class NotDamaged(CheckpointError):
    """A checkpoint cannot be used, but nothing says that it is damaged: it stays where it is and the run stops."""


class SaveFailed(OSError):
    """A checkpoint could not be written; the ones before it are untouched. The text is one sentence."""


def cause(error: BaseException) -> str:
    """What went wrong, on one line and without the frame that torch puts around it."""
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()), None)
        return one_line(inner[0] if isinstance(inner, tuple) else inner)
    return one_line(error)


def one_line(what: object) -> str:
    """The text of something, without line breaks."""
    return " ".join(str(what).split())

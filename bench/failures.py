"""What may go wrong with one of several ways, so that its reason takes the place of its figure and the others go on."""

from bench.measure import CANNOT_RUN

try:
    from triton.errors import TritonError
except ImportError:  # no Triton on this machine: nothing raises its errors
    TritonError = RuntimeError

# A kernel that does not compile is Triton's error, settings that this machine cannot follow are ValueErrors.
FAILURES = (*CANNOT_RUN, TritonError, ValueError)


class CannotRun(RuntimeError):
    """Something that is measured does not run on this machine; `str(error)` says why in a line."""


def reason(error: BaseException) -> str:
    """An error in a line: the first line of what a compiler raises only says which compiler it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300] or 'no message'}"

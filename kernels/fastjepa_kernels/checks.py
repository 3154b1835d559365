"""What several operations ask of their inputs, each mistake one sentence."""

from torch import Tensor


def check_index(name: str, index: Tensor, x: Tensor) -> None:
    """Errors: ValueError where `index` is no int32 or int64 beside a floating `x` on one device."""
    if index.dtype.is_floating_point or index.dtype.itemsize < 4 or index.dtype.is_complex:
        raise ValueError(f"{name}: index must be int32 or int64, got {index.dtype}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: x must be of a floating dtype, got {x.dtype}")
    if index.device != x.device:
        raise ValueError(f"{name}: x is on {x.device}, index on {index.device}")


def check_form(name: str, form: str, forms: tuple[str, ...], chosen: str) -> None:
    """Errors: ValueError for an unknown form, or one of Triton's asked for by name where the reference runs."""
    if form not in forms:
        raise ValueError(f"{name}: form must be one of {', '.join(forms)}, got {form!r}")
    if form != "auto" and chosen == "reference":
        raise ValueError(f"{name}: form={form!r} was asked for, which is one of Triton's, but the reference was chosen")

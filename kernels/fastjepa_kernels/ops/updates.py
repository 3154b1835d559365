"""Updates in place as operators of torch: they return nothing and have no gradient."""

from typing import Any

from fastjepa_kernels.reference import updates as reference
from fastjepa_kernels.registry import register


def _nothing(*inputs: Any) -> None:
    return None


register(
    "ema_update_",
    "(Tensor(a!)[] targets, Tensor[] onlines, Tensor move) -> ()",
    reference=reference.ema_update_,
    triton="updates.ema_update_",
    fake=_nothing,
)
register(
    "adamw_ema_",
    "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] targets, Tensor(e!)[] copies, Tensor(f!)[] target_copies, Tensor scalars, float beta1, float beta2, "
    "float eps) -> ()",
    reference=reference.adamw_ema_,
    triton="updates.adamw_ema_",
    fake=_nothing,
)

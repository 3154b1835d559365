"""`rope3d` as an operator of torch: linear in the channels, so its gradient is the operator itself, transposed."""

from typing import Any

from torch import Tensor

from fastjepa_kernels.reference import rope as reference
from fastjepa_kernels.registry import differentiable, operation, register


def _fake(
    q: Tensor, k: Tensor | None, ids: Tensor, height: int, width: int, theta: float, compat: bool, back: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape)


register(
    "rope3d",
    "(Tensor q, Tensor? k, Tensor ids, int height, int width, float theta, bool compat, bool back) -> (Tensor, Tensor)",
    reference=reference.rope3d,
    triton="rope.rope3d",
    fake=_fake,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, ids, *settings, back = inputs
    ctx.save_for_backward(ids)
    ctx.set_materialize_grads(False)
    ctx.both = k is not None
    ctx.settings = *settings, not back


def _gradient(ctx: Any, impl: str, dq: Tensor | None, dk: Tensor | None) -> tuple[Any, ...]:
    (ids,) = ctx.saved_tensors
    run = operation("rope3d", impl)
    nothing = None, None, None, None, None, None
    if not ctx.both or dk is None:
        return None if dq is None else run(dq, None, ids, *ctx.settings)[0], None, *nothing
    if dq is None:
        return None, run(dk, None, ids, *ctx.settings)[0], *nothing
    return *run(dq, dk, ids, *ctx.settings), *nothing


differentiable("rope3d", _gradient, _keep)

"""Every process holds a part of each weight (FSDP2): a block's weights are gathered for as long as it runs.

A unit is the attention and the MLP of a block, the large weights that one call of `Operations.block` reads. Norms,
whose weights stay float32, and what is outside of blocks (embeddings, projections, tokens) are gathered once a pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastjepa.exchange import Exchange
from fastjepa.jepa import JEPA, JEPAOutput
from fastjepa.models import VisionTransformer, VisionTransformerPredictor
from fastjepa.models.layers import Block
from fastjepa.updates import Weight


class Sharded(Exchange):
    """fully_shard (FSDP2) around the units of a JEPA in packed execution, and around the whole.

    `dtype` is what blocks compute in where it is not float32: their weights are gathered in it, gradients are averaged
    in float32. The JEPA may lie on the host: its parts move to the device as they are sharded.
    """

    name = "FSDP2"
    shards = True

    def __init__(self, jepa: JEPA, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(jepa)
        run_within = getattr(jepa.operations, "run_within", None)
        if run_within is None:
            raise ValueError("FSDP2 takes a JEPA whose operations can run a block within a call (build_operations)")
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        wide = MixedPrecisionPolicy(cast_forward_inputs=False)
        half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = half if dtype.itemsize == 2 else wide
        units: dict[int, nn.Module] = {}
        for block in _blocks(jepa):
            units[id(block)] = unit = _Unit(block)
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        run_within(lambda block, run, *rows: units[id(block)](run, *rows))
        # Autocast rounds what is outside of blocks where it is used. Gathered anew for the backward pass: what a pass
        # without one leaves gathered would be stale in the next step.
        self._root = _Root(jepa, list(units.values()))
        done = {parameter for unit in units.values() for parameter in unit.parameters()}
        fully_shard(self._root, mesh=mesh, mp_policy=wide, reshard_after_forward=True, ignored_params=done)
        for parameter in jepa.parameters():
            assert isinstance(parameter, DTensor), "every weight is in a unit or in the root"

    def loss(self, *arguments: Any, **more: Any) -> JEPAOutput:
        """As `JEPA.forward`; of what is kept on request, that of `look` alone."""
        loss, loss_jepa, loss_reg, predictions, every, context, losses = self._root(arguments, more)
        return JEPAOutput(
            loss, loss_jepa, loss_reg, predictions, every_target=every, loss_context=context, losses_jepa=losses
        )

    def collect(self, weights: list[Weight], last: bool, parts: int) -> None:
        """Each backward pass adds to the gradients of the shards; after the last they are the masters'."""
        for weight in weights if last else ():
            gradient = weight.parameter.grad
            weight.master.grad = None if gradient is None else self.local(gradient)
            weight.parameter.grad = None

    def local(self, tensor: Tensor) -> Tensor:
        """The shard of this process."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, local: Tensor, like: Tensor) -> Tensor:
        """A DTensor laid out like the weight."""
        if not isinstance(like, DTensor) or local.ndim == 0:
            return local
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def norms(self, norms: Tensor) -> Tensor:
        """Over the shards."""
        squares = norms.square()
        dist.all_reduce(squares, dist.ReduceOp.SUM)
        return squares.sqrt()

    def mean(self, values: Tensor) -> Tensor:
        """One small exchange a step."""
        dist.all_reduce(values, dist.ReduceOp.SUM)
        return values / dist.get_world_size()

    def target_state(self) -> dict[str, Tensor] | None:
        """Gathered onto the host of the first process; empty in the others."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.jepa.target_encoder, options=options)  # type: ignore[return-value]


def _blocks(jepa: JEPA) -> list[Block]:
    """The blocks of all three networks."""
    encoder, target_encoder, predictor = jepa.encoder, jepa.target_encoder, jepa.predictor
    assert isinstance(encoder, VisionTransformer) and isinstance(target_encoder, VisionTransformer)  # noqa: PT018
    assert isinstance(predictor, VisionTransformerPredictor)
    found = [*encoder.blocks, *target_encoder.blocks, *predictor.predictor_blocks]
    return [block for block in found if isinstance(block, Block)]


class _Unit(nn.Module):
    """The weights that run together; its call is when they are gathered."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp

    def forward(self, run: Callable[..., Any], *rows: Tensor) -> Any:
        return run(*rows)


class _Root(nn.Module):
    """Everything, and so what no unit has."""

    def __init__(self, jepa: JEPA, units: list[nn.Module]) -> None:
        super().__init__()
        self.jepa, self.units = jepa, nn.ModuleList(units)

    def forward(self, arguments: tuple, more: dict[str, Any]) -> tuple[Any, ...]:
        out = self.jepa(*arguments, **more)
        kept = out.predictions, out.every_target, out.loss_context, out.losses_jepa
        return out.loss, out.loss_jepa, out.loss_reg, *kept

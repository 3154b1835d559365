"""The two training steps that the census counts, on shape-only tensors of full size.

Tensors are torch's fake ones: they have a shape, a dtype and a device, and no numbers, so that a step that asks the
device for a number raises. They say that they are on a CPU, because autograd asks a build without CUDA for streams of
any other device; what would differ on a GPU is written out here: the casts of CUDA's autocast (`CudaAutocast`), the
Triton forms of `fastjepa_kernels`, foreach forms in the optimizer.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode

from bench.census.counting import Census
from fastjepa.attending import Flat
from fastjepa.jepa import JEPA
from fastjepa.masks import TargetUnion
from fastjepa.models import build_vit, packing, vit_predictor
from fastjepa.models.operations import LIBRARY
from fastjepa.models.rows import Rotary, Stretch
from fastjepa.optim import OptimizerPass, Schedule, parameter_groups
from fastjepa.pieces import PIECES, Composite, build_operations
from fastjepa_kernels import dispatch

Execution = Literal["reference", "packed"]
MODELS = {"vitl": "vit_large", "vith": "vit_huge"}
# The published batch and the mean numbers of tokens that its masks keep (multiblock3d: 8 blocks of 15 %, 2 of 70 %).
CLIPS, FRAMES, SIDE = 24, 16, 224
CONTEXT, TARGET = (365, 100), (749, 1103)
UNION = 1197
MOMENTUM, CLIP_GRAD = 0.998, 10.0
SCHEDULE = Schedule(90_000, 12_000, 6.25e-4, 2e-4, 1e-6, 0.04, 0.4, MOMENTUM, 1.0)
KERNELS = {**dict.fromkeys(PIECES, "triton"), "embed": "fused", "mlp": "fused"}


class CudaAutocast(TorchFunctionMode):
    """Where autocast of a CPU casts otherwise than that of CUDA: layer norms run in float32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Cast what is half precision, then run."""
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = tuple(one.float() if isinstance(one, Tensor) else one for one in args)
        return func(*args, **(kwargs or {}))


def count(model: str, execution: Execution, kernels: Mapping[str, str] = KERNELS) -> Census:
    """A whole step of the model ("vitl" or "vith"): forward, backward, clipping, AdamW, moving average.

    `kernels` are those of the packed step, as in `runtime.kernels`.
    """
    census = Census()
    with FakeTensorMode(), _as_on_a_gpu():
        jepa = _build(model, execution, kernels)
        packed = execution == "packed"
        step = _packed_step(jepa, census, kernels["update"]) if packed else _public_step(jepa, census)
        dtype = torch.float32 if execution == "reference" else torch.uint8
        clips = torch.empty(CLIPS, 3, FRAMES, SIDE, SIDE, dtype=dtype)
        context, target = ([torch.empty(CLIPS, kept, dtype=torch.int64) for kept in sets] for sets in (CONTEXT, TARGET))
        with _phases(jepa, census), _lengths_noted(jepa, census), CudaAutocast(), census:
            step(clips, context, target)
    return census


def _build(model: str, execution: Execution, kernels: Mapping[str, str]) -> JEPA:
    """The published model: made without numbers at all, as making them is what takes time; then as fake tensors."""
    grid = {"img_size": SIDE, "num_frames": FRAMES, "patch_size": 16, "tubelet_size": 2, "uniform_power": True}
    # Meta tensors know no streams either, but no autocast.
    with unset_fake_temporarily(), torch.device("meta"):
        encoder = build_vit(MODELS[model], **grid)
        predictor = vit_predictor(
            **grid, embed_dim=encoder.embed_dim, predictor_embed_dim=384, depth=12, num_heads=encoder.num_heads,
            use_mask_tokens=True,
        )  # fmt: skip
        packed = execution == "packed"
        operations = build_operations(dict(kernels), "auto", torch.device("cpu"))[0] if packed else LIBRARY
        jepa = JEPA(encoder, predictor, execution=execution, operations=operations)
    for module in jepa.modules():
        for name, one in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(one.shape, dtype=one.dtype), requires_grad=one.requires_grad)
            setattr(module, name, fake)
        for name, one in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(one.shape, dtype=one.dtype))
    return jepa


def _public_step(jepa: JEPA, census: Census) -> Callable[..., None]:
    """The public code's, without its statistics: autocast over float32 weights, one pass a mask set, clipping in two
    networks, AdamW in its foreach form, three launches a parameter for the moving average."""

    def step(clips: Tensor, context: list[Tensor], target: list[Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = jepa(clips, context, target).loss
        loss.backward()
        with census.phase("optimizer"):
            _public_optimizer(jepa)

    return step


def _public_optimizer(jepa: JEPA) -> None:
    # Step counts of AdamW's foreach form lie on the host, where fake tensors of a CPU cannot be told from the device's:
    # this part runs on meta tensors, and the few numbers of the host are real.
    with unset_fake_temporarily():
        twin = {p: nn.Parameter(torch.empty_like(p, device="meta")) for p in jepa.parameters() if p.requires_grad}
        for one in twin.values():
            one.grad = torch.empty_like(one)
        groups = [{**group, "params": [twin[p] for p in group["params"]]} for group in parameter_groups(jepa)]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, foreach=True)
        for one in twin.values():
            zeros = {name: torch.empty_like(one) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[one] = {"step": torch.tensor(1.0), **zeros}
        for network in (jepa.encoder, jepa.predictor):
            own = [twin[p] for p in network.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(own, CLIP_GRAD, foreach=True)
        optimizer.step()
    with torch.no_grad():
        for target, online in zip(jepa.target_encoder.parameters(), jepa.encoder.parameters()):
            target.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * online.detach().data)


def _packed_step(jepa: JEPA, census: Census, kernels: Any) -> Callable[..., None]:
    """The library's own, with the kernels that are meant for a GPU asked for by name."""
    named = None if kernels == "library" else kernels
    update = OptimizerPass(jepa, SCHEDULE, clip_grad=CLIP_GRAD, copies=torch.bfloat16, kernels=named)
    update.state()  # moments are made before the first step, not in it

    def step(clips: Tensor, context: list[Tensor], target: list[Tensor]) -> None:
        union = TargetUnion(torch.empty(CLIPS, UNION, dtype=torch.int64), [torch.empty_like(one) for one in target])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = jepa(clips, context, target, union=union).loss
        update.backward(loss)
        with census.phase("optimizer"):
            update.step(0, loss.detach())

    return step


@contextlib.contextmanager
def _phases(jepa: JEPA, census: Census) -> Iterator[None]:
    """Names for what runs: the networks, their embedding of patches, and the loss, which is everything between."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(census.phase("loss"))
        for owner, attribute, name in _named(jepa):
            part = census.during(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, part))
        yield


def _named(jepa: JEPA) -> list[tuple[Any, str, str]]:
    if jepa.execution == "packed":
        functions = (("encode_all", "target"), ("encode_sets", "context"), ("predict_sets", "predictor"))
        embedding = [(jepa.operations, one, "patch embed") for one in ("cut", "embed_all", "embed_sets")]
        return [(packing, function, name) for function, name in functions] + embedding
    networks = (("target_encoder", "target"), ("encoder", "context"), ("predictor", "predictor"))
    embedding = [(jepa.encoder, "embed", "patch embed"), (jepa.target_encoder, "embed", "patch embed")]
    return [(getattr(jepa, network), "forward", name) for network, name in networks] + embedding


@contextlib.contextmanager
def _lengths_noted(jepa: JEPA, census: Census) -> Iterator[None]:
    """Tells the census how long clips are where a kernel only gets a tensor of their beginnings."""
    if jepa.execution == "reference":
        yield
        return
    assert isinstance(jepa.operations, Composite)
    plain = jepa.operations.layout

    def layout(stretches: list[Stretch], device: torch.device, rotary: Rotary | None = None) -> Any:
        flat = plain(stretches, device, rotary)
        if isinstance(flat, Flat):  # library attention goes by the shapes of its calls
            census.mark_lengths(flat.starts, [one.length for one in stretches for _ in range(one.clips)])
        return flat

    with patch.object(jepa.operations, "layout", layout):
        yield


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """What a GPU would run: Triton forms (nothing is launched, so it need not be installed), norms of many tensors."""
    with (
        patch.object(dispatch, "_INTERPRETED", True),
        patch.object(dispatch, "_HAS_TRITON", True),
        patch.object(clip_grad, "_device_has_foreach_support", lambda device: True),
    ):
        yield

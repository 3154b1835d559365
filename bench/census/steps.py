"""The two training steps that the census counts, on shape-only tensors of full size.

Tensors are torch's fake ones: they have a shape, a dtype and a device, and no numbers, so that a step that asks the
device for a number raises. They say that they are on a CPU, because autograd asks a build without CUDA for streams of
any other device; what would differ on a GPU is written out here: the casts of CUDA's autocast (`cuda_autocast`), the
Triton forms of `fastjepa_kernels`, foreach forms in the optimizer.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import clip_grad

from bench.census.counting import Census
from fastjepa.attending import Flat
from fastjepa.jepa import JEPA
from fastjepa.masks import TargetUnion
from fastjepa.models import build_vit, packing, vit_predictor
from fastjepa.models.operations import LIBRARY
from fastjepa.models.rows import Rotary, Stretch
from fastjepa.optim import OptimizerPass, parameter_groups
from fastjepa.pieces import PIECES, Composite, build_operations
from fastjepa.schedules import Schedule
from fastjepa_kernels import dispatch

Execution = Literal["reference", "reference-stored", "packed"]
# The published batch.
CLIPS, FRAMES = 24, 16


class Model(NamedTuple):
    """A published step: the mean numbers of tokens that its masks keep, and of those that some set asks for.

    Masks are multiblock3d, 8 blocks of 15 % and 2 of 70 %. The `second` generation has rotary positions, computes every
    block again in the backward pass, does not clip, and moves its target encoder by foreach functions.
    """

    encoder: str
    side: int = 224
    context: tuple[int, int] = (365, 100)
    target: tuple[int, int] = (749, 1103)
    union: int = 1197
    predictor_heads: int | None = None
    second: bool = False

    @property
    def executions(self) -> tuple[Execution, ...]:
        """As published, the same with everything kept for the backward pass where that is another step, and ours."""
        return ("reference", "reference-stored", "packed") if self.second else ("reference", "packed")


def _second(encoder: str) -> Model:
    return Model(encoder, 256, (493, 128), (973, 1440), 1557, 12, second=True)


MODELS = {
    "vitl": Model("vit_large"),
    "vith": Model("vit_huge"),
    "vjepa2_vitl": _second("vit_large"),
    "vjepa2_vitg": _second("vit_giant_xformers"),
}
MOMENTUM, CLIP_GRAD = 0.998, 10.0
SCHEDULE = Schedule(90_000, 12_000, 6.25e-4, 2e-4, 1e-6, 0.04, 0.4, MOMENTUM, 1.0)
KERNELS = {**dict.fromkeys(PIECES, "triton"), "embed": "fused", "mlp": "fused"}


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Where autocast of a CPU casts otherwise than that of CUDA: layer norms run in float32.

    In the library's module, and not in a mode: no mode looks on where a block is computed again in the backward pass.
    """
    plain = F.layer_norm

    def layer_norm(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(one.float() if isinstance(one, Tensor) else one for one in args)
        return plain(*args, **kwargs)

    with patch.object(F, "layer_norm", layer_norm):
        yield


def count(model: str, execution: Execution, kernels: Mapping[str, str] = KERNELS) -> Census:
    """A whole step of one of `MODELS`: forward, backward, clipping, AdamW, moving average.

    `kernels` are those of the packed step, as in `runtime.kernels`.
    """
    census = Census()
    with FakeTensorMode(), _as_on_a_gpu():
        m = MODELS[model]
        jepa = _build(m, execution, kernels)
        packed = execution == "packed"
        step = _packed_step(m, jepa, census, kernels["update"]) if packed else _public_step(m, jepa, census)
        clips = torch.empty(CLIPS, 3, FRAMES, m.side, m.side, dtype=torch.uint8 if packed else torch.float32)
        context, target = (
            [torch.empty(CLIPS, kept, dtype=torch.int64) for kept in sets] for sets in (m.context, m.target)
        )
        with _phases(jepa, census), _lengths_noted(jepa, census), cuda_autocast(), census:
            step(clips, context, target)
    return census


def _build(model: Model, execution: Execution, kernels: Mapping[str, str]) -> JEPA:
    """The published model: made without numbers at all, as making them is what takes time; then as fake tensors."""
    grid: dict[str, Any] = {
        "img_size": model.side, "num_frames": FRAMES, "patch_size": 16, "tubelet_size": 2, "uniform_power": True,
        "use_rope": model.second,
    }  # fmt: skip
    # Meta tensors know no streams either, but no autocast.
    with unset_fake_temporarily(), torch.device("meta"):
        encoder = build_vit(model.encoder, **grid)
        predictor = vit_predictor(
            **grid, embed_dim=encoder.embed_dim, predictor_embed_dim=384, depth=12, use_mask_tokens=True,
            num_heads=model.predictor_heads or encoder.num_heads,
        )  # fmt: skip
        packed = execution == "packed"
        operations = build_operations(dict(kernels), "auto", torch.device("cpu"))[0] if packed else LIBRARY
        jepa = JEPA(encoder, predictor, execution="packed" if packed else "reference", operations=operations)
        if model.second and execution == "reference":
            encoder.recomputed = predictor.recomputed = len(encoder.blocks)
    for module in jepa.modules():
        for name, one in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(one.shape, dtype=one.dtype), requires_grad=one.requires_grad)
            setattr(module, name, fake)
        for name, one in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(one.shape, dtype=one.dtype))
    return jepa


def _public_step(model: Model, jepa: JEPA, census: Census) -> Callable[..., None]:
    """The public code's, without its statistics: autocast over float32 weights, one pass a mask set, clipping in two
    networks, AdamW in its foreach form, three launches a parameter for the moving average."""

    def step(clips: Tensor, context: list[Tensor], target: list[Tensor]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = jepa(clips, context, target).loss
        loss.backward()
        with census.phase("optimizer"):
            _public_optimizer(jepa, model.second)

    return step


def _public_optimizer(jepa: JEPA, second: bool) -> None:
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
        for network in () if second else (jepa.encoder, jepa.predictor):
            own = [twin[p] for p in network.parameters() if p.requires_grad]
            nn.utils.clip_grad_norm_(own, CLIP_GRAD, foreach=True)
        optimizer.step()
    with torch.no_grad():
        targets, onlines = ([p.data for p in network.parameters()] for network in (jepa.target_encoder, jepa.encoder))
        if second:
            torch._foreach_mul_(targets, MOMENTUM)
            torch._foreach_add_(targets, onlines, alpha=1 - MOMENTUM)
            return
        for target, online in zip(targets, onlines):
            target.mul_(MOMENTUM).add_((1 - MOMENTUM) * online)


def _packed_step(model: Model, jepa: JEPA, census: Census, kernels: Any) -> Callable[..., None]:
    """The library's own, with the kernels that are meant for a GPU asked for by name."""
    named = None if kernels == "library" else kernels
    clip_grad = None if model.second else CLIP_GRAD
    update = OptimizerPass(jepa, SCHEDULE, clip_grad=clip_grad, copies=torch.bfloat16, kernels=named)
    update.state()  # moments are made before the first step, not in it

    def step(clips: Tensor, context: list[Tensor], target: list[Tensor]) -> None:
        union = TargetUnion(
            torch.empty(CLIPS, model.union, dtype=torch.int64), [torch.empty_like(one) for one in target]
        )
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
        predict = "predict_all_sets" if jepa.dense else "predict_sets"
        functions = (("encode_all", "target"), ("encode_sets", "context"), (predict, "predictor"))
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

"""Whole packed steps ask the device for nothing: no values read back, no shapes that depend on them, no waiting copies.

Two ways to look, neither needs a GPU. On a CPU every operator is watched, also those inside the kernels' plain forms.
On the meta device, whose tensors have no values, whatever reads one raises, and copies between host and device show.
(Fake CUDA tensors would do that too, but their gradients end the process where torch is built without CUDA.)
`tests/test_gpu.py` lets CUDA itself say the same of a run.
"""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastjepa.fused import Fused
from fastjepa.masks import Ragged, target_union
from fastjepa.models.operations import LIBRARY
from fastjepa.models.predictor import RowNoise
from fastjepa.noise import noise_draws
from fastjepa.optim import OptimizerPass
from fastjepa.pieces import build_operations
from fastjepa.schedules import Schedule
from tests.small_jepa import byte_clips, make, masks

CLIPS, WIDTHS = 4, (32, 48)  # the kernels take heads of 16 to 128 in steps of 8
SCHEDULE = Schedule(1000, 100, 1e-4, 1e-5, 1e-6, 0.04, 0.4, 0.998, 1.0)
LENGTHS = {"dense": {}, "grouped": {"group": 2}, "ragged": {"truncation": "none"}}
OPERATIONS = {
    "library": LIBRARY,
    "fused": Fused("reference"),
    "dense calls": build_operations("library", "auto", torch.device("cpu"))[0],
    "ragged calls": build_operations("library", "auto", torch.device("cpu"), flat=True)[0],
}
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# The plain form of attention over rows of all clips picks the rows that are there by a mask, so its host waits for
# their number. It is for tests and comparison; on a GPU `Fused` runs as "triton", whose launcher reads nothing back.
PLAIN_FORMS_THAT_WAIT = {"indexed_attention_reference"}


def reason_to_wait(function, args, kwargs):
    """Why the host waits for the device in this operator, or None."""
    name = function._opname
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return f"{name} by a mask" if masked else None
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return None
    if READS & set(function.tags):
        return name
    # Out of pageable memory a copy may wait even where it is told not to: there is to be none at all.
    target = source = None
    if name == "copy_":
        target, source = args[0].device, args[1].device
    elif name == "_to_copy":
        source = args[0].device
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else source
    return f"a copy from {source.type} to {target.type}" if source != target else None


class HostNumbers(TorchFunctionMode):
    """Collects tensors that are made of host numbers for a device: such a copy waits, and no operator shows it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        numbers = args and not isinstance(args[0], torch.Tensor)
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and numbers and kwargs.get("device") is not None:
            self.found.append(args[0])
        return function(*args, **kwargs)


class Watched(TorchDispatchMode):
    """Collects (reason, operator of the kernels that it is in) of everything the host would wait for."""

    def __init__(self):
        super().__init__()
        self.found, self.seen, self.inside, self.numbers = set(), set(), "", HostNumbers()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.seen.add(function._opname)
        if function.namespace == "fastjepa" and args_on(args, "cpu"):
            before, self.inside = self.inside, function._opname
            with self, self.numbers:  # straight to the plain form, which is watched too
                result = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            self.inside = before
            return result
        reason = reason_to_wait(function, args, kwargs)
        if reason is not None:
            self.found.add((reason, self.inside))
        return function(*args, **kwargs)


def args_on(args, device):
    flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return any(isinstance(x, torch.Tensor) and x.device.type == device for x in flat)


def without_values(arguments):
    """The arguments of a forward pass on the meta device; the sets share one seed, as they did."""
    video, context, target, draws, union = arguments
    seed = torch.empty((), dtype=torch.int64, device="meta")

    def moved(noise):
        return RowNoise(noise.keys.to("meta"), seed) if isinstance(noise, RowNoise) else noise.to("meta")

    if draws is not None:
        draws = [(timesteps.to("meta"), moved(noise)) for timesteps, noise in draws]
    sets = [[s.to("meta") for s in side] for side in (context, target)]
    return [video.to("meta"), *sets, draws, union.to("meta")]


def prepared(operations, targets, lengths):
    """(jepa in float32, arguments of its forward pass), everything on the CPU."""
    noised = targets == "noised"
    deep = {"levels": (0, 1), "dense": True} if targets == "deep" else {}
    jepa = make(noised=noised, widths=WIDTHS, rotary="v2" if targets == "rotary" else None, **deep).float()
    jepa.operations = OPERATIONS[operations]
    context, target = masks(CLIPS, **LENGTHS[lengths])
    assert (lengths == "dense") != isinstance(target[0], Ragged)
    keyed = jepa.operations.keyed_noise
    draws = noise_draws(0, range(CLIPS), target, WIDTHS[1], torch.device("cpu"), keyed=keyed) if noised else None
    return jepa, [byte_clips(CLIPS), context, target, draws, target_union(target, 32)]


def steps(jepa, arguments, update, region):
    """Two whole training steps: the second finds moments and gradients of the first, and looks at what it computes."""
    *given, union = arguments
    for number in range(2):
        with region:
            loss = jepa(*given, union=union, look=number == 1, context_weight=0.5 * number).loss
        update.backward(loss)
        if number:
            update.ema_distance()
        update.step(number, loss.detach())


# What moves the weights: torch's fused form, or one operator of the kernels.
UPDATES = dict.fromkeys(OPERATIONS, "_fused_adamw_") | {"fused": "adamw_ema__reference"}


def optimizer_pass(jepa, operations, half):
    """With copies of the matrices in half precision."""
    kernels = "reference" if operations == "fused" else None
    return OptimizerPass(jepa, SCHEDULE, clip_grad=1.0, copies=torch.bfloat16 if half else None, kernels=kernels)


def every_step(test):
    for name, values in (
        ("operations", OPERATIONS),
        ("targets", ["mask_tokens", "noised", "rotary", "deep"]),
        ("lengths", LENGTHS),
    ):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_step
def test_no_operator_of_a_step_reads_values_back(operations, targets, lengths, dtype):
    jepa, arguments = prepared(operations, targets, lengths)
    half = dtype == "bfloat16"
    region = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    update = optimizer_pass(jepa, operations, half)
    with Watched() as watched, HostNumbers() as made:
        steps(jepa, arguments, update, region)
    assert not made.found + watched.numbers.found
    assert {
        UPDATES[operations],
        "bias_gelu_reference" if operations == "fused" else "native_layer_norm_backward",
    } <= (watched.seen)
    waits = {(reason, inside) for reason, inside in watched.found if inside not in PLAIN_FORMS_THAT_WAIT}
    assert not waits
    # What is let pass is there, and no more of it.
    forms = {inside for _, inside in watched.found}
    assert forms == (PLAIN_FORMS_THAT_WAIT if operations == "fused" else set())


@every_step
def test_a_step_without_values_runs_and_copies_nothing_between_host_and_device(
    operations, targets, lengths, monkeypatch
):
    # Two questions that torch answers for devices with values only: its answers for a GPU without autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *arguments: None)
    jepa, arguments = prepared(operations, targets, lengths)
    jepa.to("meta")
    arguments = without_values(arguments)
    update = optimizer_pass(jepa, operations, half=False)
    with Watched() as watched, HostNumbers() as made:
        steps(jepa, arguments, update, nullcontext())
    assert not made.found
    assert UPDATES[operations] in watched.seen
    assert not watched.found


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("operations", OPERATIONS)
def test_a_step_with_clips_of_two_lengths_waits_for_nothing(operations, lengths):
    """Each with masks, union and share of its own; deep, dense and rotary too, which reads token numbers."""
    jepa = make(widths=WIDTHS, rotary="v2", levels=(0, 1), dense=True).float()
    jepa.operations = OPERATIONS[operations]
    drawn = [masks(CLIPS, frames=frames, **LENGTHS[lengths]) for frames in (4, 2)]
    context, target = ([sides[number] for sides in drawn] for number in (0, 1))
    video = [byte_clips(CLIPS), byte_clips(CLIPS)[:, :, :2]]
    unions = [target_union(sets, tokens) for sets, tokens in zip(target, (32, 16))]
    update = optimizer_pass(jepa, operations, half=False)
    with Watched() as watched, HostNumbers() as made:
        for number in range(2):
            loss = jepa(video, context, target, union=unions, look=number == 1, shares=(0.75, 0.25)).loss
            update.backward(loss)
            update.step(number, loss.detach())
    assert not made.found + watched.numbers.found
    assert {inside for _, inside in watched.found} == (PLAIN_FORMS_THAT_WAIT if operations == "fused" else set())


# The watch itself


X = torch.arange(4.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: X.sum().item(),
        lambda: bool(X.sum() > 0),
        lambda: float(X[0]),
        lambda: X.nonzero(),
        lambda: torch.equal(X, X + 1),
        lambda: X.masked_select(X > 1),
        lambda: X[X > 1],
        lambda: X.clone().index_put_((X > 1,), torch.tensor(1.0)),
        lambda: X.repeat_interleave(torch.tensor([1, 2, 0, 1])),
        lambda: X.unique(),
        lambda: X.to("meta"),
        lambda: X.to("meta", non_blocking=True),
        lambda: torch.empty(4, device="meta").copy_(X),
    ],
    ids=["item", "bool", "float", "nonzero", "equal", "select", "mask", "put", "repeat", "unique", "to", "to2", "copy"],
)
def test_the_watch_sees_what_waits(call):
    with Watched() as watched:
        call()
    assert len(watched.found) == 1


def test_the_watch_sees_host_numbers_on_their_way_to_a_device():
    with HostNumbers() as made:
        torch.tensor([1.0, 2.0], device=X.device)
        torch.as_tensor(0.5, dtype=torch.float64, device=X.device)
        torch.tensor([3.0])
        torch.as_tensor(X, device=X.device)
    assert made.found == [[1.0, 2.0], 0.5]


def test_the_watch_lets_other_things_pass():
    with Watched() as watched:
        X[torch.tensor([1, 2])].where(X[:2] > 1, 0.0).to(torch.bfloat16).clone()
        X.repeat_interleave(torch.tensor([1, 2, 0, 1]), output_size=4)
    assert not watched.found


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x[x > 0]])
def test_without_values_reading_them_raises(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.empty(4, device="meta"))

"""`ema_update_` and `adamw_ema_` through their references: formulas, contract, torch.compile."""

from itertools import chain

import pytest
import torch
from torch import Tensor, library, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fastjepa_kernels import adamw_ema_, ema_update_, explain
from fastjepa_kernels.reference import updates as reference
from fastjepa_kernels.testing import yardstick

SHAPES = ((33, 24), (1000,), (1,), (), (0, 3), (7, 40))


def tensors(seed: int, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def state(dtype: torch.dtype = torch.float32, count: int = 3) -> dict[str, list[Tensor]]:
    """Arguments of `adamw_ema_` as after `count` steps."""
    return {
        "parameters": tensors(0, dtype),
        "gradients": tensors(1, dtype),
        "exp_avgs": tensors(2, dtype),
        "exp_avg_sqs": [x.square() for x in tensors(3, dtype)],
        "steps": [torch.tensor(float(count)) for _ in SHAPES],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_average_is_that_of_the_training_loop(dtype, as_tensor):
    targets, onlines, momentum = tensors(0), tensors(1, dtype), 0.996
    expected = [0.996 * t.double() + 0.004 * o.double() for t, o in zip(targets, onlines)]
    ema_update_(targets, onlines, torch.tensor(momentum, dtype=torch.float64) if as_tensor else momentum)
    for target, exact in zip(targets, expected):
        assert target.dtype == torch.float32
        torch.testing.assert_close(target.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_average_of_weights_of_both_dtypes_and_more_than_one_slice():
    shapes = ((5,),) * (2 * reference.SLICE + 3)
    targets, onlines = tensors(0, shapes=shapes), tensors(1, shapes=shapes)
    onlines[40] = onlines[40].bfloat16()
    expected = [torch.lerp(t, o.float(), 0.25) for t, o in zip(targets, onlines)]
    ema_update_(targets, onlines, 0.75)
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("momentum", [1 - 1e-9, torch.tensor(1 - 1e-9, dtype=torch.float64)])
def test_a_momentum_very_near_1_keeps_its_digits(momentum):
    targets = [torch.zeros(4)]
    ema_update_(targets, [torch.ones(4)], momentum)
    assert targets[0].tolist() == pytest.approx([1e-9] * 4, rel=1e-6)


def test_momentum_1_changes_nothing_and_0_copies():
    targets, onlines = [torch.tensor([1.5, -2.0, 3e-30])], [torch.tensor([7.0, 1e30, -4.0])]
    ema_update_(targets, onlines, 1.0)
    assert targets[0].tolist() == torch.tensor([1.5, -2.0, 3e-30]).tolist()
    ema_update_(targets, onlines, 0)
    torch.testing.assert_close(targets, onlines)


def test_parameters_are_updated_in_place_and_a_graph_that_saved_them_refuses():
    target, online = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    loss = (target * target).sum()
    address = target.data_ptr()
    ema_update_([target], [online], 0.5)
    assert target.data_ptr() == address
    assert target.tolist() == [0.5] * 3
    assert target.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_that_are_not_contiguous():
    store = torch.arange(12.0).view(3, 4)
    ema_update_([store.t()[1:3]], [torch.zeros(2, 3)], 0.5)
    expected = torch.arange(12.0).view(3, 4)
    expected[:, 1:3] *= 0.5
    assert torch.equal(store, expected)


@pytest.mark.parametrize("decay", [0.0, 0.04])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95), (0.0, 0.5)])
def test_five_steps_are_those_of_torch(decay, betas):
    parameters = [nn.Parameter(x) for x in tensors(0)]
    ours, targets = tensors(0), tensors(9)
    copies = [torch.empty_like(x, dtype=torch.bfloat16) for x in ours]
    expected_targets = [x.clone() for x in targets]
    zeros = [[torch.zeros_like(x) for x in ours] for _ in range(2)]
    steps = [torch.zeros(()) for _ in ours]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=betas, eps=1e-6, weight_decay=decay, foreach=False)
    for step in range(5):
        gradients = tensors(10 + step)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient * 0.3
        optimizer.step()
        ema_update_(expected_targets, parameters, 0.9)
        adamw_ema_(
            ours, gradients, *zeros, steps, lr=3e-3, betas=betas, eps=1e-6, weight_decay=decay,
            clip_scale=torch.tensor(0.3), targets=targets, momentum=0.9, copies=copies,
        )  # fmt: skip
        for n, parameter in enumerate(parameters):
            slots = optimizer.state[parameter]
            torch.testing.assert_close(ours[n], parameter.detach(), rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(zeros[0][n], slots["exp_avg"], rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(zeros[1][n], slots["exp_avg_sq"], rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(targets[n], expected_targets[n], rtol=2e-6, atol=1e-7)
            assert torch.equal(copies[n], ours[n].bfloat16())
            assert steps[n] == slots["step"]


def test_settings_may_be_tensors_and_gradients_half_precision():
    def run(lr, decay, momentum, dtype):
        inputs, targets = state(), tensors(5)
        inputs["gradients"] = [x.to(dtype) for x in tensors(1, torch.bfloat16)]
        adamw_ema_(*inputs.values(), lr=lr, weight_decay=decay, targets=targets, momentum=momentum)
        return inputs["parameters"] + targets

    numbers = run(1e-3, 0.1, 0.99, torch.float32)
    scalars = (torch.tensor(x, dtype=torch.float64) for x in (1e-3, 0.1, 0.99))
    assert all(torch.equal(a, b) for a, b in zip(numbers, run(*scalars, torch.bfloat16)))


@pytest.mark.parametrize("count", [0, 3])
def test_a_step_that_is_left_out_changes_nothing_even_with_nan(count):
    inputs, targets = state(count=count), tensors(5)
    copies = [x.half() for x in tensors(6)]
    for gradient in inputs["gradients"]:
        gradient.fill_(float("nan"))
    everything = [*chain(*inputs.values()), *targets, *copies]
    before = [x.clone() for x in everything]
    adamw_ema_(
        *inputs.values(), lr=1e-3, clip_scale=torch.tensor(float("nan")), found_inf=torch.tensor(1.0), targets=targets,
        momentum=0.5, copies=copies,
    )  # fmt: skip
    assert all(torch.equal(a, b) or bool(a.isnan().all() and b.isnan().all()) for a, b in zip(everything, before))


def test_each_parameter_may_have_its_own_target_copies_decay_and_clipping():
    """One call does what a call for every kind of parameter does."""
    kinds = [(True, True), (True, False), (False, True), (False, False), (True, True), (False, True)]
    decays, scales = torch.arange(6.0) / 10, 1 - torch.arange(6.0) / 10
    results = []
    for together in (True, False):
        inputs, targets = state(), [x if kind[0] else None for x, kind in zip(tensors(5), kinds)]
        copies = [x.bfloat16() if kind[1] else None for x, kind in zip(tensors(6), kinds)]
        averages = [x.bfloat16() if all(kind) else None for x, kind in zip(tensors(7), kinds)]
        places = [slice(0, 6)] if together else [slice(n, n + 1) for n in range(6)]
        for place in places:
            n = place.start
            adamw_ema_(
                *(some[place] for some in inputs.values()), lr=1e-2,
                weight_decay=decays if together else decays[n].item(),
                clip_scale=scales if together else scales[n], targets=targets[place], momentum=0.9,
                copies=copies[place], target_copies=averages[place],
            )  # fmt: skip
        results.append([*chain(*inputs.values()), *targets, *copies, *averages])
        for target, average in zip(targets, averages):
            assert average is None or torch.equal(average, target.bfloat16())
    for one, other in zip(*results):
        assert one is other is None or torch.equal(one, other)


def test_the_references_follow_float64():
    shape = (33, 40)

    def average(target: Tensor, online: Tensor) -> Tensor:
        target = target.clone()
        reference.ema_update_([target], [online], torch.tensor(0.004, dtype=torch.float64))
        return target

    target, online = tensors(0, shapes=[shape, shape])
    yardstick.check(average, average, target, online)
    assert yardstick.distance(average(target, online), average(target.double(), online.double())) < 2e-7


@pytest.mark.parametrize("name", ["ema_update_", "ema_update__reference"])
def test_opcheck_of_the_average(name):
    op = getattr(torch.ops.fastjepa, name).default
    library.opcheck(op, (tensors(0), tensors(1, torch.bfloat16), torch.tensor(0.25)))


@pytest.mark.parametrize("name", ["adamw_ema_", "adamw_ema__reference"])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck_of_the_step(name, full):
    inputs = state()
    inputs.pop("steps")
    scalars = torch.tensor([[0.99, 1e-3, 0.1, 1.0, 0.0, 0.01]]).repeat(len(SHAPES), 1)
    more = (tensors(5), [x.bfloat16() for x in tensors(6)], [x.half() for x in tensors(7)]) if full else ([], [], [])
    op = getattr(torch.ops.fastjepa, name).default
    library.opcheck(op, (*inputs.values(), *more, scalars, 0.9, 0.999, 1e-8))


def test_compiled_in_one_graph_with_the_same_result():
    def both(inputs, targets, copies, momentum):
        adamw_ema_(
            *inputs.values(), lr=1e-3, found_inf=torch.zeros(()), targets=targets, momentum=0.9, copies=copies,
            impl="reference",
        )  # fmt: skip
        ema_update_(targets, inputs["parameters"], momentum, impl="reference")

    results = []
    for run in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        inputs, targets, copies = state(), tensors(5), [x.half() for x in tensors(6)]
        run(inputs, targets, copies, torch.tensor(0.5))
        results.append([*chain(*inputs.values()), *targets, *copies])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_few_recompiles_over_20_lengths_and_momenta_on_the_device():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = torch.compile(ema_update_, backend=counter, fullgraph=True)
    for n in range(20):
        target = torch.ones(n + 3, 4)
        run([target], [torch.zeros(n + 3, 4)], torch.tensor(0.5 + n / 100), impl="reference")
        assert target.mean().item() == pytest.approx(0.5 + n / 100)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("targets", "onlines", "momentum", "message"),
    [
        ([], [], 0.5, "empty"),
        ([torch.ones(2)], [], 0.5, "expected 1 onlines, got 0"),
        ([torch.ones(2)], [torch.ones(3)], 0.5, r"onlines\[0\] \[2\]"),
        ([torch.ones(2).half()], [torch.ones(2)], 0.5, "targets"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.int64)], 0.5, "int64"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], 0.5, "on meta"),
        ([torch.ones(2)], [torch.ones(2)], 1.5, "from 0 to 1"),
        ([torch.ones(2)], [torch.ones(2)], -0.5, "from 0 to 1"),
        ([torch.ones(2)], [torch.ones(2)], torch.ones(1), "0-dim"),
    ],
)
def test_mistakes_in_an_average_are_sentences(targets, onlines, momentum, message):
    with pytest.raises(ValueError, match=message):
        ema_update_(targets, onlines, momentum)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": tensors(5)}, "together"),
        ({"momentum": 0.5}, "together"),
        ({"targets": tensors(5)[:2], "momentum": 0.5}, "expected 6 targets, got 2"),
        ({"copies": tensors(5)}, r"copies\[0\]"),
        ({"copies": [None, *tensors(5)[1:]]}, r"copies\[1\]"),
        ({"copies": [None]}, "expected 6 copies, got 1"),
        ({"target_copies": tensors(5, torch.float16)}, r"target_copies\[0\] is given, and targets\[0\] is not"),
        ({"weight_decay": torch.zeros(5)}, r"weight_decay must be .* or \[6\]"),
        ({"steps": [torch.zeros(())]}, "expected 6 steps"),
        ({"steps": [torch.zeros(1)] * 6}, "0-dim float32"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"found_inf": torch.zeros(1)}, "found_inf"),
        ({"gradients": [torch.ones(1)] * 6}, r"gradients\[0\]"),
    ],
)
def test_mistakes_in_a_step_are_sentences_and_change_nothing(changes, message):
    inputs = {**state(), "lr": 1e-3, **changes}
    before = [x.clone() for x in inputs["steps"]]
    with pytest.raises(ValueError, match=message):
        adamw_ema_(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs["steps"], before))


def test_triton_by_name_raises_on_a_cpu_and_auto_says_why():
    with pytest.raises(ValueError, match="Triton"):
        ema_update_([torch.ones(2)], [torch.ones(2)], 0.5, impl="triton")
    assert "reference, because" in explain("ema_update_", torch.ones(2))


def test_the_host_reads_no_number_of_a_step():
    """Shape-only tensors have none: whoever asks raises."""
    with FakeTensorMode():
        one, step, flag = torch.empty(8), torch.empty(()), torch.empty(())
        tensors = [torch.empty(8) for _ in range(4)]
        adamw_ema_(
            [one], *([x] for x in tensors[:3]), [step], lr=flag, weight_decay=flag, clip_scale=flag, found_inf=flag,
            targets=tensors[3:], momentum=flag, impl="reference",
        )  # fmt: skip
        ema_update_([one], tensors[:1], flag, impl="reference")

"""What only a GPU can show of the kernels: precisions, repeats, CUDA graphs, streams, more than 2^31 elements."""

import pytest
import torch

from fastjepa_kernels import config
from fastjepa_kernels.testing.cases import CASES, fresh, results, yardstick

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SHAPES = [
    pytest.param(case, name, id=f"{case.name}-{name}") for case in CASES for name in case.shapes if name != "huge"
]
HUGE = [pytest.param(case, id=case.name) for case in CASES if "huge" in case.shapes]


@pytest.fixture(autouse=True)
def free():
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("case", "shape"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_results_and_gradients_are_as_exact_as_those_of_eager_pytorch(case, shape, dtype):
    inputs = case.make(case.shapes[shape], CUDA, dtype)
    yardstick(case, inputs, dtype)(results(case, case.ours(), fresh(case, inputs), dtype))


@by_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_repeat_bit_for_bit(case, dtype):
    inputs = case.make(case.shapes[case.benched()[0]], CUDA, dtype)
    first = results(case, case.ours(), fresh(case, inputs), dtype)
    for _ in range(3):
        again = results(case, case.ours(), fresh(case, inputs), dtype)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@by_name
def test_a_cuda_graph_replays_forward_and_backward(case):
    dtype = torch.bfloat16
    inputs = case.make(case.shapes["small"], CUDA, dtype)
    wanted = results(case, case.ours(), fresh(case, inputs), dtype)
    static = fresh(case, inputs)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiled before the capture
        results(case, case.ours(), static, dtype)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(case, case.ours(), static, dtype)
    for _ in range(2):
        with torch.no_grad():
            for place, value in zip(static, inputs, strict=True):
                place.copy_(value)
        for result in {id(x): x for x in found}.values():
            if all(result.data_ptr() != x.data_ptr() for x in static):
                result.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


@by_name
def test_kernels_run_on_the_current_stream(case):
    dtype = torch.bfloat16
    inputs = case.make(case.shapes["small"], CUDA, dtype)
    wanted = results(case, case.ours(), fresh(case, inputs), dtype)
    late = tuple(torch.zeros_like(x) for x in inputs)
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        # The inputs arrive late on this stream: a kernel on another one would read zeros.
        torch.cuda._sleep(50_000_000)
        for place, value in zip(late, inputs, strict=True):
            place.copy_(value)
        found = results(case, case.ours(), fresh(case, late), dtype)
    aside.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


@pytest.mark.parametrize("case", HUGE)
def test_offsets_beyond_two_to_the_31(case):
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    inputs = case.make(case.shapes["huge"], CUDA, torch.bfloat16)
    with torch.no_grad():
        found = [x.flatten()[-1_000_000:].clone() for x in case.run("triton", *(x.clone() for x in inputs))]
        torch.cuda.empty_cache()
        wanted = [x.flatten()[-1_000_000:].clone() for x in case.run("reference", *inputs)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA device")
def test_the_architecture_is_known_without_a_question_to_the_device():
    name = config.architecture_of(CUDA)
    assert name.startswith("sm_")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        assert config.architecture_of(torch.device("cuda:0")) == name
        assert not torch.cuda.current_stream().query()

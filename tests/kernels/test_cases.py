"""The cases that tests, benches and `tune` share: right by themselves, and one for everything there is."""

import pytest
import torch

import fastjepa_kernels
from fastjepa_kernels import config
from fastjepa_kernels.__main__ import OPERATIONS, main
from fastjepa_kernels.dispatch import has_triton
from fastjepa_kernels.testing.cases import CASES, case_of, fresh, results, timed, yardstick

CPU = torch.device("cpu")
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is absent: there is none for this system")


@by_name
@pytest.mark.parametrize("shape", ["small", "odd"])
def test_the_reference_the_eager_form_and_the_library_agree(case, shape):
    inputs = case.make(case.shapes[shape], CPU, torch.float32)
    exact = results(case, case.eager, fresh(case, inputs, torch.float64), torch.float32)
    for call in (case.ours("reference"), case.best or case.eager):
        found = results(case, call, fresh(case, inputs), torch.float32)
        assert len(found) == len(exact)
        for one, other in zip(found, exact):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    # float64 stays float64 in our reference, where the operation takes it.
    if case.gradients:
        found = results(case, case.ours("reference"), fresh(case, inputs, torch.float64), torch.float32)
        for one, other in zip(found, exact):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=lambda case: case.name)
@pytest.mark.parametrize("shape", ["small", "odd"])
def test_the_form_in_less_memory_has_the_numbers_of_the_eager_one(case, shape):
    inputs = fresh(case, case.make(case.shapes[shape], CPU, torch.float64))
    pairs = zip(*(results(case, call, inputs, torch.float32) for call in (case.exact, case.eager)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_a_timed_gradient_arrives_in_the_dtype_of_the_result():
    case = case_of("patch_embed_gather")  # whose first input are bytes
    inputs = fresh(case, case.make(case.shapes["small"], CPU, torch.bfloat16))
    gradients = timed(case, case.eager, inputs, "backward")()
    expected = results(case, case.eager, inputs, torch.bfloat16)[1:]
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)


@by_name
def test_the_yardstick_sees_a_wrong_result(case):
    inputs = case.make(case.shapes["small"], CPU, torch.bfloat16)
    check = yardstick(case, inputs, torch.bfloat16)
    found = results(case, case.ours("reference"), fresh(case, inputs), torch.bfloat16)
    check(found)
    for n in range(len(found)):
        wrong = [x.clone() for x in found]
        wrong[n].view(-1)[-1] += found[n].abs().max() * 0.1 + 0.1
        with pytest.raises(AssertionError, match="distance to float64"):
            check(wrong)


@by_name
def test_a_pass_can_be_called_again_and_again(case):
    inputs = fresh(case, case.make(case.shapes["small"], CPU, torch.float32))
    for which in case.passes():
        call = timed(case, case.ours("reference"), inputs, which)
        call()
        call()
    for name in case.benched():
        assert set(case.shapes[name]) == set(case.shapes["small"])


def test_every_operation_and_all_launch_settings_have_a_case():
    assert [case.name for case in CASES] == list(dict.fromkeys(case.name for case in CASES))
    # A case may have a second word: another form of the same operation.
    assert {case.name.split()[0] for case in CASES} == set(OPERATIONS)
    assert sorted(name for case in CASES for name in case.pinned) == config.operations()
    with pytest.raises(ValueError, match="rope: no case exercises these launch settings; there are adamw_ema_, "):
        case_of("rope")


@needs_triton
@pytest.mark.parametrize("operation", config.operations())
@pytest.mark.parametrize("width", [24, 384, 1000, 8192])
def test_candidates_have_the_settings_that_are_pinned(operation, width):
    from fastjepa_kernels._triton.catalogue import candidates

    names = set(config.rows(operation)[0].settings)
    tried = candidates(operation, width)
    assert 1 <= len(tried) < 200
    assert all(set(settings) == names for settings in tried)
    assert len({tuple(settings.items()) for settings in tried}) == len(tried)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a CPU alone")
def test_without_a_gpu_tune_says_so(capsys):
    assert main(["tune", "--operation", "layer_norm"]) == 2
    assert capsys.readouterr().err == "tune: needs a CUDA device and Triton, and this machine has not both\n"


def test_every_public_name_is_exported():
    assert set(OPERATIONS) < set(fastjepa_kernels.__all__)

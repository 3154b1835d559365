"""The drop-in on modules of torch alone: what it replaces, refuses, keeps and undoes."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastjepa_kernels import patch, use
from fastjepa_kernels.modules import FusedLayerNorm


class Tiny(nn.Module):
    """Patches of pictures, a norm without parameters, one in a deeper module."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 24, 4, 4)
        self.first = nn.LayerNorm(24, elementwise_affine=False)
        self.block = nn.Sequential(nn.LayerNorm(24, bias=False), nn.Linear(24, 24))
        self.last = nn.LayerNorm(24, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.proj(x).flatten(2).transpose(1, 2))
        return self.last(x + self.block(x))


def model(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    made = Tiny()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def pictures(*sizes: int) -> Tensor:
    return torch.randn(2, 3, *(sizes or (8, 12)), generator=torch.Generator().manual_seed(1))


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).sin().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_results_and_gradients_stay():
    ours, theirs = model(), model()
    report = patch(ours, strict=True)
    assert [row.module for row in report.replaced] == ["proj", "first", "block.0", "last"]
    assert report.left == []
    for x in (pictures(), pictures(9, 14)):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        for one, other in zip(gradients(ours, x), gradients(theirs, x)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_names_and_dtypes_of_the_state_stay():
    ours, theirs = model(), model()
    patch(ours)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in theirs.state_dict().items()}
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    ours.load_state_dict(model(1).state_dict())
    torch.testing.assert_close(ours(pictures()), model(1)(pictures()), rtol=1e-5, atol=1e-5)
    assert isinstance(ours.last, nn.LayerNorm)
    assert isinstance(ours.proj, nn.Conv2d)


def test_undo_restores_everything_and_once():
    ours, before = model(), model()
    report = patch(ours)
    assert classes(ours) != classes(before)
    report.undo()
    assert classes(ours) == classes(before)
    assert ours(pictures()).equal(before(pictures()))
    patch(ours)
    report.undo()
    assert isinstance(ours.last, FusedLayerNorm), "the second undo of a report has nothing left to do"


def test_undo_refuses_a_module_that_changed_since():
    ours = model()
    report = patch(ours)
    ours.last.__class__ = type("Sharded", (FusedLayerNorm,), {})
    with pytest.raises(RuntimeError, match="FusedLayerNorm has become a Sharded: undo that first"):
        report.undo()
    assert isinstance(ours.first, FusedLayerNorm)


def test_a_copy_runs_its_own_weights():
    ours = model()
    patch(ours)
    twin = copy.deepcopy(ours)
    expected = ours(pictures())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert twin(pictures()).equal(expected)
    assert not ours(pictures()).equal(expected)
    assert classes(twin) == classes(ours)


def test_saved_and_loaded_whole():
    ours = model()
    patch(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert classes(loaded) == classes(ours)
    assert loaded(pictures()).equal(ours(pictures()))


def test_hooks_keep_working():
    ours, seen = model(), []
    ours.last.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    patch(ours)
    ours.proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    ours(pictures())
    assert seen == [(2, 3, 8, 12), (2, 6, 24)]


def test_compiles_whole():
    torch._dynamo.reset()
    ours, theirs = model(), model()
    patch(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pictures()), theirs(pictures()), rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(compiled, pictures()), gradients(theirs, pictures())):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(pictures()).dtype == theirs(pictures()).dtype


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_are_those_of_torch(kind: torch.dtype, autocast: bool):
    ours, theirs = model().to(kind), model().to(kind)
    patch(ours)
    x = pictures().to(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for name in ("proj", "first"):
            one, other = (getattr(m, name)(x) for m in (ours, theirs))
            assert one.dtype == other.dtype, name
            x = other.flatten(2).transpose(1, 2) if name == "proj" else other
        narrow = nn.LayerNorm(24)
        patch(narrow, out_dtype="input")
        assert narrow(x).dtype == x.dtype


def test_norms_follow_the_autocast_of_cuda(monkeypatch: pytest.MonkeyPatch):
    """Without such a device: the rule alone."""
    from fastjepa_kernels import modules

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    for kind, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        on_cuda = type("OnCuda", (), {"is_cuda": True, "dtype": kind})()
        assert modules.norm_dtype(on_cuda) == expected
    assert modules.norm_dtype(torch.empty(1, dtype=torch.bfloat16)) == torch.bfloat16


def test_a_second_time_says_so():
    ours = model()
    patch(ours)
    again = patch(ours)
    assert again.replaced == []
    assert {row.result for row in again.left} == {"patched already"}
    again.undo()
    assert isinstance(ours.last, FusedLayerNorm)


class OwnForward(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def quantised(made: Tiny) -> None:
    made.last.weight = nn.Parameter(made.last.weight.detach().to(torch.int8), requires_grad=False)


class Shard(nn.Parameter):
    pass


def sharded(made: Tiny) -> None:
    made.last.weight = Shard(made.last.weight.detach())


def in_a_sharded_part(made: Tiny) -> None:
    made.last = type("FullyShardedDataParallel", (nn.Sequential,), {})(made.last)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "last", OwnForward(24)), "not known here"),
        (lambda m: setattr(m, "last", nn.LayerNorm((6, 24))), "normalises 2 dims"),
        (lambda m: setattr(m.last, "forward", F.gelu), "replaced on the instance"),
        (lambda m: parametrize.register_parametrization(m.last, "weight", Half()), "parametrised"),
        (lambda m: m.last.compile(backend="eager"), "compiled already"),
        (lambda m: setattr(m, "last", torch.compile(m.last, backend="eager")), "compiled already"),
        (quantised, "quantised, torch.int8"),
        (sharded, "of Shard"),
        (in_a_sharded_part, "sharded already"),
        (lambda m: setattr(m, "last", nn.MultiheadAttention(24, 2)), "not known here"),
        (lambda m: setattr(m, "last", nn.Conv2d(3, 8, 4, 4, padding=1)), "padding"),
        (lambda m: setattr(m, "last", nn.Conv2d(4, 8, 4, 4, groups=2)), "groups"),
    ],
)
def test_refusals(change: Callable[[Tiny], None], words: str):
    ours = model()
    change(ours)
    before = classes(ours)
    with pytest.raises(ValueError, match=words):
        patch(ours, strict=True)
    assert classes(ours) == before, "strict leaves the model as it was"
    report = patch(ours)
    (row,) = [row for row in report.left if row.module.startswith("last")]
    assert words in row.result
    assert type(ours.get_submodule(row.module)) in before
    assert len(report.replaced) == 3
    for part in (row.module, row.class_name, words, "as before", "3 replaced, 1 left"):
        assert part in report.table()


@pytest.fixture
def one_process(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_patched_first_and_sharded_second(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    ours, theirs, late = model(), model(), model()
    report = patch(ours)
    for part in (ours.block, ours.last, ours):
        fully_shard(part, mesh=mesh)
    torch.testing.assert_close(ours(pictures()), theirs(pictures()), rtol=1e-5, atol=1e-5)
    ours(pictures()).sin().sum().backward()
    expected = gradients(theirs, pictures())
    for parameter, other in zip(ours.parameters(), expected):
        torch.testing.assert_close(parameter.grad.full_tensor(), other, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="has become a FSDP"):
        report.undo()
    fully_shard(late.last, mesh=mesh)
    assert [row.result for row in patch(late).left] == ["sharded already: patch first, then shard"]


def test_all_of_a_compiled_model_is_refused():
    report = patch(torch.compile(model(), backend="eager"))
    assert report.replaced == []
    assert len(report.left) == 4


def test_only_what_is_asked_for():
    ours = model()
    report = patch(ours, operations={"patch_embed"}, strict=True)
    assert [row.operation for row in report.replaced] == ["patch_embed"]
    assert {row.result for row in report.left} == {"not asked for"}
    assert type(ours.last) is nn.LayerNorm
    with pytest.raises(ValueError, match=r"operations must be some of .*, got 'norm'"):
        patch(ours, operations={"norm"})
    with pytest.raises(ValueError, match="out_dtype must be one of same, input"):
        patch(ours, out_dtype="float32")


def test_an_ordinary_convolution_is_no_patch_embedding():
    for conv in (nn.Conv2d(3, 8, 3, 2), nn.Conv2d(3, 8, 1), nn.Conv1d(3, 8, 4, 4)):
        report = patch(nn.Sequential(conv))
        assert report.replaced == report.left == []


def test_pixels_that_have_a_gradient_keep_it():
    ours, theirs = model(), model()
    patch(ours)
    inputs = [pictures().requires_grad_() for _ in range(2)]
    for made, x in zip((ours, theirs), inputs):
        made(x).sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)


def test_an_implementation_that_is_forced_is_honoured():
    ours = model()
    patch(ours)
    with use("reference"):
        ours(pictures())
    with pytest.raises(ValueError, match="needs a CUDA device"), use("triton"):
        ours(pictures())


def test_inputs_that_do_not_fit_are_refused_as_before():
    ours = model()
    patch(ours)
    for norm in (ours.first, ours.last):
        with pytest.raises(ValueError, match=r"expected x \[..., 24\]"):
            norm(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="one normalised dim"):
        FusedLayerNorm((2, 24))
    # A picture without a batch is the convolution's own affair.
    assert ours.proj(pictures()[0]).equal(model().proj(pictures()[0]))

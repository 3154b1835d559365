"""The drop-in on classes with the names and arguments of the public jepa and vjepa2 code, written from their papers.

Not that code: what is held here is that a class of such a name is recognised by what it computes.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa_kernels import patch
from fastjepa_kernels.integrations import seams


class PatchEmbed3D(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, kernel_size=(2, 4, 4), stride=(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """As of the second version: the result alone; `mask` is taken and not read."""

    def __init__(self, width: int, num_heads: int, proj_drop: float = 0.0, use_sdpa: bool = True) -> None:
        super().__init__()
        self.num_heads, self.use_sdpa = num_heads, use_sdpa
        self.scale = (width // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(proj_drop)

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def merge(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.use_sdpa:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.proj_drop.p)
        else:
            out = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.merge(*self.heads(x))


V2 = Attention


class RoPEAttention(V2):
    """Positions of the tokens named by `mask`, or of a whole grid."""

    interleaved = False

    def __init__(self, width: int, num_heads: int, grid_size: int = 4) -> None:
        super().__init__(width, num_heads)
        self.grid_size = grid_size

    def turn(self, x: Tensor, place: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = place.unsqueeze(-1) * 10000.0 ** -(torch.arange(half, dtype=x.dtype) / half)
        angle = angle.repeat_interleave(2, -1) if self.interleaved else angle.tile(2)
        other = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
        return x * angle.cos() + other * angle.sin()

    def forward(self, x: Tensor, mask=None, T=None, H_patches=None, W_patches=None) -> Tensor:
        rows, columns = H_patches or self.grid_size, W_patches or self.grid_size
        ids = torch.arange(x.shape[1])[None] if mask is None else mask
        q, k, v = self.heads(x)
        part = 2 * (q.shape[-1] // 3 // 2)
        places = ids // (rows * columns), ids % (rows * columns) // columns, ids % columns

        def turned(y: Tensor) -> Tensor:
            pieces = [
                self.turn(y[..., n * part : (n + 1) * part], place.unsqueeze(1)) for n, place in enumerate(places)
            ]
            return torch.cat([*pieces, y[..., 3 * part :]], -1)

        return self.merge(turned(q), turned(k), v)


class CrossAttention(nn.Module):
    """As of the first version: a projection that is owned and not applied."""

    applied = False

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.use_sdpa = num_heads, (width // num_heads) ** -0.5, True
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        queries = self.q(q).view(*q.shape[:2], self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(*x.shape[:2], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(queries, k, v).transpose(1, 2).flatten(2)
        return self.proj(out) if self.applied else out


class Block(nn.Module):
    def __init__(self, attn: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = attn, nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor, **places) -> Tensor:
        out = self.attn(self.norm1(x), **places)
        x = x + (out[0] if isinstance(out, tuple) else out)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """One block of each kind and a pooler."""

    def __init__(self, attention: type = Attention, rope: type = RoPEAttention, cross: type = CrossAttention) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed3D(48)
        self.blocks = nn.ModuleList([Block(attention(48, 2), 48), Block(rope(48, 2), 48)])
        self.query, self.xattn = nn.Parameter(torch.zeros(1, 1, 48)), cross(48, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.patch_embed(x).gather(1, ids.unsqueeze(-1).expand(-1, -1, 48))
        for block in self.blocks:
            x = block(x, mask=ids)
        return self.xattn(self.query.expand(len(x), -1, -1), x)


class Version1:
    """The same names as the first version has them: a pair is given."""

    class Attention(V2):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
            return super().forward(x), None


class Corrected:
    class RoPEAttention(RoPEAttention):
        interleaved = True


class Applied:
    class CrossAttention(CrossAttention):
        applied = True


KINDS = [{}, {"attention": Version1.Attention}, {"rope": Corrected.RoPEAttention}, {"cross": Applied.CrossAttention}]
INPUT = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
IDS = torch.tensor([[3, 30, 11, 5, 16], [0, 21, 9, 2, 31]])


def build(**kinds) -> Encoder:
    """In float64, where results that are the same mathematics agree to many digits."""
    torch.manual_seed(0)
    model = Encoder(**kinds).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def equal(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(ours(INPUT, IDS), theirs(INPUT, IDS), rtol=1e-9, atol=1e-9)
    for model in (ours, theirs):
        model.zero_grad()
        model(INPUT, IDS).sin().sum().backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kinds", KINDS)
def test_patched_equals_unpatched_before_and_after_a_copy(kinds, monkeypatch):
    ours, theirs = build(**kinds), build(**kinds)
    before = [type(module) for module in ours.modules()]
    report = patch(ours, strict=True)
    operations = [row.operation for row in report.replaced]
    assert [operations.count(name) for name in ("attention", "rope", "layer_norm", "patch_embed")] == [3, 1, 4, 1]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    equal(ours, theirs)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    equal(twin, theirs)
    calls, attend = [], seams.attend
    monkeypatch.setattr(seams, "attend", lambda *given: calls.append(1) or attend(*given))
    ours(INPUT, IDS)
    assert len(calls) == 3
    report.undo()
    assert [type(module) for module in ours.modules()] == before
    ours.load_state_dict(theirs.state_dict())
    assert ours(INPUT, IDS).equal(theirs(INPUT, IDS))
    assert len(calls) == 3


def test_saved_and_loaded_whole():
    ours = build()
    patch(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in ours.modules()]
    assert loaded(INPUT, IDS).equal(ours(INPUT, IDS))


def test_compiles_whole():
    torch._dynamo.reset()
    ours, theirs = build(), build()
    patch(ours)
    equal(torch.compile(ours, fullgraph=True, backend="aot_eager"), theirs)


def test_positions_of_a_grid_and_of_its_sides():
    ours, theirs = (RoPEAttention(48, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    patch(ours, strict=True)
    x = torch.randn(2, 24, 48)
    for given in ({}, {"T": 2, "H_patches": 3, "W_patches": 4}, {"mask": torch.randperm(64)[None, :24]}):
        torch.testing.assert_close(ours(x, **given), theirs(x, **given), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(x), ours(x, T=2, H_patches=3, W_patches=4), atol=1e-3)


class Masked:
    class Attention(V2):
        """Reads its mask."""

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.heads(x)
            keep = None if mask is None else mask[:, None, None].bool()
            return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2))


def test_a_mask_that_a_class_reads_is_left_to_it():
    ours, theirs = (Masked.Attention(48, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    patch(ours, strict=True)
    x, mask = torch.randn(2, 5, 48), torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    for masked in (lambda m: m(x, mask), lambda m: m(x, mask=mask)):
        assert masked(ours).equal(masked(theirs))
    assert not torch.allclose(ours(x, mask), ours(x), atol=1e-3)


class Other:
    class Attention(V2):
        """Another computation under the same name."""

        def merge(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().merge(q * 1.1, k, v)


class Weights:
    class Attention(V2):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x.new_zeros(1)


class Strange:
    class Attention(V2):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().merge(q, k, v)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Other.Attention(48, 2), "something else than the published class"),
        (Weights.Attention(48, 2), "gives attention weights"),
        (Strange.Attention(48, 2), "not the published one .*missing 2 required"),
        (Attention(48, 2, proj_drop=0.1), "drops values inside"),
        (type("Attention", (nn.Linear,), {})(4, 4), "not known here"),
    ],
)
def test_another_class_of_the_same_name_is_left(module: nn.Module, words: str):
    with pytest.raises(ValueError, match=words):
        patch(nn.Sequential(module), strict=True)


def test_a_scale_is_kept_where_the_class_uses_it():
    for use_sdpa in (True, False):
        ours, theirs = (Attention(48, 2, use_sdpa=use_sdpa) for _ in range(2))
        theirs.load_state_dict(ours.state_dict())
        ours.scale = theirs.scale = 0.9
        patch(ours, strict=True)
        x = torch.randn(2, 5, 48)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_rotation_and_attention_are_asked_for_together():
    report = patch(build(), operations={"attention"})
    (row,) = [row for row in report.left if row.result != "not asked for"]
    assert row.module == "blocks.1.attn"
    assert row.result == "attention and rope are one here: ask for both"


def test_the_probe_leaves_the_module_and_the_random_numbers_alone():
    # Of a size of its own: what was probed before is not probed again.
    module = RoPEAttention(72, 3)
    module.qkv.register_forward_hook(lambda *_: pytest.fail("the module itself was run"))
    weight, state = module.qkv.weight, torch.get_rng_state()
    report = patch(module, strict=True)
    assert torch.get_rng_state().equal(state)
    assert module.qkv.weight is weight
    report.undo()
    on_meta = RoPEAttention(96, 3).to("meta")
    assert patch(on_meta, strict=True).left == []


def test_models_of_this_project_are_taken_as_well():
    layers = pytest.importorskip("fastjepa.models.layers")
    ours = layers.Block(48, 2)
    theirs = copy.deepcopy(ours)
    report = patch(ours, strict=True)
    assert {row.operation for row in report.replaced} == {"attention", "layer_norm"}
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)

"""The predictor's input in one write: what is in it, its gradients, what is refused, compile."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fastjepa_kernels import assemble_tokens, philox_normal, row_keys

CLIPS, TOKENS, SEEN, ASKED, WIDTH = 3, 16, 5, 7, 24
KINDS = ["token", "token a clip", "ready", "noised", "recorded", "ready gathered", "noised gathered"]
# Lengths of the clips of a ragged batch: some have no context, some no target.
SEEN_LENGTHS, ASKED_LENGTHS = torch.tensor([0, 4, 4, 15]), torch.tensor([0, 9, 21, 21])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def indices() -> tuple[Tensor, Tensor]:
    order = torch.rand(CLIPS, TOKENS, generator=torch.Generator().manual_seed(7)).argsort(dim=-1)
    return order[:, :SEEN], order[:, SEEN : SEEN + ASKED]


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of a kind, dense. Learned ones are leaves."""
    context_index, target_index = indices()
    given = {
        "context": leaf(normal(CLIPS, SEEN, WIDTH, dtype=dtype)),
        "context_index": context_index,
        "target_index": target_index,
        "table": normal(TOKENS, WIDTH, dtype=dtype, seed=1),
    }
    if kind.startswith("token"):
        return given | {"mask_token": leaf(normal(*([CLIPS] if "clip" in kind else []), WIDTH, dtype=dtype, seed=2))}
    tokens = TOKENS if "gathered" in kind else ASKED
    given["targets"] = leaf(normal(CLIPS, tokens, WIDTH, dtype=dtype, seed=3) * 3 + 5)
    if "gathered" in kind:
        given["gather_targets"] = True
    if "noised" in kind or kind == "recorded":
        given["alpha"] = torch.tensor([0.2, 0.5, 0.9], dtype=dtype)
    if "noised" in kind:
        given |= {"row_key": row_keys(torch.arange(CLIPS)[:, None] + 9, target_index, 1), "seed": 5}
    if kind == "recorded":
        given["noise"] = normal(CLIPS, ASKED, WIDTH, dtype=dtype, seed=4)
    return given


def flat(given: dict) -> dict:
    """The same rows in clips of other lengths."""
    rows = ("context", "context_index", "target_index", "targets", "row_key", "noise")
    given = {name: value.flatten(0, 1) if name in rows else value for name, value in given.items()}
    return given | {"context_lengths": SEEN_LENGTHS, "target_lengths": ASKED_LENGTHS}


def by_hand(given: dict) -> Tensor:
    """Clip by clip, row by row, with PyTorch's own operations; dense or ragged."""
    ragged = "context_lengths" in given
    seen_of, asked_of = (
        (lengths.tolist() if ragged else range(0, CLIPS * count + 1, count))
        for lengths, count in ((SEEN_LENGTHS, SEEN), (ASKED_LENGTHS, ASKED))
    )
    table, width = given["table"], WIDTH
    if table is None:
        table = torch.zeros(TOKENS, width)
    context = given["context"].reshape(-1, width) + table[given["context_index"].flatten()]
    clips = []
    for clip in range(CLIPS):
        index = given["target_index"].flatten()[asked_of[clip] : asked_of[clip + 1]]
        if "mask_token" in given:
            token = given["mask_token"]
            rows = (token if token.ndim == 1 else token[clip]).expand(len(index), -1)
        elif given.get("gather_targets"):
            rows = given["targets"][clip][index]
        else:
            rows = given["targets"].reshape(-1, width)[asked_of[clip] : asked_of[clip + 1]]
        if "alpha" in given:
            noise = given.get("noise")
            if noise is None:
                noise = philox_normal(given["row_key"], width, given["seed"])
            noise = noise.reshape(-1, width)[asked_of[clip] : asked_of[clip + 1]]
            share = given["alpha"][clip]
            rows = share.sqrt() * F.layer_norm(rows, (width,), eps=1e-5) + (1 - share).sqrt() * noise
        clips += [context[seen_of[clip] : seen_of[clip + 1]], rows + table[index]]
    out = torch.cat(clips)
    return out if ragged else out.view(CLIPS, -1, width)


def leaves(given: dict) -> list[Tensor]:
    return [given[name] for name in ("context", "mask_token", "targets") if name in given]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placed", [True, False], ids=["", "no table"])
def test_rows_and_gradients_are_those_of_separate_steps(kind: str, ragged: bool, placed: bool) -> None:
    if ragged and "gathered" in kind:
        return
    results = []
    for run in (lambda given: assemble_tokens(**given), by_hand):
        given = inputs(kind) | ({} if placed else {"table": None})
        out = run(flat(given) if ragged else given)
        (out * normal(*out.shape, seed=8)).sum().backward()
        results.append([out, *(x.grad for x in leaves(given))])
    assert results[0][0].shape == ((CLIPS * (SEEN + ASKED), WIDTH) if ragged else (CLIPS, SEEN + ASKED, WIDTH))
    assert results[0][0].is_contiguous()
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_derivatives(kind: str, ragged: bool) -> None:
    if ragged and "gathered" in kind:
        return
    given = inputs(kind, torch.float64)
    names = [name for name in ("context", "mask_token", "targets") if name in given]

    def run(*learned: Tensor) -> Tensor:
        full = given | dict(zip(names, learned))
        # A column of zeros would hide nothing, and few columns are enough.
        return assemble_tokens(**(flat(full) if ragged else full))[..., :3]

    assert torch.autograd.gradcheck(run, tuple(leaves(given)), fast_mode=True)


def test_alpha_of_all_of_clips_and_of_rows() -> None:
    given = inputs("noised")
    for leading in ((), (CLIPS,), (CLIPS, ASKED)):
        given["alpha"] = torch.full(leading, 0.25)
        out = assemble_tokens(**given)
        given["alpha"] = torch.full((CLIPS,), 0.25)
        assert out.equal(assemble_tokens(**given))
    given["alpha"] = torch.linspace(0, 1, CLIPS * ASKED).view(CLIPS, ASKED)
    rows = assemble_tokens(**given)[:, SEEN:]
    place, noise = given["table"][given["target_index"]], philox_normal(given["row_key"], WIDTH, 5)
    torch.testing.assert_close(rows[0, 0], (noise + place)[0, 0])
    torch.testing.assert_close(rows[-1, -1], (F.layer_norm(given["targets"], (WIDTH,)) + place)[-1, -1])


def test_the_packing_does_not_change_the_noise_of_a_row() -> None:
    given = inputs("noised")
    dense, gathered = assemble_tokens(**given), inputs("noised gathered")
    ragged = assemble_tokens(**flat(given) | {"alpha": torch.full((CLIPS,), 0.5)})
    same = assemble_tokens(**given | {"alpha": torch.full((CLIPS,), 0.5)})
    place = torch.cat([torch.arange(21)[a:b] + c for a, b, c in ((0, 9, 4), (9, 21, 4))])
    assert ragged[place].equal(same[:, SEEN:].flatten(0, 1))
    rows = torch.gather(gathered["targets"], 1, given["target_index"].unsqueeze(-1).expand(-1, -1, WIDTH))
    assert assemble_tokens(**gathered).equal(assemble_tokens(**given | {"targets": rows}))
    one = {
        name: value[1:2] if isinstance(value, Tensor) and name != "table" else value for name, value in given.items()
    }
    assert assemble_tokens(**one).equal(dense[1:2])


def test_dtypes_of_results_and_gradients() -> None:
    for kind, out_dtype in (("token", None), ("ready", torch.float32), ("noised", torch.float32)):
        given = inputs(kind)
        given = {
            name: leaf(value.bfloat16()) if name in ("context", "mask_token", "targets") else value
            for name, value in given.items()
        }
        out = assemble_tokens(**given, out_dtype=out_dtype)
        assert out.dtype == (out_dtype or torch.bfloat16)
        out.float().sin().sum().backward()
        assert all(x.grad.dtype == torch.bfloat16 for x in leaves(given))


def test_nothing_seen_or_nothing_asked_is_fine() -> None:
    none = torch.zeros(CLIPS, 0, dtype=torch.int64)
    for kind in KINDS:
        given = inputs(kind) | {"context": leaf(normal(CLIPS, 0, WIDTH)), "context_index": none}
        out = assemble_tokens(**given)
        assert out.shape == (CLIPS, ASKED, WIDTH)
        assert out.isfinite().all()
        out.sum().backward()
        assert leaves(given)[1].grad.isfinite().all()
    for kind in ("token", "noised gathered", "ready gathered"):
        given = inputs(kind) | {"target_index": none}
        if "row_key" in given:
            given["row_key"] = none
        assemble_tokens(**given).sum().backward()
        assert given["context"].grad.equal(torch.ones(CLIPS, SEEN, WIDTH))
        assert (leaves(given)[1].grad == 0).all()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    given = inputs("noised")
    given["targets"] = given["targets"].detach()
    assemble_tokens(**given).sum().backward()
    assert given["targets"].grad is None
    given = inputs("token")
    given["context"] = given["context"].detach()
    assemble_tokens(**given).sum().backward()
    assert given["mask_token"].grad.equal(torch.full((WIDTH,), float(CLIPS * ASKED)))
    given["mask_token"] = given["mask_token"].detach()
    assert not assemble_tokens(**given).requires_grad


def operands(given: dict) -> tuple:
    names = ("context", "context_index", "target_index", "table", "mask_token", "targets", "alpha", "row_key")
    seed = torch.tensor(5) if "seed" in given else None
    rest = given.get("noise"), given.get("context_lengths"), given.get("target_lengths")
    return *(given.get(n) for n in names), seed, *rest, 1e-5, given.get("gather_targets", False), torch.float32


@pytest.mark.parametrize("form", ["", "_reference"])
def test_torch_accepts_the_operators(form: str) -> None:
    run = getattr(torch.ops.fastjepa, f"assemble_tokens{form}").default
    for kind, ragged in (("token", True), ("noised", False), ("ready gathered", False)):
        given = inputs(kind)
        library.opcheck(run, operands(flat(given) if ragged else given))
        library.opcheck(run, operands(given | {"table": None}))
    plain = {name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs("ready").items()}
    library.opcheck(run, operands(plain | {"context": plain["context"].transpose(0, 1).contiguous().transpose(0, 1)}))
    total = getattr(torch.ops.fastjepa, f"sum_of_targets{form}").default
    library.opcheck(total, (normal(CLIPS, 12, WIDTH), SEEN, CLIPS, None, None))
    library.opcheck(total, (normal(36, WIDTH), 15, CLIPS, SEEN_LENGTHS, ASKED_LENGTHS))


@pytest.mark.parametrize("kind", ["token", "noised gathered"])
def test_compiles_whole_with_few_recompiles_over_many_lengths(kind: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    names = ("context", "mask_token", "targets")

    def step(given: dict) -> Tensor:
        return assemble_tokens(**given, out_dtype=torch.float32, impl="reference")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    order = torch.rand(CLIPS, 64, generator=torch.Generator().manual_seed(7)).argsort(dim=-1)
    for seen in range(2, 22):
        results = []
        for run in (compiled, step):
            given = inputs(kind) | {
                "table": normal(64, WIDTH),
                "context": leaf(normal(CLIPS, seen, WIDTH)),
                "context_index": order[:, :seen],
                "target_index": order[:, 22 : 62 - seen],
            }
            if "targets" in given:
                given["targets"] = leaf(normal(CLIPS, 64, WIDTH))
                given["row_key"], given["seed"] = row_keys(1, given["target_index"]), torch.tensor(seen)
            out = run(given)
            out.sin().sum().backward()
            results.append([out, *(given[name].grad for name in names if name in given)])
        assert all(ours.equal(theirs) for ours, theirs in zip(*results))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_repeats_bit_by_bit() -> None:
    def results(kind: str) -> list[Tensor]:
        given = inputs(kind)
        out = assemble_tokens(**given)
        out.sin().sum().backward()
        return [out, *(x.grad for x in leaves(given))]

    for kind in KINDS:
        assert all(one.equal(other) for one, other in zip(results(kind), results(kind)))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("token", {"context": normal(CLIPS, WIDTH)}, r"expected context, context_index and target_index \[B, Kc, P\]"),
        ("token", {"context_index": indices()[0][:, 1:]}, r"\[3, 5, 24\], \[3, 4\] and \[3, 7\]"),
        ("token", {"target_index": indices()[1][1:]}, r"\[3, 5\] and \[2, 7\]"),
        ("token", {"context_index": indices()[0].float()}, "index must be int32 or int64"),
        ("token", {"target_index": indices()[1].bool()}, "index must be int32 or int64"),
        ("token", {"context": torch.zeros(CLIPS, SEEN, WIDTH).long()}, "x must be of a floating dtype"),
        ("token", {"table": normal(TOKENS, WIDTH + 1)}, r"expected table \[N, 24\], got \[16, 25\]"),
        ("token", {"table": leaf(normal(TOKENS, WIDTH))}, "table is a constant here and gets no gradient"),
        ("token", {"mask_token": None}, "give either mask_token or targets"),
        ("token", {"targets": normal(CLIPS, ASKED, WIDTH)}, "give either mask_token or targets"),
        ("token", {"mask_token": normal(1, 1, WIDTH)}, r"mask_token must be \[24\] or \[3, 24\], got \[1, 1, 24\]"),
        ("token", {"mask_token": normal(WIDTH).long()}, "mask_token must be floating"),
        ("token", {"seed": 3}, "need targets, not mask_token"),
        ("token", {"gather_targets": True}, "need targets, not mask_token"),
        ("ready", {"targets": normal(CLIPS, SEEN, WIDTH)}, r"targets must be \[3, 7, 24\], got \[3, 5, 24\]"),
        ("ready gathered", {"targets": normal(CLIPS, ASKED, WIDTH)}, r"targets must be \[3, 16, 24\]"),
        ("ready", {"targets": torch.zeros(CLIPS, ASKED, WIDTH).int()}, "targets must be floating"),
        ("ready", {"seed": 3}, "need alpha"),
        ("noised", {"alpha": torch.rand(2)}, "alpha must have leading dims"),
        ("noised", {"row_key": None}, "row_key and seed are needed"),
        ("noised", {"noise": normal(CLIPS, ASKED, WIDTH)}, "not both"),
        ("noised", {"eps": -1.0}, "eps must not be negative"),
        ("noised", {"out_dtype": torch.int32}, "out_dtype must be a floating dtype"),
        ("noised", {"context_lengths": SEEN_LENGTHS}, r"target_index \[R, P\], \[R\] and \[R\]"),
        ("token", {"impl": "triton"}, "CUDA device"),
        ("token", {"impl": "fast"}, "impl must be one of"),
    ],
)
def test_mistakes_are_sentences(kind: str, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        assemble_tokens(**inputs(kind) | changes)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("token", {"target_lengths": None}, "go together"),
        ("token", {"target_lengths": ASKED_LENGTHS[1:]}, "target_lengths must be cumulative"),
        ("token", {"context_lengths": torch.tensor(3)}, "context_lengths must be cumulative"),
        ("token", {"context_lengths": SEEN_LENGTHS.float()}, "context_lengths must be int32 or int64"),
        ("token", {"mask_token": normal(2, WIDTH)}, r"mask_token must be \[24\] or \[3, 24\]"),
        ("noised", {"alpha": torch.tensor(0.5)}, r"alpha must be \[3\]"),
        ("noised", {"alpha": leaf(torch.rand(CLIPS))}, "alpha is a constant here"),
        ("ready", {"gather_targets": True}, "gather_targets needs clips of one length"),
    ],
)
def test_mistakes_with_lengths_are_sentences(kind: str, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        assemble_tokens(**flat(inputs(kind)) | changes)


def test_flops_are_counted_as_for_torch_own() -> None:
    with FlopCounterMode(display=False) as counter:
        assemble_tokens(**inputs("noised")).sum().backward()
    assert counter.get_total_flops() == 0

"""The cases of each stage: the calls that are timed, at the sizes of `bench.ceilings.shapes`.

Letters: M rows, N outputs and K inputs of a linear layer; B batch, H heads, L tokens of a sample, D channels of a head.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ceilings.shapes import Attention, Shapes
from bench.measure import Call, Case, attention_backward_flops, attention_forward_flops, gemm_flops

BF16 = torch.bfloat16


def linears(width: int) -> dict[str, tuple[int, int]]:
    """(N, K) of the four linear layers of a block, at the usual MLP ratio of 4."""
    return {
        "qkv": (3 * width, width),
        "proj": (width, width),
        "fc1": (4 * width, width),
        "fc2": (width, 4 * width),
    }


def layer_products(shapes: Shapes) -> list[tuple[str, int, int, int]]:
    """(name, M, N, K) of every linear layer: the encoders at target and at packed context rows, then the predictor."""
    target_rows, context_rows = shapes.batch * shapes.tokens, shapes.batch * sum(shapes.context)
    cases = []
    for name, width, _ in shapes.encoders:
        for role, rows in (("target", target_rows), ("context", context_rows)):
            cases += [(f"{name}.{role}.{layer}", rows, n, k) for layer, (n, k) in linears(width).items()]
    inner, rows = shapes.predictor_width, shapes.batch * sum(shapes.predictor)
    cases += [(f"predictor.{layer}", rows, n, k) for layer, (n, k) in linears(inner).items()]
    for name, width, _ in shapes.encoders:
        cases.append((f"predictor.embed.{name}", context_rows, inner, width))
        cases.append((f"predictor.out.{name}", shapes.batch * sum(shapes.target), width, inner))
    return cases


def gemm_call(m: int, n: int, k: int, direction: str, device: torch.device) -> Call:
    """One product of a linear layer x [M, K] -> y [M, N] with weight [N, K], laid out as autograd calls it; no bias."""
    # Random values, not zeros: a card that multiplies zeros draws less power and clocks higher.
    x, weight, dy = (torch.randn(shape, device=device, dtype=BF16) for shape in ((m, k), (n, k), (m, n)))
    if direction == "forward":
        return partial(torch.mm, x, weight.t())
    if direction == "input_gradient":
        return partial(torch.mm, dy, weight)
    assert direction == "weight_gradient"
    return partial(torch.mm, dy.t(), x)


def gemm_case(name: str, m: int, n: int, k: int, direction: str, share: float = 1.0) -> Case:
    """The case of one product in one direction."""
    return Case(
        name,
        partial(gemm_call, m, n, k, direction),
        work=gemm_flops(m, n, k),
        unit="TFLOP/s",
        parameters={"m": m, "n": n, "k": k, "direction": direction, "dtype": "bfloat16"},
        share=share,
        watch_load=True,
    )


def gemm(shapes: Shapes) -> Iterator[Case]:
    """Products at all linear layers, three directions each, then one for long enough to see the clock settle."""
    for name, m, n, k in layer_products(shapes):
        for direction in ("forward", "input_gradient", "weight_gradient"):
            yield gemm_case(f"{name}.{direction}", m, n, k, direction)
    name, width, _ = shapes.encoders[-1]
    n, k = linears(width)["fc1"]
    yield gemm_case(f"{name}.target.fc1.sustained", shapes.batch * shapes.tokens, n, k, "forward", share=16.0)


def copy_call(size: int, kind: str, device: torch.device) -> Call:
    """Move `size` bytes from one bf16 tensor to another: by the driver's copy, or by an elementwise kernel."""
    source = torch.randn(size // 2, device=device, dtype=BF16)
    target = torch.empty_like(source)
    if kind == "copy":
        return partial(target.copy_, source)
    assert kind == "scale"
    return partial(torch.mul, source, 2.0, out=target)


def copy(shapes: Shapes) -> Iterator[Case]:
    """Memory bandwidth, bytes read plus bytes written."""
    for mib in shapes.copy_mib:
        for kind in ("copy", "scale"):
            size = mib * 2**20
            yield Case(
                f"{kind}.{mib}MiB",
                partial(copy_call, size, kind),
                work=2 * size,
                unit="GB/s",
                parameters={"bytes": size, "kind": kind},
            )


SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa_forward(
    device: torch.device, case: Attention, backend: str
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """Dense attention on [B, H, L, D] views of [B, L, H, D] memory, which is how a qkv projection leaves them."""
    shape = (len(case.lengths), case.lengths[0], case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=BF16).transpose(1, 2).requires_grad_() for _ in range(3))

    def forward() -> torch.Tensor:
        with sdpa_kernel(SDPA[backend]):
            return F.scaled_dot_product_attention(q, k, v)

    return forward, [q, k, v]


def varlen_forward(device: torch.device, case: Attention) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """torch's variable-length attention on packed rows [sum of L, H, D]."""
    from torch.nn.attention.varlen import varlen_attn  # ImportError where torch has none: a reason to skip, not to stop

    shape = (sum(case.lengths), case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=BF16).requires_grad_() for _ in range(3))
    ends = torch.tensor((0, *case.lengths), device=device).cumsum(0).to(torch.int32)
    longest = max(case.lengths)

    def forward() -> torch.Tensor:
        out = varlen_attn(q, k, v, ends, ends, longest, longest)
        assert isinstance(out, torch.Tensor)  # it returns a pair only where auxiliary results are asked for
        return out

    return forward, [q, k, v]


def attention_call(case: Attention, backend: str, direction: str, device: torch.device) -> Call:
    """Attention in one direction; "backward" differentiates one kept forward again and again."""
    forward, inputs = varlen_forward(device, case) if backend == "varlen" else sdpa_forward(device, case, backend)
    if direction == "forward":
        return torch.no_grad()(forward)
    out = forward()
    gradient = torch.randn_like(out)
    if direction == "backward":
        return partial(torch.autograd.grad, out, inputs, gradient, retain_graph=True)
    assert direction == "forward_backward"
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def attention_flops(case: Attention, direction: str) -> int:
    """Operations of one call, summed over samples that may differ in length."""
    forward = sum(attention_forward_flops(1, case.heads, length, case.head_dim) for length in case.lengths)
    backward = sum(attention_backward_flops(1, case.heads, length, case.head_dim) for length in case.lengths)
    return {"forward": forward, "backward": backward, "forward_backward": forward + backward}[direction]


def attention(shapes: Shapes) -> Iterator[Case]:
    """Every backend at every attention shape. Samples of unequal length are for varlen alone."""
    for case in shapes.attention:
        dense = len(set(case.lengths)) == 1
        for backend in (*SDPA, "varlen") if dense else ("varlen",):
            for direction in ("forward", "backward", "forward_backward"):
                yield Case(
                    f"{case.name}.{backend}.{direction}",
                    partial(attention_call, case, backend, direction),
                    work=attention_flops(case, direction),
                    unit="TFLOP/s",
                    share=0.3,
                    parameters={
                        "heads": case.heads,
                        "head_dim": case.head_dim,
                        "lengths": {length: case.lengths.count(length) for length in sorted(set(case.lengths))},
                        "backend": backend,
                        "direction": direction,
                        "dtype": "bfloat16",
                    },
                )


def cut_patches(clips: torch.Tensor) -> torch.Tensor:
    """[B, 3, T, S, S] -> [B * L, 1536]: tubelets of 2 x 16 x 16 in the order in which a conv3d weight stores them."""
    batch, channels, frames, height, width = clips.shape
    parts = clips.view(batch, channels, frames // 2, 2, height // 16, 16, width // 16, 16)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, channels * 2 * 16 * 16)


def conv_call(shapes: Shapes, width: int, kind: str, device: torch.device) -> Call:
    """Patch embedding by conv3d or by cutting patches and multiplying, forward or gradient of the weight."""
    clips = torch.randn(shapes.batch, 3, shapes.frames, shapes.crop, shapes.crop, device=device, dtype=BF16)
    weight = torch.randn(width, 3, 2, 16, 16, device=device, dtype=BF16)
    matrix, patches = weight.view(width, -1), cut_patches(clips)
    if kind == "conv3d.forward":
        return partial(F.conv3d, clips, weight, None, (2, 16, 16))
    if kind == "conv3d.weight_gradient":
        out = F.conv3d(clips, weight.requires_grad_(), None, (2, 16, 16))
        return partial(torch.autograd.grad, out, weight, torch.randn_like(out), retain_graph=True)
    if kind == "cut_gemm.forward":
        return lambda: torch.mm(cut_patches(clips), matrix.t())
    if kind == "gemm.forward":
        return partial(torch.mm, patches, matrix.t())
    assert kind == "gemm.weight_gradient"
    gradient = torch.randn(patches.shape[0], width, device=device, dtype=BF16)
    return partial(torch.mm, gradient.t(), patches)


def conv(shapes: Shapes) -> Iterator[Case]:
    """The 2 x 16 x 16 patch embedding, each way; a weight gradient uses the patches that the forward pass kept."""
    m = shapes.batch * (shapes.frames // 2) * (shapes.crop // 16) ** 2
    k = 3 * 2 * 16 * 16
    kinds = ("conv3d.forward", "cut_gemm.forward", "gemm.forward", "conv3d.weight_gradient", "gemm.weight_gradient")
    for name, width, _ in shapes.encoders:
        for kind in kinds:
            yield Case(
                f"{name}.{kind}",
                partial(conv_call, shapes, width, kind),
                work=gemm_flops(m, width, k),
                unit="TFLOP/s",
                parameters={"m": m, "n": width, "k": k, "kind": kind, "dtype": "bfloat16"},
            )


def parameter_shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    """Shapes of all parameters of a video ViT: 304M at 1024 x 24, 631M at 1280 x 32."""
    block: list[tuple[int, ...]] = [(width,)] * 4  # two norms
    for n, k in linears(width).values():
        block += [(n, k), (n,)]
    return [(width, 3, 2, 16, 16), (width,), *block * depth, (width,), (width,)]


def optimizer_call(sizes: list[tuple[int, ...]], kind: str, device: torch.device) -> Call:
    """One AdamW step, or one EMA update, over float32 parameters of these shapes."""
    parameters = [torch.randn(size, device=device, requires_grad=True) for size in sizes]
    if kind == "ema_foreach_lerp":
        targets = [torch.randn(size, device=device) for size in sizes]
        return torch.no_grad()(partial(torch._foreach_lerp_, targets, parameters, 0.001))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    assert kind in ("adamw_foreach", "adamw_fused")
    adamw = torch.optim.AdamW(parameters, lr=1e-4, foreach=kind == "adamw_foreach", fused=kind == "adamw_fused")
    return adamw.step


# Bytes per parameter that the mathematics needs. AdamW reads parameter, gradient and two moments and writes three of
# them back; the EMA reads two and writes one. An implementation that makes more passes shows as a lower rate.
OPTIMIZER_BYTES = {"adamw_foreach": 28, "adamw_fused": 28, "ema_foreach_lerp": 12}


def optimizer(shapes: Shapes) -> Iterator[Case]:
    """AdamW and the target's EMA over the parameters of each encoder."""
    for name, width, depth in shapes.encoders:
        sizes = parameter_shapes(width, depth)
        count = sum(torch.Size(size).numel() for size in sizes)
        for kind, per_parameter in OPTIMIZER_BYTES.items():
            yield Case(
                f"{name}.{kind}",
                partial(optimizer_call, sizes, kind),
                work=per_parameter * count,
                unit="GB/s",
                parameters={"parameters": count, "tensors": len(sizes), "bytes_per_parameter": per_parameter},
            )


def layer_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """LayerNorm as torch's bf16 kernel computes it."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None)


def layer_norm_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """LayerNorm as autocast runs it: float32, with a cast on each side."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, None).to(x.dtype)


def gelu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The exact GELU; the weight is for a common signature."""
    return F.gelu(x)


ELEMENTWISE = {"layer_norm": layer_norm, "layer_norm_fp32": layer_norm_fp32, "gelu": gelu}


def elementwise_call(m: int, k: int, name: str, mode: str, direction: str, allowed: bool, device: torch.device) -> Call:
    """One pass over bf16 [M, K]; "forward_backward" takes the gradient of the input as well."""
    if not allowed:
        raise NotImplementedError("a quick run compiles one function only, compilation takes seconds")
    x = torch.randn(m, k, device=device, dtype=BF16, requires_grad=True)
    weight, gradient = torch.ones(k, device=device), torch.randn(m, k, device=device, dtype=BF16)
    function = torch.compile(ELEMENTWISE[name], dynamic=False) if mode == "compiled" else ELEMENTWISE[name]
    if direction == "forward":
        return torch.no_grad()(partial(function, x, weight))
    return lambda: torch.autograd.grad(function(x, weight), x, gradient)


# Bytes per element that the mathematics needs in bf16: read x and write y; then read x and dy and write dx.
ELEMENTWISE_BYTES = {"forward": 4, "forward_backward": 10}


def elementwise(shapes: Shapes) -> Iterator[Case]:
    """LayerNorm at the encoder's width and GELU at its MLP's, eager and compiled."""
    m = shapes.batch * shapes.tokens
    for encoder, width, _ in shapes.encoders:
        for name in ELEMENTWISE:
            k = 4 * width if name == "gelu" else width
            for mode in ("eager", "compiled"):
                for direction, per_element in ELEMENTWISE_BYTES.items():
                    allowed = mode == "eager" or name in shapes.compiled
                    yield Case(
                        f"{encoder}.{name}.{mode}.{direction}",
                        partial(elementwise_call, m, k, name, mode, direction, allowed),
                        work=per_element * m * k,
                        unit="GB/s",
                        share=0.3,
                        parameters={
                            "m": m,
                            "k": k,
                            "mode": mode,
                            "direction": direction,
                            "bytes_per_element": per_element,
                        },
                    )


def fp8_call(m: int, n: int, k: int, kind: str, device: torch.device) -> Call:
    """[M, K] by [K, N] from inputs that are e4m3 already, a scale for each row and column; or the same in bf16."""
    x, weight = (torch.randn(rows, k, device=device, dtype=BF16) for rows in (m, n))
    if kind == "bf16":
        return partial(torch.mm, x, weight.t())
    if not hasattr(torch, "_scaled_mm"):
        raise NotImplementedError("this torch has no _scaled_mm")
    return partial(
        torch._scaled_mm,
        x.to(torch.float8_e4m3fn),
        weight.to(torch.float8_e4m3fn).t(),
        scale_a=torch.ones(m, 1, device=device),
        scale_b=torch.ones(1, n, device=device),
        out_dtype=BF16,
        use_fast_accum=kind == "fp8_fast_accumulation",
    )


def fp8(shapes: Shapes) -> Iterator[Case]:
    """Row-scaled fp8 products of the target encoder's wide layers, with bf16 beside them at the same temperature."""
    m = shapes.batch * shapes.tokens
    for name, width, _ in shapes.encoders:
        for layer in ("qkv", "fc1"):
            n, k = linears(width)[layer]
            for kind in ("bf16", "fp8", "fp8_fast_accumulation"):
                yield Case(
                    f"{name}.{layer}.{kind}",
                    partial(fp8_call, m, n, k, kind),
                    work=gemm_flops(m, n, k),
                    unit="TFLOP/s",
                    parameters={"m": m, "n": n, "k": k, "kind": kind},
                    watch_load=True,
                )


STAGES: dict[str, Callable[[Shapes], Iterator[Case]]] = {
    "gemm": gemm,
    "copy": copy,
    "attention": attention,
    "conv": conv,
    "optimizer": optimizer,
    "elementwise": elementwise,
    "fp8": fp8,
}

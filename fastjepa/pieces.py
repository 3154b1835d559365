"""The packed pass piece by piece: which implementation computes each, by name or by a table of measurements."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastjepa_kernels as kernels
from fastjepa.attending import Dispatched, Indexed
from fastjepa.config import Piece
from fastjepa.fused import Fused
from fastjepa.models.layers import MLP, Attention, Block, SwiGLU
from fastjepa.models.operations import LIBRARY, Operations
from fastjepa.models.rows import Dropped, Wanted

PIECES: tuple[Piece, ...] = get_args(Piece)


# What every piece computes: methods of `Operations`.
METHODS: dict[Piece, tuple[str, ...]] = {
    "embed": ("cut", "embed_all", "embed_sets"),
    "assemble": ("assemble",),
    "norm": ("norm", "norm_through", "project", "add_norm"),
    "mlp": ("hidden",),
    "attention": ("layout", "attend", "attend_wanted", "take"),
    "loss": ("targets",),
    "update": ("move_",),
}


class Composite(Operations):
    """Every piece by an implementation of its own; blocks compiled and recomputed as asked."""

    def __init__(self, pieces: Mapping[Piece, Operations]) -> None:
        self.pieces = pieces
        for piece, names in METHODS.items():
            for name in names:
                setattr(self, name, getattr(pieces[piece], name))
        self.keyed_noise = pieces["assemble"].keyed_noise
        self.recomputed = 0
        self._block: Callable[..., tuple[Tensor, Tensor]] = super().block
        self._finish: Callable[..., Tensor] = super().finish
        self._within: Callable[..., Any] = lambda block, run, *rows: run(*rows)

    def run_blocks_by(self, compile: Callable[[Callable], Callable] | None, recomputed: int) -> None:
        """Compile blocks with this function, and compute the first `recomputed` of a network again in backward."""
        self.recomputed = recomputed
        if compile is not None:
            self._block, self._finish = compile(super().block), compile(super().finish)

    def run_within(self, within: Callable[..., Any]) -> None:
        """Run every block inside `within(block, run, *rows)`, which returns `run(*rows)`."""
        self._within = within

    def check(self, network: nn.Module) -> None:
        """What every piece has to say of a network."""
        for piece, operations in self.pieces.items():
            (operations.check if piece == "attention" else operations.check_layers)(network)

    def feed_forward(self, mlp: MLP | SwiGLU, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """By `mlp` where it is more than `hidden` and a product."""
        piece = self.pieces["mlp"]
        return piece.feed_forward(mlp, x) if piece.with_product else super().feed_forward(mlp, x)

    def block(
        self,
        number: int,
        block: Block,
        after: nn.Module,
        normed: Tensor,
        x: Tensor,
        layout: Any,
        kept: bool,
        dropped: Dropped | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compiled where that was asked for; recomputed where gradients are wanted."""

        def run(normed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            rows = partial(self._block, 0, block, after)
            if number < self.recomputed and torch.is_grad_enabled():
                # No random numbers are drawn in a block.
                return checkpoint(rows, normed, x, layout, kept, dropped, use_reentrant=False, preserve_rng_state=False)
            return rows(normed, x, layout, kept, dropped)

        return self._within(block, run, normed, x)

    def last_block(
        self,
        block: Block,
        after: nn.Module,
        normed: Tensor,
        x: Tensor,
        layout: Any,
        wanted: Wanted,
        kept: bool,
        dropped: Dropped | None = None,
    ) -> Tensor:
        """As in `Operations`."""
        last = super().last_block
        return self._within(block, lambda n, y: last(block, after, n, y, layout, wanted, kept, dropped), normed, x)

    def finish(
        self, block: Block, after: nn.Module, mixed: Tensor, x: Tensor, kept: bool, dropped: Dropped | None = None
    ) -> Tensor:
        """Compiled where that was asked for."""
        return self._finish(block, after, mixed, x, kept, dropped)


_NAMES = {"library": "torch's own functions", "fused": "fastjepa_kernels, fused with the product"}


def choices(wanted: str | Mapping[Any, str], architecture: str) -> dict[Piece, tuple[str, str]]:
    """(implementation, why) of every piece: the one that was asked for, or what the table says of the architecture.

    `wanted` names one for all pieces, or some pieces' own; the others are `auto`. `architecture` is e.g. "sm_90".
    """
    table = json.loads(resources.files("fastjepa").joinpath("pieces.json").read_text())
    found: dict[Piece, tuple[str, str]] = {}
    for piece in PIECES:
        asked = wanted if isinstance(wanted, str) else wanted.get(piece, "auto")
        measured = table[piece].get(architecture)
        if asked != "auto":
            found[piece] = asked, "asked for"
        elif measured is not None:
            found[piece] = measured["kernels"], f"measured {measured['speed']:g} times as fast ({measured['results']})"
        else:
            found[piece] = "library", "no measurement says that fastjepa_kernels are faster here"
    return found


def build_operations(
    wanted: str | Mapping[Any, str],
    attention: str,
    device: torch.device,
    *,
    deterministic: bool = False,
    flat: bool = False,
    group: int | None = None,
) -> tuple[Composite, list[str]]:
    """What the packed pass runs through on this device, and lines that say why.

    `wanted` as for `choices`, `attention` a backend of `fastjepa_kernels.attention` or auto; `flat` and `group` as for
    `Dispatched`. Errors: ValueError where something that was asked for cannot run here.
    """
    chosen = choices(wanted, _architecture(device))
    if attention != "auto":
        chosen["attention"] = "library", "asked for"
    made: dict[Piece, Operations] = {}
    for piece, (name, _) in chosen.items():
        if name in ("triton", "fused"):
            reason = kernels.why_not_triton(torch.empty(0, device=device))
            if reason:
                raise ValueError(f"runtime.kernels: expected what runs on this machine, given {name}: {reason}")
        made[piece] = _implementation(name)
    own, why = chosen.pop("attention")
    if own == "library":
        made["attention"] = Dispatched(attention, deterministic=deterministic, flat=flat, group=group)
    else:
        made["attention"] = Indexed("triton" if own == "triton" else "reference", flat=flat, group=group, why=why)
    return Composite(made), _lines(chosen)


def explain_attention(operations: Composite, networks: Sequence[Attention], like: Tensor) -> str:
    """One line: what computes the attention of encoder and predictor, and why.

    `like` has the device and dtype that attention works in. Errors: ValueError where that cannot run here.
    """
    piece = operations.pieces["attention"]
    if isinstance(piece, Indexed):
        ragged = "; the library's ragged attention in the last block of the target encoder" if piece.flat else ""
        return f"attention  indexed_attention, {piece.impl}, {piece.why}{ragged}"
    assert isinstance(piece, Dispatched)
    try:
        told = [piece.explain(one.num_heads, one.head_dim, like) for one in networks]
    except ValueError as error:
        raise ValueError(str(error).replace("attention:", "runtime.attention:", 1)) from None
    same = len(set(told)) == 1
    return f"attention  {told[0]}" if same else f"attention  encoder: {told[0]}; predictor: {told[1]}"


def update_kernels(wanted: str | Mapping[Any, str], device: torch.device) -> kernels.Impl | None:
    """The implementation of `adamw_ema_` that the optimizer pass takes; None takes torch's functions."""
    name = choices(wanted, _architecture(device))["update"][0]
    return None if name == "library" else name  # type: ignore[return-value]


def explained(wanted: str | Mapping[Any, str], attention: str, device: torch.device) -> dict[Piece, str]:
    """One line for every piece: what computes it on this device, and why."""
    told = {piece: f"{_NAMES.get(name, f'fastjepa_kernels, {name} implementations')}: {why}"
            for piece, (name, why) in choices(wanted, _architecture(device)).items()}  # fmt: skip
    return told | ({"attention": "the library: asked for"} if attention != "auto" else {})


def _implementation(name: str) -> Operations:
    if name == "library":
        return LIBRARY
    if name == "reference":
        return Fused("reference")
    return Fused("triton", with_product=name == "fused")


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _lines(chosen: dict[Piece, tuple[str, str]]) -> list[str]:
    """Pieces that share an implementation and a reason share a line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for piece, choice in chosen.items():
        groups.setdefault(choice, []).append(piece)
    lines = []
    for (name, why), pieces in groups.items():
        told = _NAMES.get(name, f"fastjepa_kernels, {name} implementations")
        which = "" if len(groups) == 1 else f"{', '.join(pieces)}: "
        lines.append(f"kernels    {which}{told}: {why}" if name == "library" else f"kernels    {which}{told}, {why}")
    return lines

"""Weights into a JEPA: every key and every shape, or nothing is copied."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastjepa.fit import (
    TABLES,
    Clip,
    Networks,
    architecture,
    clip_of,
    clip_of_file,
    differences,
    heads_of,
    loaded_lines,
    positions_of,
    settings_to_change,
    state_of,
    tables_to_make,
)
from fastjepa.interop.generation import mask_tokens, trained_first_only
from fastjepa.interop.meta import MetaCheckpoint
from fastjepa.interop.weights import Weights, WeightsRefused
from fastjepa.jepa import JEPA

SHOWN_DIFFERENCES = 8
# The public code averages its fixed tables into the target encoder: rounding drifts them this far at most.
SAME_TABLE = 1e-3


@torch.no_grad()
def load_weights(jepa: JEPA, weights: Weights) -> list[str]:
    """Copy the three networks into a JEPA, in place; returns the report, a line each.

    From a file with one encoder (and a predictor) both encoders begin with it. Mask tokens of rotary networks need not
    be as many as the model's: where number 0 alone was trained, every mask set begins with it, else with that of its
    number, counted around.

    Values become the dtype of the model. Clips may be of another length and size than those of the checkpoint: rotary
    positions know no size, and position tables stay the model's own then. Errors: WeightsRefused with the settings to
    change and the differences, each with what was expected and what was given; nothing is copied then.
    """
    networks, said = _completed(jepa, weights)
    # Of shapes alone (no heads) the clips of a run are a guess.
    settings = None if weights.heads is None else weights.settings
    clip = clip_of_file(networks, settings)
    anew = tables_to_make(jepa, networks, clip)
    wrong = list(settings_to_change(jepa, networks, weights.heads))
    if (style := _positions_of(weights)) != positions_of(jepa):
        wrong.append(f"model.positions: the file was trained with {style}, the settings have {positions_of(jepa)}")
    unlike = list(differences(jepa, networks, tables=not anew))
    if wrong or unlike:
        more = len(unlike) - SHOWN_DIFFERENCES
        shown = [*wrong, *unlike[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
        raise WeightsRefused("\n  ".join([f"{weights.path} does not fit the settings:", *shown]))
    live = state_of(jepa)
    pairs = [(key, ours, networks[name][key]) for name, state in live.items() for key, ours in state.items()]
    tables = [(ours.cpu(), tensor) for key, ours, tensor in pairs if key in TABLES.values()]
    if anew:  # both are sines of the same numbers where the grids overlap
        own = clip_of(jepa).grid
        tables = [(_overlap(a, own, clip.grid), _overlap(b, clip.grid, own)) for a, b in tables if clip.grid and own]
    drift = max(((ours - given).abs().max().item() for ours, given in tables), default=None)
    for key, ours, tensor in pairs:
        if not (anew and key in TABLES.values()):
            ours.copy_(tensor)
    return _report(jepa, weights, clip, anew, drift, said)


def _positions_of(weights: Weights) -> str:
    """The model.positions of weights: of their settings; without any, rotary ones are those of the published files."""
    told = architecture(weights.networks).settings().get("model.positions", "table")
    return str((weights.settings or {}).get("model.positions", told))


def _completed(jepa: JEPA, weights: Weights) -> tuple[Networks, list[str]]:
    """The three networks as this JEPA takes them, and lines that say what was made of what.

    Of one encoder both begin; mask tokens of V-JEPA 2 are chosen by the content of the file. Errors: WeightsRefused.
    """
    networks, said = dict(weights.networks), []
    one, other = ("encoder", "target_encoder") if "encoder" in networks else ("target_encoder", "encoder")
    if other not in networks and "predictor" in networks:
        networks[other] = networks[one]
        said.append(f"one encoder in the file: encoder and target encoder both begin with its {one.replace('_', ' ')}")
    missing = [] if one in networks else ["encoder"]
    missing += [] if "predictor" in networks else ["predictor"]
    if missing:
        raise WeightsRefused(
            f"{weights.path} has no {' and no '.join(missing)}: a run begins with an encoder and a predictor at least "
            "(`export --all` and `import` write both)"
        )
    given, own = mask_tokens(networks["predictor"]), jepa.predictor.mask_tokens
    if architecture(networks).rotary and given and isinstance(own, nn.ParameterList):
        alone = trained_first_only(given) and jepa.mask_token_by == "set"
        if alone or len(given) != len(own):
            chosen = [given[0 if alone else number % len(given)] for number in range(len(own))]
            rest = {key: t for key, t in networks["predictor"].items() if not key.startswith("mask_tokens.")}
            networks["predictor"] = rest | {f"mask_tokens.{number}": token for number, token in enumerate(chosen)}
            said.append(_chosen(len(given), len(own), alone))
    return networks, said


def _chosen(given: int, own: int, alone: bool) -> str:
    if alone:
        return f"mask tokens: the file has {given}, and number 0 alone was trained: all {own} begin with it"
    way = ", counted around" if own > given else ""
    return f"mask tokens: the file has {given}, the settings {own}: they begin with those of the same number{way}"


def _overlap(table: Tensor, grid: tuple[int, ...], other: tuple[int, ...]) -> Tensor:
    """The places of a table [1, N, E] of one grid that another grid has too."""
    return table.reshape(*grid, -1)[tuple(slice(min(pair)) for pair in zip(grid, other))]


def load_moments(state: dict[str, Tensor], loaded: MetaCheckpoint) -> None:
    """Copy AdamW's moments of a checkpoint into the live tensors of `OptimizerPass.state()`, all or none.

    Errors: WeightsRefused where the parameters differ.
    """
    stored = {f"optim.{slot}.{name}": v for name, slots in loaded.moments().items() for slot, v in slots.items()}
    live = {name: tensor for name, tensor in state.items() if not name.startswith("optim.skipped")}
    if live.keys() != stored.keys() or any(live[name].shape != stored[name].shape for name in live):
        names = sorted(live.keys() ^ stored.keys())[:3] or sorted(n for n in live if live[n].shape != stored[n].shape)
        raise WeightsRefused(f"{loaded.path}: its moments are not those of this model: {', '.join(names[:3])}")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(stored[name])


def _report(
    jepa: JEPA, weights: Weights, clip: Clip, anew: bool, drift: float | None, said: Sequence[str]
) -> list[str]:
    heads = heads_of(jepa)
    source = "from the settings, for the file does not tell them" if weights.heads is None else "as in that run"
    lines = [
        f"{weights.path}, {weights.description}",
        *loaded_lines(state_of(jepa)),
        *said,
        _positions(jepa, clip, anew, drift),
        f"heads: {heads[0]} in the encoder, {heads[1]} in the predictor, {source}",
        f"ignored: {'; '.join(weights.ignored) or 'nothing'}",
        f"licence: {weights.licence}",
    ]
    return [f"{'' if number else 'weights':<11}{line}" for number, line in enumerate(lines)]


def _positions(jepa: JEPA, clip: Clip, anew: bool, drift: float | None) -> str:
    """What became of positions; `drift` is how far the file's tables are from the model's, where both can be seen."""
    own = clip_of(jepa)
    near = "" if drift is None else f"equal to the settings' within {drift:.1g}"
    if drift is not None and not drift < SAME_TABLE:
        near = f"up to {drift:.2g} from the settings': is model.uniform_power right?"
    if not anew and drift is not None:
        return f"position tables are the file's, {near}"
    changed = f"from {clip} to {own}, {own.tokens} tokens a clip"
    if anew:
        return f"{changed}: position tables are made for them" + (f"; the file's are {near}" if near else "")
    if clip.grid == own.grid:
        return "positions are rotary, clips as in that run"
    if clip.tokens is None:
        return f"positions are rotary: the file does not tell its clips, now {own}, {own.tokens} tokens a clip"
    return f"{changed}: rotary positions need no other weights"

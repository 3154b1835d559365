"""Weights into a JEPA: every key and every shape, or nothing is copied."""

import torch
from torch import Tensor

from fastjepa.fit import NETWORKS, differences, heads_of, loaded_lines, settings_to_change, state_of
from fastjepa.interop.meta import MetaCheckpoint
from fastjepa.interop.weights import Weights, WeightsRefused
from fastjepa.jepa import JEPA

SHOWN_DIFFERENCES = 8
# The public code averages its fixed tables into the target encoder: rounding drifts them this far at most.
SAME_TABLE = 1e-3


@torch.no_grad()
def load_weights(jepa: JEPA, weights: Weights) -> list[str]:
    """Copy the three networks into a JEPA, in place; returns the report, a line each.

    Values become the dtype of the model. Errors: WeightsRefused with the settings to change and the differences, each
    with what was expected and what was given; nothing is copied then.
    """
    missing = [name.replace("_", " ") for name in NETWORKS if name not in weights.networks]
    if missing:
        raise WeightsRefused(
            f"{weights.path} has no {' and no '.join(missing)}: a run begins with all three networks "
            "(`export --all` and `import` write them)"
        )
    wrong = list(settings_to_change(jepa, weights.networks, weights.heads))
    unlike = list(differences(jepa, weights.networks))
    if wrong or unlike:
        more = len(unlike) - SHOWN_DIFFERENCES
        shown = [*wrong, *unlike[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])]
        raise WeightsRefused("\n  ".join([f"{weights.path} does not fit the settings:", *shown]))
    live = state_of(jepa)
    pairs = [(key, ours, weights.networks[name][key]) for name, state in live.items() for key, ours in state.items()]
    drift = max((ours.cpu() - tensor).abs().max().item() for key, ours, tensor in pairs if key.endswith("pos_embed"))
    for _, ours, tensor in pairs:
        ours.copy_(tensor)
    return _report(jepa, weights, drift)


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


def _report(jepa: JEPA, weights: Weights, drift: float) -> list[str]:
    heads = heads_of(jepa)
    source = "from the settings, for the file does not tell them" if weights.heads is None else "as in that run"
    near = f"equal to the settings' within {drift:.1g}"
    far = f"up to {drift:.2g} from the settings': is model.uniform_power right?"
    lines = [
        f"{weights.path}, {weights.description}",
        *loaded_lines(state_of(jepa)),
        f"position tables are the file's, {near if drift < SAME_TABLE else far}",
        f"heads: {heads[0]} in the encoder, {heads[1]} in the predictor, {source}",
        f"ignored: {'; '.join(weights.ignored) or 'nothing'}",
        f"licence: {weights.licence}",
    ]
    return [f"{'' if number else 'weights':<11}{line}" for number, line in enumerate(lines)]

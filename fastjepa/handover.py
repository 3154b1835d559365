"""Weights handed over: from wherever they lie to a folder in the transformers layout, or to the public code's file."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastjepa.data.source import SYNTHETIC
from fastjepa.fit import NETWORKS, Networks, loaded_lines
from fastjepa.interop import Weights, WeightsRefused, read_weights, write_folder, write_meta_checkpoint
from fastjepa.interop.card import Probed
from fastjepa.interop.commit import refuse_taken
from fastjepa.interop.generation import other_mask_token
from fastjepa.interop.meta import options_of
from fastjepa.interop.weights import heads_of_settings
from fastjepa.opened import load_encoder, settings_of

Format = Literal["transformers", "meta"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hand_over(
    source: str | Path,
    out: str | Path,
    format: Format = "transformers",
    *,
    network: str | None = None,
    everything: bool | None = False,
    dtype: str | None = None,
    licence: str | None = None,
    trained_on: str | None = None,
) -> list[str]:
    """Write the weights at `source` to `out`; returns the report, a line each.

    `network`: the encoder that the folder is for, None the target encoder, beside which rotary networks have their
    predictor; with `everything` all three are written, which `format` meta always does, and with None as many as there
    are. `dtype` None keeps what is stored: the values stay the same to the bit. `licence` names one for weights that
    have none; `trained_on` is for the card. Errors: WeightsRefused (a ValueError) with one sentence; OSError.
    """
    out = Path(out).expanduser()
    refuse_taken(out)
    weights = _licensed(read_weights(source), licence)
    settings = settings_of(weights)
    if settings.model.levels == "deep" or settings.loss.context:
        raise WeightsRefused(
            f"{weights.path}: networks of model.levels=deep or loss.context have no published layout: expected others "
            f"for an export, given model.levels {settings.model.levels} and loss.context {settings.loss.context:g} "
            "(embed and init.from take them as they are)"
        )
    network = weights.network(network)
    if dtype is not None:
        weights = _converted(weights, DTYPES[dtype])
    for name in ("encoder", "target_encoder"):
        if name in weights.networks:
            load_encoder(settings, weights.networks[name], f"{weights.path}: {name}")
    doubled = ""
    if format == "meta":
        weights, doubled = _with_both_encoders(weights)
    if everything is None:
        everything = len(weights.networks) == len(NETWORKS)
    everything = everything or format == "meta"
    if format == "meta":
        write_meta_checkpoint(weights, settings, out)
    else:
        if everything and len(weights.networks) < len(NETWORKS):
            raise WeightsRefused(f"{weights.path} holds one encoder only: expected all three networks for --all")
        write_folder(
            weights,
            settings,
            out,
            network,
            everything=everything,
            probed=list(probes_of(weights)),
            trained_on=_trained_on(weights) if trained_on is None else trained_on,
        )
    written = weights.networks if everything else {network: weights.networks[network]}
    if settings.model.positions != "table" and "predictor" in weights.networks:  # one file holds both
        written = written | {"predictor": weights.networks["predictor"]}
    report = list(_report(weights, out, written, format, options_of(settings)))
    if doubled:
        report.insert(-1, f"note       {doubled}")
    if format == "transformers" and (token := other_mask_token(settings, written)):
        report.insert(-1, f"note       {token}")
    if settings.model.positions != "table" and weights.heads is None:
        model = settings.model
        known = heads_of_settings({"model.name": model.name, "model.predictor_heads": model.predictor_heads})
        assert known is not None  # every name of the settings is a size
        encoder, predictor = known
        guess = f"{encoder} in the encoder, {predictor} in the predictor: as published, for the file does not tell them"
        report.insert(-1, f"heads      {guess}")
    return report


def probes_of(weights: Weights) -> Iterator[Probed]:
    """What the run of these weights was last probed with, up to their step; nothing where it has not been.

    The files are those of `probe/` in the run folder: JSON with `step`, `probe` and `results`.
    """
    run = next((folder for folder in weights.path.parents[:2] if (folder / "config.yaml").is_file()), None)
    latest: dict[str, tuple[int, list[Any]]] = {}
    for file in sorted((run / "probe").glob("step-*.json")) if run is not None else []:
        try:
            content = json.loads(file.read_text())
            step, kind, results = int(content["step"]), str(content["probe"]), list(content["results"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another kind of file: a card without it is still a card
        if weights.step is None or step <= weights.step:
            latest[kind] = max(latest.get(kind, (-1, [])), (step, results), key=lambda one: one[0])
    for kind, (step, results) in latest.items():
        for result in results:
            if isinstance(result, dict) and isinstance(result.get("trained"), float):
                chance = result.get("chance")
                yield Probed(
                    kind,
                    str(result.get("task", "")),
                    result["trained"],
                    chance if isinstance(chance, float) else None,
                    step,
                )


def _licensed(weights: Weights, licence: str | None) -> Weights:
    if licence is None:
        return weights
    name = licence.strip().lower()
    if weights.licence_id and weights.licence_id != name:
        raise WeightsRefused(
            f"--licence: {weights.path} carries {weights.licence_id} from what it was trained from, and keeps it; "
            f"given {licence!r}"
        )
    if not name or not all(c.isalnum() or c in ".-_+" for c in name):
        raise WeightsRefused(f"--licence: expected a name as model cards use it, such as apache-2.0, given {licence!r}")
    return weights if weights.licence_id else replace(weights, licence=f"{name}, named at export", licence_id=name)


def _with_both_encoders(weights: Weights) -> tuple[Weights, str]:
    """With one encoder twice where the other is missing, as runs begin with such weights; and a line that says so."""
    both = ("encoder", "target_encoder")
    found = [name for name in both if name in weights.networks]
    if len(found) != 1:
        return weights, ""
    (other,) = set(both) - set(found)
    networks = {**weights.networks, other: weights.networks[found[0]]}
    words = f"one encoder in what was read: it is written as the {other.replace('_', ' ')}, too"
    return replace(weights, networks=networks), words


def _converted(weights: Weights, dtype: torch.dtype) -> Weights:
    networks = {name: {k: t.to(dtype) for k, t in state.items()} for name, state in weights.networks.items()}
    return replace(weights, networks=networks)


def _trained_on(weights: Weights) -> str:
    """What the run's `data.path` says, without the folders of somebody's disk."""
    path = (weights.settings or {}).get("data.path")
    if isinstance(path, dict):
        shares = [share["weight"] if isinstance(share, dict) else share for share in path.values()]
        return ", ".join(f"{_last_name(str(one))} (weight {share})" for one, share in zip(path, shares))
    return "" if path is None else _last_name(str(path))


def _last_name(path: str) -> str:
    return f"{path} (drawn clips)" if path.startswith(SYNTHETIC) else Path(path).name


def _report(weights: Weights, out: Path, written: Networks, format: Format, options: str) -> Iterator[str]:
    yield f"from       {weights.path}, {weights.description}"
    for number, line in enumerate(loaded_lines(written)):
        yield f"{'' if number else 'weights':<11}{line}"
    kinds = sorted({str(t.dtype).removeprefix("torch.") for state in written.values() for t in state.values()})
    yield f"precision  {', '.join(kinds)}"
    left = [f"{name} (not asked for)" for name in weights.networks if name not in written]
    yield f"ignored    {'; '.join([*left, *weights.ignored]) or 'nothing'}"
    yield f"licence    {weights.licence}" + ("" if weights.licence_id else _unnamed(weights))
    if format == "meta":
        yield (
            f"note       the public code{options} evaluates this file (checkpoint_key: target_encoder); it "
            "cannot go on training from it, for the state of its optimizer is not there"
        )
    elif "predictor" not in written:
        yield "note       an encoder for features; a run begins from all three networks (--all)"
    elif len(written) < len(NETWORKS):
        yield "note       one encoder: both of a run that goes on from here begin with it"
    yield f"written    {out}"


def _unnamed(weights: Weights) -> str:
    return " to choose: --licence NAME puts it on the card" if weights.licence == "yours" else ""

"""The model card of exported weights: what they are, whose they are, how they are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastjepa.config import Settings
from fastjepa.interop.passport import Passport
from fastjepa.models.vision_transformer import SIZES
from fastjepa.schedules import build_schedule

NAMES = {"target_encoder": "target encoder (the moving average, which evaluations use)", "encoder": "encoder"}


@dataclass(frozen=True)
class Probed:
    """A result of a probe of the run, for the card: shares of 1."""

    probe: str
    task: str
    accuracy: float
    chance: float | None
    step: int | None


def card(
    passport: Passport,
    settings: Settings,
    name: str,
    network: str,
    probed: Sequence[Probed],
    trained_on: str,
    everything: bool,
    note: str = "",
) -> str:
    """README.md: YAML front matter as model hubs read it, then words. `name`: that of the folder.

    `note`: what transformers makes of the folder otherwise than the run did.
    """
    size, data = SIZES[settings.model.name], settings.data
    tokens = (data.frames // data.tubelet) * (data.crop // data.patch) ** 2
    if data.fps is not None:
        pace = f"at {data.fps:g} frames/s"
    elif data.duration is not None:
        pace = f"over {data.duration:g} s"
    else:
        pace = f"at stride {data.stride}"
    second = settings.model.positions != "table"
    paper, kind = ("2506.09985", "V-JEPA 2") if second else ("2404.08471", "V-JEPA")
    front = [
        "---",
        *_licence_entries(passport),
        f"library_name: {'transformers' if second else 'fastjepa'}",
        "pipeline_tag: feature-extraction",
        "tags: [video, self-supervised, v-jepa, vision-transformer]",
        "---",
    ]
    words = [
        f"# {name}",
        f"A {kind} video encoder ([arXiv {paper}](https://arxiv.org/abs/{paper})), {settings.model.name}: the "
        f"{NAMES[network]} of {passport.description}. It turns a clip of {data.frames} frames {pace}, {data.crop} x "
        f"{data.crop} pixels, into {tokens} tokens of {size['embed_dim']} numbers.",
        "## Load",
        "```python\nfrom fastjepa.opened import open_encoder\n\n"
        f'encoder = open_encoder("{name}").encoder\n'
        f"tokens = encoder(clips)  # float32 [B, 3, {data.frames}, {data.crop}, {data.crop}] -> "
        f"[B, {tokens}, {size['embed_dim']}]\n```",
        "Features of video files:",
        f'```python\nfrom fastjepa.features import embed\n\nfeatures = embed("{name}", "video.mp4").features\n```',
        *_with_transformers(name, second),
        *([f"{note[0].upper()}{note[1:]}."] if note else []),
        "Pixels are scaled to 0..1, then normalised with mean "
        "(0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225); `video_preprocessor_config.json` says how frames "
        "are cut."
        + (
            f" `pretraining.safetensors` holds the other {'encoder' if second else 'two networks'}, so that a run can "
            f"begin from this folder (`init.from={name}`)."
            if everything
            else ""
        ),
        "## Licence",
        _licence_words(passport),
        "## Training",
        _training(passport, settings, trained_on),
    ]
    if probed:
        rows = ["| probe | task | accuracy | chance | step |", "|---|---|---|---|---|"]
        rows += [
            f"| {p.probe} | {p.task} | {p.accuracy:.1%} | {'' if p.chance is None else f'{p.chance:.1%}'} | "
            f"{'' if p.step is None else p.step} |"
            for p in probed
        ]
        words += ["## Probes of frozen features", "\n".join(rows)]
    return "\n".join(front) + "\n\n" + "\n\n".join(words) + "\n"


def _with_transformers(name: str, second: bool) -> list[str]:
    """How transformers loads the folder, with an example."""
    if second:
        return [
            "transformers loads it by itself:",
            "```python\nfrom transformers import AutoModel\n\n"
            f'model = AutoModel.from_pretrained("{name}")\n'
            "tokens = model(clips, skip_predictor=True).last_hidden_state  # clips [B, T, 3, H, W]\n```",
        ]
    return [
        "transformers itself has no class for V-JEPA of the first generation (its `VJEPA2Model` is another network, "
        "with rotary positions). With fastjepa installed its `AutoModel` takes this folder:",
        "```python\nimport fastjepa.transformers_model\nfrom transformers import AutoModel\n\n"
        f'model = AutoModel.from_pretrained("{name}")\n'
        "tokens = model(pixel_values_videos=clips).last_hidden_state  # clips [B, T, 3, H, W]\n```",
    ]


def _licence_entries(passport: Passport) -> list[str]:
    if passport.licence_id:
        return [f"license: {passport.licence_id}"]
    return ["license: other", "license_name: not-chosen-yet"]


def _licence_words(passport: Passport) -> str:
    if passport.licence_id:
        return f"`{passport.licence_id}`: {passport.licence}."
    if passport.licence == "yours":
        return (
            "Yours to choose: these weights were trained from random ones. Whoever hands them on names a licence here "
            "and in the first lines of this file (`export --licence NAME` does both)."
        )
    return f"Not known: {passport.licence}."


def _rates(settings: Settings) -> str:
    """Of the whole recipe; the last rate is the one that the last step has, which may lie far from `final_lr`."""
    o = settings.optim
    first = f"{o.start_lr:g} -> {o.lr:g}" if o.warmup_steps else f"{o.lr:g}"
    if o.decay == "constant":
        return f"{first}, constant"
    last = "" if o.decay_steps is None else f" over the last {o.decay_steps:,} steps"
    way = f", {o.decay}{last}" if o.decay != "cosine" or last else ""
    return f"{first} -> {build_schedule(settings).lr_at(o.steps - 1):.3g}{way}"


def _training(passport: Passport, settings: Settings, trained_on: str) -> str:
    if not passport.recipe:
        return "Trained elsewhere, with the public V-JEPA code or in its layout; the recipe is not in the weights."
    o, plan = settings.optim, build_schedule(settings)
    steps = o.steps if passport.step is None else passport.step
    lines = [
        f"- data: {trained_on or 'not described'}",
        f"- {steps:,} of {o.steps:,} steps of {o.global_batch} clips, {o.dtype}",
        f"- learning rate {_rates(settings)} ({o.warmup_steps:,} steps of warm-up), weight "
        f"decay {o.weight_decay:g} -> {plan.weight_decay_at(o.steps - 1):.3g}, momentum {o.momentum:g} -> "
        f"{plan.momentum_at(o.steps):.5g}",
        f"- predictor: {settings.model.predictor_depth} blocks, {settings.model.predictor_dim} wide, "
        f"{settings.model.targets.replace('_', ' ')}; masks: {settings.mask.kind}, "
        f"{settings.mask.number_of_sets} a clip",
    ]
    return "\n".join(lines) + "\n\nEvery setting stands in `config.json`."

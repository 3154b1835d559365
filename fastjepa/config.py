"""Every setting of a run: type, default, help, limits and what a changed value means for a resume.

`model mask data loss optim init compat` change results; `runtime log checkpoint eval` change speed and what is kept. A
YAML file holds what differs from the defaults (`fastjepa.configfile` reads it). Nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from fastjepa.settings.base import Resume, Section, setting
from fastjepa.settings.results import Compat, Data, DataSet, FeedForward, Init, Loss, Mask, MaskSet, Model, Optim
from fastjepa.settings.speed import Checkpoint, Eval, Log, Piece, Runtime

__all__ = [
    "SECTIONS",
    "Data",
    "DataSet",
    "Eval",
    "FeedForward",
    "Init",
    "Log",
    "Loss",
    "Mask",
    "MaskSet",
    "Model",
    "Optim",
    "Piece",
    "Runtime",
    "Section",
    "Settings",
    "by_key",
    "changed",
    "fields",
    "flat",
    "identity",
    "resume_class",
]


class Settings(Section):
    """All settings of a run."""

    model: Model = Model()
    mask: Mask = Mask()
    data: Data = Data()
    loss: Loss = Loss()
    optim: Optim = Optim()
    init: Init = Init()
    runtime: Runtime = Runtime()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    compat: Compat = Compat()
    resume: str = setting(
        "auto", "auto continues this run if it exists, never starts a new one, PATH continues that run", "free"
    )
    accept_changes: bool = setting(
        False, "with resume=PATH: go on although settings that change results are not those of the run", "free"
    )

    @property
    def group(self) -> int:
        """The truncation group in force, in videos: a group larger than the batch becomes the batch."""
        return min(self.mask.group, max(1, self.videos_per_step))

    @property
    def videos_per_step(self) -> int:
        """Videos of one optimizer step, each of which gives data.clips_per_video clips."""
        return self.optim.global_batch // self.data.clips_per_video

    @property
    def last_step(self) -> int:
        """Where this run ends."""
        return self.runtime.stop_at or self.optim.steps


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def by_key(kind: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section by the names that a settings file uses."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order of the help."""
    for name, field in Settings.model_fields.items():
        if name in SECTIONS:
            yield from ((f"{name}.{key}", inner) for key, inner in by_key(SECTIONS[name]).items())
        else:
            yield name, field


def resume_class(field: FieldInfo) -> Resume:
    """What a changed value of this field means for a resume."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "every setting is made by setting()"
    return extra["resume"]  # type: ignore[return-value]


def flat(settings: Settings) -> dict[str, Any]:
    """Dotted key -> plain value (lists, numbers, strings), for comparison and JSON.

    Options of a mask set that are off are left out of it: sets are compared and hashed whole, and those of runs from
    before these options are the same.
    """
    dump = settings.model_dump(mode="json", by_alias=True)
    for one in dump["mask"]["sets"]:
        for option in ("full_complement", "pred_full_complement", "inv_block"):
            if not one[option]:
                del one[option]
    return {key: dump[key.split(".")[0]][key.split(".")[1]] if "." in key else dump[key] for key, _ in fields()}


def changed(old: dict[str, Any], new: dict[str, Any], kind: Resume) -> list[str]:
    """Keys of this class whose values differ, each as "key: old -> new"; a key missing in `old` had the default."""
    defaults = flat(Settings())
    return [
        f"{key}: {old.get(key, defaults[key])} -> {new[key]}"
        for key, field in fields()
        if resume_class(field) == kind and old.get(key, defaults[key]) != new[key]
    ]


def identity(settings: Settings, data: str) -> str:
    """Six hex digits that name the run: a hash of the fatal settings that differ from the defaults, and of the data.

    Defaults are left out so that a setting added later does not rename old runs. `data` is the fingerprint of the file
    list: relative names, so that a folder that moved keeps its runs, and other videos get a run of their own.
    """
    values, defaults = flat(settings), flat(Settings())
    fatal = {k: values[k] for k, f in fields() if resume_class(f) == "fatal" and values[k] != defaults[k]}
    return hashlib.sha256(json.dumps([fatal, data], sort_keys=True).encode()).hexdigest()[:6]

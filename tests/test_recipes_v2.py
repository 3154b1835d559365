"""The recipes of V-JEPA 2: every value of the published table, what follows from it, and that their phases fit."""

from math import sqrt
from pathlib import Path

import pytest

from fastjepa import config, configfile
from fastjepa.__main__ import main
from fastjepa.exits import Exit
from fastjepa.interop.card import card
from fastjepa.interop.passport import Passport
from fastjepa.log import read_metrics
from fastjepa.schedules import build_schedule
from fastjepa.start import start

CONFIGS = Path(__file__).parents[1] / "configs"
FIRST = {"vjepa2_vitl": "vit_large", "vjepa2_vith": "vit_huge", "vjepa2_vitg": "vit_giant_xformers"}
# name -> (encoder, GPUs, clips of each, pixels, tokens of a clip)
SECOND = {
    "vjepa2_vitl_cooldown": ("vit_large", 32 * 8, 12, 256, 8192),
    "vjepa2_vith_cooldown": ("vit_huge", 32 * 8, 12, 256, 8192),
    "vjepa2_vitg_cooldown": ("vit_giant_xformers", 64 * 8, 6, 256, 8192),
    "vjepa2_vitg_384_cooldown": ("vit_giant_xformers", 64 * 8, 6, 384, 18_432),
}
ONE_GPU = {"vjepa2_vitl_1gpu": "vjepa2_vitl", "vjepa2_vitl_1gpu_cooldown": "vjepa2_vitl_cooldown"}
# What both phases of all sizes have in common (arXiv 2506.09985, the public files and their defaults).
COMMON = {
    "model.positions": "rope_v2",
    "model.mlp": "gelu",
    "model.predictor_mlp": "gelu",
    "model.drop_path": 0.0,
    "model.predictor_depth": 12,
    "model.predictor_dim": 384,
    "model.predictor_heads": 12,
    "model.targets": "mask_tokens",
    "model.zero_init_mask_tokens": True,
    "model.init_std": 0.02,
    "mask.kind": "multiblock",
    "mask.truncation": "group",
    "data.fps": 4,
    "data.duration": None,
    "data.tubelet": 2,
    "data.patch": 16,
    "data.scale": [0.3, 1.0],
    "data.aspect": [0.75, 1.35],
    "data.flip": True,
    "data.antialias": False,
    "data.motion_shift": False,
    "data.erase": 0.0,
    "data.auto_augment": False,
    "data.clips_per_video": 1,
    "data.filter_short": False,
    "loss.exponent": 1.0,
    "loss.reg_coeff": 0.0,
    "optim.global_batch": 3072,
    "optim.lr": 5.25e-4,
    "optim.weight_decay": 0.04,
    "optim.final_weight_decay": 0.04,
    "optim.momentum": 0.99925,
    "optim.final_momentum": 0.99925,
    "optim.clip_grad": None,
    "optim.betas": [0.9, 0.999],
    "optim.eps": 1e-8,
    "optim.dtype": "bfloat16",
    "optim.seed": 239,
    "compat.reinit": False,
    "compat.ema_positions": False,
    "compat.mask_token_by_length": True,
}
SETS = [
    {"num_blocks": count, "spatial_scale": [size, size], "temporal_scale": [1.0, 1.0], "aspect_ratio": [0.75, 1.5],
     "max_temporal_keep": 1.0, "max_keep": None}
    for count, size in ((8, 0.15), (2, 0.7))
]  # fmt: skip


def recipe(name, *overrides):
    return configfile.load(CONFIGS / f"{name}.yaml", list(overrides))


def values(name):
    return config.flat(recipe(name))


def has(name, table):
    found = values(name)
    assert {key: found[key] for key in table} == table


def tokens(data):
    return data.frames // data.tubelet * (data.crop // data.patch) ** 2


def differences(old, new):
    """Keys that change results and differ."""
    return [line.split(":")[0] for line in config.changed(values(old), values(new), "fatal")]


def test_no_recipe_of_the_second_generation_is_left_out():
    assert {path.stem for path in CONFIGS.glob("vjepa2_*.yaml")} == {*FIRST, *SECOND, *ONE_GPU}


@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_what_all_published_recipes_share(name):
    has(name, COMMON)
    assert values(name)["mask.sets"] == SETS


@pytest.mark.parametrize(("name", "encoder"), FIRST.items())
def test_first_phases_are_the_published_ones(name, encoder):
    has(name, {
        "model.name": encoder, "data.frames": 16, "data.crop": 256, "mask.group": 24, "optim.steps": 240_000,
        "optim.warmup_steps": 12_000, "optim.start_lr": 1e-4, "optim.decay": "constant", "init.from": None,
        "init.optimizer": False, "checkpoint.keep_every": 50 * 300,
    })  # fmt: skip
    settings = recipe(name)
    assert tokens(settings.data) == 2048
    assert settings.optim.steps == 800 * 300 == 12_000 + 228_000
    assert settings.optim.warmup_steps == 40 * 300
    assert settings.optim.global_batch == 16 * 8 * settings.mask.group
    plan = build_schedule(settings)
    rates = [plan.lr_at(count - 1) for count in (1, 6_000, 12_000, 12_001, 126_000, 240_000)]
    assert rates == pytest.approx([1e-4 + 4.25e-4 / 12_000, 3.125e-4, *[5.25e-4] * 4], rel=1e-12)
    ends = [(plan.weight_decay_at(step), plan.momentum_at(step)) for step in (0, 239_999)]
    assert ends == [(0.04, 0.99925)] * 2


@pytest.mark.parametrize(("name", "published"), SECOND.items())
def test_second_phases_are_the_published_ones(name, published):
    encoder, gpus, clips, crop, count = published
    has(name, {
        "model.name": encoder, "data.frames": 64, "data.crop": crop, "mask.group": clips, "optim.steps": 12_000,
        "optim.warmup_steps": 0, "optim.final_lr": 1e-6, "optim.decay": "linear", "optim.decay_steps": None,
        "init.optimizer": True, "compat.ipe_scale": 1.25,
    })  # fmt: skip
    settings = recipe(name)
    assert tokens(settings.data) == count
    assert settings.optim.steps == 40 * 300
    assert settings.optim.global_batch == gpus * clips
    plan = build_schedule(settings)
    assert plan.planned == 15_000
    rates = [plan.lr_at(n - 1) for n in (1, 6_000, 12_000)]
    assert rates == pytest.approx([5.2496507e-4, 3.154e-4, 1.058e-4], rel=1e-7)
    ends = [(plan.weight_decay_at(step), plan.momentum_at(step)) for step in (0, 11_999)]
    assert ends == [(0.04, 0.99925)] * 2
    paper = build_schedule(recipe(name, "compat.ipe_scale=1.0"))
    assert paper.lr_at(11_999) == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize(("first", "second"), [
    ("vjepa2_vitl", "vjepa2_vitl_cooldown"), ("vjepa2_vith", "vjepa2_vith_cooldown"),
    ("vjepa2_vitg", "vjepa2_vitg_cooldown"), ("vjepa2_vitg", "vjepa2_vitg_384_cooldown"),
    ("vjepa2_vitl_1gpu", "vjepa2_vitl_1gpu_cooldown"),
])  # fmt: skip
def test_a_cool_down_goes_on_with_the_networks_of_its_first_phase(first, second):
    larger = {"data.crop"} if "384" in second else set()
    assert set(differences(first, second)) == larger | {
        "mask.group", "data.frames", "optim.steps", "optim.warmup_steps", "optim.start_lr", "optim.decay",
        "init.from", "init.optimizer", "compat.ipe_scale",
    } | ({"optim.final_lr"} if "1gpu" in second else set())  # fmt: skip
    assert build_schedule(recipe(first)).lr_at(239_999) == recipe(second).optim.lr
    assert recipe(second).init.from_ == f"runs/{first}-XXXXXX"
    text = "".join(path.read_text() for path in CONFIGS.glob("vjepa2_*.yaml"))
    command = f"python -m fastjepa.train configs/{second}.yaml init.from=runs/{first}-..."
    assert command in " ".join(text.split()), "somewhere it is said how the one follows the other"


@pytest.mark.parametrize("name", [*SECOND, "vjepa2_vitl_1gpu_cooldown"])
def test_a_cool_down_from_nowhere_says_what_is_missing(name, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    small = (
        "model.name=vit_nano", "model.predictor_dim=24", "model.predictor_heads=2", "data.crop=64", "data.frames=4",
        "data.path=synthetic://moving-shapes?videos=24&size=64&frames=64", "runtime.device=cpu",
        f"log.folder={tmp_path}",
    )  # fmt: skip
    assert start(recipe(name, *small), name) == Exit.WRONG_INPUT
    first = "vjepa2_vitg" if "vitg" in name else name.removesuffix("_cooldown")
    assert capsys.readouterr().err == f"init.from: runs/{first}-XXXXXX: no such file or folder\n"


@pytest.mark.parametrize(("single", "published"), ONE_GPU.items())
def test_one_gpu_changes_the_published_batch_and_rates_alone(single, published):
    changed = {"optim.global_batch", "optim.lr"}
    changed |= {"init.from", "optim.final_lr"} if "cooldown" in single else {"optim.start_lr"}
    assert set(differences(published, single)) == changed
    one, many = recipe(single), recipe(published)
    scale = sqrt(one.optim.global_batch / many.optim.global_batch)
    assert scale == pytest.approx(sqrt(1 / 8))
    for key in ("lr", "final_lr" if "cooldown" in single else "start_lr"):
        assert getattr(one.optim, key) == pytest.approx(scale * getattr(many.optim, key), rel=0.02)
    assert one.optim.global_batch % one.mask.group == 0


@pytest.mark.parametrize(("name", "lines"), [
    ("vjepa2_vitg", [
        "model      vit_giant_xformers, 1012.2 M + predictor 22.4 M parameters, targets: mask_tokens, rotary positions "
        "as in the released V-JEPA 2", "tokens     2048 a clip",
        "clips      16 frames of 256 px at 4 frames/s",
        "lr 0.0001 -> 0.000525 -> 0.000525 (constant after the warm-up), weight decay 0.04 -> 0.04, "
        "momentum 0.99925 -> 0.99925",
    ]),
    ("vjepa2_vitg_384_cooldown", [
        "tokens     18432 a clip", "clips      64 frames of 384 px at 4 frames/s",
        "12000 steps, 0 of warm-up; lr 0.000525 -> 0.000106 (linear from the first step; cut off before "
        "1e-06 by compat.ipe_scale 1.25)",
    ]),
])  # fmt: skip
def test_plan_prints_the_end_points(name, lines, capsys):
    assert main(["plan", str(CONFIGS / f"{name}.yaml")]) == 0
    said = capsys.readouterr().out
    for line in lines:
        assert line in said


@pytest.mark.parametrize(("name", "ends"), [
    ("vitl", "learning rate 0.0002 -> 0.000625 -> 7.5e-05 (12,000 steps of warm-up), weight decay 0.04 -> 0.366, "
             "momentum 0.998 -> 0.9996"),
    ("vjepa2_vitl_cooldown", "learning rate 0.000525 -> 0.000106, linear (0 steps of warm-up), weight decay "
                             "0.04 -> 0.04, momentum 0.99925 -> 0.99925"),
])  # fmt: skip
def test_a_card_names_the_values_at_which_the_recipe_ends(name, ends):
    settings = recipe(name)
    passport = Passport("a run", "yours", "", None, config.flat(settings), False, {})
    assert ends in card(passport, settings, "out", "target_encoder", [], "", everything=True)


def test_both_phases_in_one_run_print_where_the_rate_falls(capsys):
    more = ("optim.steps=252000", "optim.decay=linear", "optim.decay_steps=12000")
    comments = " ".join((CONFIGS / "vjepa2_vitl.yaml").read_text().replace("\n#", "").split())
    assert " ".join(more) in comments
    assert main(["plan", str(CONFIGS / "vjepa2_vitl.yaml"), *more]) == 0
    assert "-> 1e-06 (linear over the last 12000 steps, constant before them)" in capsys.readouterr().out
    assert main(["plan", str(CONFIGS / "vjepa2_vitl.yaml"), more[1]]) == 0
    assert "-> 1e-06 (linear after the warm-up)" in capsys.readouterr().out
    plan = build_schedule(recipe("vjepa2_vitl", *more))
    assert [plan.lr_at(n - 1) for n in (240_000, 246_000, 252_000)] == pytest.approx([5.25e-4, 2.63e-4, 1e-6])


def test_the_recipes_train_one_after_the_other(tmp_path, cache, monkeypatch):
    """As they are, but for a tiny encoder, small frames and few clips a step."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    small = (
        "model.name=vit_nano", "model.predictor_dim=24", "model.predictor_heads=2", "model.predictor_depth=1",
        "data.path=synthetic://moving-shapes?videos=24&size=64&frames=64", "data.workers=0", "data.batch_size=6",
        "optim.global_batch=12", "mask.group=6", "runtime.device=cpu", "log.every=1", f"log.folder={tmp_path}",
    )  # fmt: skip
    first = recipe("vjepa2_vitl", *small, "data.frames=4", "data.crop=64", "runtime.stop_at=2")
    assert start(first, "first") == Exit.DONE
    (folder,) = tmp_path.glob("first-*")
    second = (f"init.from={folder}", "data.frames=8", "data.crop=96", "runtime.stop_at=3")
    assert start(recipe("vjepa2_vitl_cooldown", *small, *second), "second") == Exit.DONE
    (folder,) = tmp_path.glob("second-*")
    rates = [row["lr"] for row in read_metrics(folder)]
    assert rates == pytest.approx([5.25e-4 - n / 15_000 * 5.24e-4 for n in (1, 2, 3)], rel=1e-9)

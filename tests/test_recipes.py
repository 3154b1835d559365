"""The recipes in configs/: each can be planned, and what its comments say of its values holds."""

from math import sqrt
from pathlib import Path

import pytest

from fastjepa import config, configfile
from fastjepa.__main__ import main
from fastjepa.exits import Exit
from fastjepa.log import read_metrics
from fastjepa.start import start

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


def recipe(name, *overrides):
    return configfile.load(CONFIGS / f"{name}.yaml", list(overrides))


def differences(old, new):
    """Settings that change results and differ, as "key: old -> new"."""
    return config.changed(config.flat(recipe(old)), config.flat(recipe(new)), "fatal")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned_and_its_batch_is_whole_groups(path, capsys):
    assert main(["plan", str(path)]) == 0
    settings = configfile.load(path)
    assert settings.mask.group <= settings.optim.global_batch, "the group would shrink to the batch"
    assert settings.optim.global_batch % settings.mask.group == 0
    assert f"group of {settings.mask.group}" in capsys.readouterr().out


def test_one_gpu_changes_the_published_batch_and_rates_alone():
    assert [line.split(":")[0] for line in differences("vitl", "vitl_1gpu")] == [
        "optim.global_batch", "optim.lr", "optim.start_lr",
    ]  # fmt: skip
    published, single = recipe("vitl").optim, recipe("vitl_1gpu").optim
    scale = sqrt(single.global_batch / published.global_batch)
    assert single.lr == pytest.approx(scale * published.lr, rel=0.01)
    assert single.start_lr == pytest.approx(scale * published.start_lr, rel=0.01)


def test_small_data_keeps_the_masks_of_the_demo_and_the_rules_it_names():
    small, demo, published = recipe("small_data"), recipe("demo"), recipe("vitl").optim
    assert small.mask == demo.mask
    width = {"vit_small": 384, "vit_large": 1024}
    rule = published.lr * sqrt(small.optim.global_batch / published.global_batch) * 1024 / width[small.model.name]
    assert small.optim.lr == pytest.approx(rule, rel=0.05)

    def averaged_share(optim):
        return 1 / (1 - optim.momentum) / optim.steps

    assert averaged_share(published) < averaged_share(small.optim) < averaged_share(demo.optim)


def test_small_data_trains(tmp_path, cache, monkeypatch):
    """The recipe as it is, but for a tiny encoder, small frames and a few clips a step."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    settings = recipe(
        "small_data", "model.name=vit_nano", "model.predictor_dim=16", "model.predictor_depth=1", "data.crop=64",
        "data.path=synthetic://moving-shapes?videos=24&size=64&frames=64", "data.workers=0", "data.batch_size=8",
        "optim.global_batch=16", "runtime.stop_at=3", "runtime.device=cpu", "log.every=1", f"log.folder={tmp_path}",
    )  # fmt: skip
    assert start(settings, "small_data") == Exit.DONE
    (folder,) = tmp_path.glob("small_data-*")
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
    assert (folder / "probe" / "step-0000003.json").is_file()


def test_the_noised_demo_changes_the_targets_alone():
    assert differences("demo", "demo_noised") == [
        "model.targets: mask_tokens -> noised", "model.noise: published -> linear",
    ]  # fmt: skip

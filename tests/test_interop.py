"""Weights from elsewhere: what goes where, what does not fit and in which words, and the report."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from fastjepa import configfile
from fastjepa.build import build_jepa, build_optimizer_pass
from fastjepa.fit import architecture, state_of
from fastjepa.interop import NETWORKS, WeightsRefused, load_meta_checkpoint, load_moments, load_weights

ROOT = Path(__file__).parents[1]
SETTINGS = """
model: {name: vit_nano, predictor_depth: 1, predictor_dim: 24}
mask: {truncation: none, sets: [{num_blocks: 2}, {num_blocks: 1}]}
data: {frames: 4, crop: 32, patch: 8, batch_size: 2}
optim: {steps: 10, warmup_steps: 2, global_batch: 2, dtype: float32}
"""


@pytest.fixture
def make(tmp_path):
    """A tiny JEPA as the settings ask for it."""
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    return lambda *overrides: build_jepa(configfile.load(tmp_path / "tiny.yaml", list(overrides)))


@pytest.fixture
def file(tmp_path):
    """Where a checkpoint of the public layout is written."""
    return tmp_path / "published.pth.tar"


def shaken(jepa, seed=1):
    """The same networks with other values everywhere, tables and target encoder included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in jepa.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return jepa


def published(jepa, **more):
    """What the public training script saves."""
    networks = {
        name: OrderedDict((f"module.backbone.{key}", t.clone()) for key, t in state.items())
        for name, state in state_of(jepa).items()
    }
    facts = {"epoch": 7, "loss": 0.4321, "batch_size": 24, "world_size": 16, "lr": 6.25e-4}
    return {**networks, "opt": None, "scaler": None, **facts, **more}


def refusal(call, *arguments):
    with pytest.raises(WeightsRefused) as caught:
        call(*arguments)
    return str(caught.value)


# Reading


def test_keys_lose_exactly_the_prefix_and_values_arrive(make, file):
    source = shaken(make())
    torch.save(published(source), file)
    target = make()
    load_weights(target, load_meta_checkpoint(file))
    for key, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], tensor), key
    assert not torch.equal(target.encoder.norm.weight, target.target_encoder.norm.weight)
    assert all(p.requires_grad for n, p in target.encoder.named_parameters() if n != "pos_embed")
    assert not any(p.requires_grad for p in target.target_encoder.parameters())


@pytest.mark.parametrize("key", ["backbone.pos_embed", "module.pos_embed", "pos_embed", "Module.backbone.pos_embed", 3])
def test_a_key_without_the_prefix_is_refused(make, file, key):
    content = published(make())
    content["encoder"][key] = content["encoder"].pop("module.backbone.pos_embed")
    torch.save(content, file)
    words = f"{file}: encoder: expected keys that begin with module.backbone., given {str(key)!r}"
    assert refusal(load_meta_checkpoint, file) == words


def test_the_words_of_the_prefix_inside_a_key_stay(make, file):
    content = published(make())
    content["encoder"]["module.backbone.blocks.0.module.backbone.x"] = torch.zeros(3)
    torch.save(content, file)
    loaded = load_meta_checkpoint(file)
    assert "blocks.0.module.backbone.x" in loaded.networks["encoder"]
    assert refusal(load_weights, make(), loaded).splitlines()[1:] == [
        "  encoder.blocks.0.module.backbone.x: not expected, given [3]"
    ]


def test_half_precision_becomes_that_of_the_model(make, file):
    content = published(make())
    content["encoder"]["module.backbone.norm.weight"] = torch.full((64,), 1.5, dtype=torch.bfloat16)
    torch.save(content, file)
    jepa = make()
    load_weights(jepa, load_meta_checkpoint(file))
    assert torch.equal(jepa.encoder.norm.weight, torch.full((64,), 1.5))


# What does not fit


def test_every_difference_is_listed_and_nothing_is_copied(make, file):
    content = published(shaken(make()))
    del content["encoder"]["module.backbone.norm.bias"]
    content["predictor"]["module.backbone.predictor_norm.weight"] = torch.ones(17)
    content["target_encoder"]["module.backbone.extra"] = torch.zeros(2, 3)
    torch.save(content, file)
    jepa = make()
    before = {key: tensor.clone() for key, tensor in jepa.state_dict().items()}
    assert refusal(load_weights, jepa, load_meta_checkpoint(file)).splitlines() == [
        f"{file} does not fit the settings:",
        "  encoder.norm.bias: missing, expected [64]",
        "  predictor.predictor_norm.weight: expected [24], given [17]",
        "  target_encoder.extra: not expected, given [2, 3]",
    ]
    assert all(torch.equal(tensor, before[key]) for key, tensor in jepa.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(make, file, value):
    content = published(make())
    content["target_encoder"]["module.backbone.norm.bias"][3] = value
    torch.save(content, file)
    assert "target_encoder.norm.bias: its values are not finite" in refusal(
        load_weights, make(), load_meta_checkpoint(file)
    )


@pytest.mark.parametrize(
    ("override", "sentences"),
    [
        (
            "model.name=vit_tiny",
            [
                "model.name: the file has an encoder 64 wide, 3 blocks deep, with MLPs 256 wide (vit_nano), the "
                "settings an encoder 192 wide, 12 blocks deep, with MLPs 768 wide (vit_tiny)"
            ],
        ),
        ("data.patch=16", ["data.patch: the file has patches of 8 pixels, the settings 16"]),
        ("data.tubelet=4", ["data.tubelet: the file has tubelets of 2 frames, the settings 4"]),
        ("model.predictor_dim=32", ["model.predictor_dim: the file has a predictor 24 wide, the settings 32"]),
        ("model.predictor_depth=2", ["model.predictor_depth: the file has a predictor of 1 blocks, the settings 2"]),
        (
            "model.targets=noised",
            ["model.targets: the file's predictor has 2 mask tokens: it needs model.targets=mask_tokens"],
        ),
        (
            "mask.sets=[{num_blocks: 1}]",
            [
                "mask.sets: the file has 2 mask tokens, one for each mask set, and the settings draw 1 set "
                "(mask.kind=tube always draws one)"
            ],
        ),
    ],
)
def test_a_wrong_size_names_the_setting_to_change(make, file, override, sentences):
    torch.save(published(make()), file)
    lines = refusal(load_weights, make(override), load_meta_checkpoint(file)).splitlines()
    named = [line.strip() for line in lines[1:] if re.match(r"  (model|data|mask)\.", line)]
    assert named == sentences
    rest = lines[1 + len(named) :]
    assert rest
    assert len(rest) <= 9
    assert all(re.match(r"  ((target_)?encoder|predictor)\.\S+: |  and \d+ more", line) for line in rest)


@pytest.mark.parametrize(
    ("override", "clip"), [("data.crop=48", "4 frames of 48 px, 72"), ("data.frames=12", "12 frames of 32 px, 96")]
)
def test_clips_of_another_size_get_tables_of_their_own(make, file, override, clip):
    source = shaken(make())
    torch.save(published(source), file)
    jepa, drawn = make(override), make(override)
    lines = load_weights(jepa, load_meta_checkpoint(file))
    assert f"           from 32 tokens a clip to {clip} tokens a clip: position tables are made for them" in lines
    for name, live in state_of(jepa).items():
        for key, tensor in live.items():
            want = state_of(drawn if "pos_embed" in key else source)[name][key]
            assert torch.equal(tensor, want), f"{name}.{key}"


def test_tables_that_are_for_no_clip_at_all_do_not_fit(make, file):
    content = published(make())
    content["predictor"]["module.backbone.predictor_pos_embed"] = torch.zeros(1, 31, 24)
    torch.save(content, file)
    told = refusal(load_weights, make(), load_meta_checkpoint(file))
    assert "predictor.predictor_pos_embed: expected [1, 32, 24], given [1, 31, 24]" in told


def test_an_encoder_of_images_is_named(make, file):
    content = published(make())
    for network in ("encoder", "target_encoder"):
        weight = content[network]["module.backbone.patch_embed.proj.weight"]
        content[network]["module.backbone.patch_embed.proj.weight"] = weight[:, :, 0].clone()
    torch.save(content, file)
    assert "data.frames: the file holds an encoder of images" in refusal(
        load_weights, make(), load_meta_checkpoint(file)
    )


@pytest.mark.parametrize(
    ("recipe", "name", "entries", "tokens"),
    [("vitl", "vit_large", 293, 1568), ("vith", "vit_huge", 389, 1568), ("vith_384", "vit_huge", 389, 4608)],
)
def test_the_recipes_have_the_published_number_of_entries(recipe, name, entries, tokens):
    with torch.device("meta"):
        jepa = build_jepa(configfile.load(ROOT / "configs" / f"{recipe}.yaml"))
    networks = state_of(jepa)
    assert [len(networks[network]) for network in NETWORKS] == [entries, 153, entries]
    found = architecture(networks)
    assert found.name == name
    assert (found.patch, found.tubelet, found.tokens) == (16, 2, tokens)
    assert (found.predictor_dim, found.predictor_depth, found.mask_tokens) == (384, 12, 2)


# The report


def test_the_report_says_what_went_where_and_names_the_licence(make, file):
    torch.save(published(make(), something=1), file)
    assert load_weights(make(), load_meta_checkpoint(file)) == [
        f"weights    {file}, a first-generation V-JEPA checkpoint, of epoch 7, loss 0.4321",
        "           encoder into encoder: all of its 41 entries, 0.1768 M values",
        "             pos_embed [1, 32, 64]",
        "             patch_embed.proj.weight [64, 3, 2, 8, 8], .bias [64]",
        "             blocks.0-2.norm1.weight [64], .bias [64]",
        "             blocks.0-2.attn.qkv.weight [192, 64], .bias [192]",
        "             blocks.0-2.attn.proj.weight [64, 64], .bias [64]",
        "             blocks.0-2.norm2.weight [64], .bias [64]",
        "             blocks.0-2.mlp.fc1.weight [256, 64], .bias [256]",
        "             blocks.0-2.mlp.fc2.weight [64, 256], .bias [64]",
        "             norm.weight [64], .bias [64]",
        "           predictor into predictor: all of its 21 entries, 0.01125 M values",
        "             predictor_pos_embed [1, 32, 24]",
        "             predictor_embed.weight [24, 64], .bias [24]",
        "             mask_tokens.0-1 [1, 1, 24]",
        "             predictor_blocks.0.norm1.weight [24], .bias [24]",
        "             predictor_blocks.0.attn.qkv.weight [72, 24], .bias [72]",
        "             predictor_blocks.0.attn.proj.weight [24, 24], .bias [24]",
        "             predictor_blocks.0.norm2.weight [24], .bias [24]",
        "             predictor_blocks.0.mlp.fc1.weight [96, 24], .bias [96]",
        "             predictor_blocks.0.mlp.fc2.weight [24, 96], .bias [24]",
        "             predictor_norm.weight [24], .bias [24]",
        "             predictor_proj.weight [64, 24], .bias [64]",
        "           target_encoder into target_encoder: all of its 41 entries, 0.1768 M values, shapes as in encoder",
        "           position tables are the file's, equal to the settings' within 0",
        "           heads: 2 in the encoder, 2 in the predictor, from the settings, for the file does not tell them",
        "           ignored: opt (empty); scaler (empty); epoch (7); loss (0.4321); batch_size (24); world_size (16); "
        "lr (0.000625); something (not known)",
        "           licence: published weights of this layout are Meta's V-JEPA weights of the first generation: "
        "CC BY-NC 4.0, for non-commercial use only",
    ]


def test_another_position_table_is_taken_and_said(make, file):
    torch.save(published(make("model.uniform_power=false")), file)
    jepa = make()
    (line,) = [line for line in load_weights(jepa, load_meta_checkpoint(file)) if "position tables" in line]
    assert "is model.uniform_power right?" in line
    assert torch.equal(jepa.encoder.pos_embed, make("model.uniform_power=false").encoder.pos_embed)


# Moments of the optimizer


def adamw(jepa):
    """AdamW over the four published groups, position tables included, after one step with known gradients."""
    groups = []
    for decayed in (True, False):
        for network in (jepa.encoder, jepa.predictor):
            named = network.named_parameters()
            groups.append({"params": [p for n, p in named if (p.ndim > 1 and "bias" not in n) == decayed]})
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    for number, parameter in enumerate(p for p in jepa.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    return optimizer.state_dict()


@pytest.fixture
def update(tmp_path, make):
    """(a model and its live optimizer tensors)"""
    make()
    settings = configfile.load(tmp_path / "tiny.yaml")
    jepa = build_jepa(settings)
    return jepa, build_optimizer_pass(settings, jepa, None).state()


def test_moments_find_their_parameters(make, file, update):
    source = make()
    torch.save(published(source, opt=adamw(source)), file)
    jepa, live = update
    load_moments(live, load_meta_checkpoint(file))
    trained = [name for name, p in jepa.named_parameters() if p.requires_grad]
    for number, name in enumerate(trained):
        assert live[f"optim.step.{name}"] == 1
        torch.testing.assert_close(
            live[f"optim.exp_avg.{name}"], torch.full(live[f"optim.exp_avg.{name}"].shape, 0.1 * (number + 1))
        )
        assert live[f"optim.exp_avg_sq.{name}"].flatten()[0].item() == pytest.approx(1e-3 * (number + 1) ** 2)
    assert len(live) == 3 * len(trained) + 2


def spoil(kind, state):
    groups, slots = state["param_groups"], state["state"]
    if kind == "another order of groups":
        groups.reverse()
    elif kind == "one group":
        state["param_groups"] = [{"params": [i for group in groups for i in group["params"]]}]
    elif kind == "another shape":
        slots[1]["exp_avg"] = torch.zeros(3)
    elif kind == "another optimizer":
        slots[1] = {"momentum_buffer": torch.zeros(3)}
    elif kind == "an unknown index":
        slots[9999] = slots[1]
    elif kind == "a parameter without":
        del slots[2]
    else:
        state["param_groups"] = 3


KINDS = ["another order of groups", "one group", "another shape", "another optimizer", "an unknown index"]


@pytest.mark.parametrize("kind", [*KINDS, "a parameter without", "nonsense"])
def test_moments_that_do_not_belong_are_refused_and_none_is_taken(make, file, update, kind):
    source = make()
    state = adamw(source)
    spoil(kind, state)
    torch.save(published(source, opt=state), file)
    _, live = update
    loaded = load_meta_checkpoint(file)
    assert str(file) in refusal(load_moments, live, loaded)
    if kind != "a parameter without":
        assert str(file) in refusal(loaded.moments)
    assert not any(tensor.any() for tensor in live.values())


def test_a_file_without_moments_says_so(make, file, update):
    torch.save(published(make()), file)
    assert refusal(load_moments, update[1], load_meta_checkpoint(file)) == f"{file} has no optimizer state"

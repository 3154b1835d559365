"""Data sets with clips of their own: several lengths in one step, and images as clips of one tubelet."""

import itertools
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa import config
from fastjepa.build import build_dataset, build_jepa, build_loading, build_reader, masks_by_length
from fastjepa.config import DataSet, Settings
from fastjepa.configfile import from_command_line
from fastjepa.data.batches import MixedBatch
from fastjepa.data.loader import make_loader, running
from fastjepa.data.mixture import open_collections
from fastjepa.exits import Exit
from fastjepa.memory import held_bytes
from fastjepa.plan import MOST_DRAWS, make_plan

FILMS = "synthetic://moving-shapes?videos=48&size=48&frames=8"
MORE = "synthetic://moving-shapes?videos=48&size=48&frames=8&seed=1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images that differ, none of which is the next of another."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'abcdefg'[number]}_picture.png")
    return folder


@pytest.fixture
def mixed(cache, pictures, monkeypatch):
    """Settings of videos with 4 and 8 frames and of images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return {FILMS: {"weight": 2, "frames": 4}, MORE: {"fps": 12}, str(pictures): {"frames": 1}}


def overrides(mixed, *more):
    given = ("data.frames=8", f"data.path={json.dumps(mixed)}", "optim.global_batch=12", "mask.group=3", *more)
    # Later ones take the place of earlier ones.
    return tuple({text.partition("=")[0]: text for text in given}.values())


def settings_of(mixed, **data):
    return Settings.model_validate(
        {
            "data": {"path": mixed, "frames": 8, "stride": 1, "crop": 32, "patch": 8, **data},
            "mask": {
                "sets": [{"num_blocks": 2, "spatial_scale": [0.3, 0.3], "temporal_scale": [0.5, 0.5]}], "group": 3,
            },
            "optim": {"global_batch": 12, "steps": 10, "warmup_steps": 0},
        }
    )  # fmt: skip


def loaded(s, *, rank=0, world=1, workers=0, batch_size=4, steps=(2, 4)):
    """Batches of one process."""
    videos = open_collections(s.data.path, 0)
    dataset = build_dataset(s, videos)
    masks, tokens = build_loading(s, masks_by_length(s), dataset)
    loader = make_loader(
        dataset, masks, first_step=steps[0], last_step=steps[1], global_batch=12, batch_size=batch_size,
        workers=workers, pin_memory=False, tokens=tokens, rank=rank, world=world,
    )  # fmt: skip
    with running(loader) as batches:
        return list(batches)


def tokens_by_clip(token_set):
    """Token numbers of every clip."""
    return token_set.index.split(list(token_set.lengths)) if hasattr(token_set, "lengths") else list(token_set)


def by_slot(batches):
    """What every clip got: its pixels and its masks."""
    found = {}
    for batch in batches:
        assert isinstance(batch, MixedBatch)
        for group in batch.groups:
            sets = [tokens_by_clip(one) for one in (*group.masks_context, *group.masks_target)]
            for place, slot in enumerate(group.slots):
                assert slot not in found
                found[slot] = (group.clips[place].tolist(), [s[place].tolist() for s in sets])
    return found


# -- settings ----------------------------------------------------------------------------------------------------------


def test_what_a_data_set_leaves_open_is_that_of_data():
    s = Settings.model_validate({"data": {"path": {"a": 1, "b": {"weight": 3, "frames": 8}, "c": {"fps": 6.0}}}})
    assert s.data.sets == (
        DataSet(weight=1, frames=16, stride=4),
        DataSet(weight=3, frames=8, stride=4),
        DataSet(weight=1, frames=16, fps=6.0),
    )
    assert s.data.lengths == (8, 16)
    by_time = Settings.model_validate({"data": {"path": {"a": {"stride": 2}, "b": 1.0}, "duration": 2.0}})
    assert [(one.stride, one.duration) for one in by_time.data.sets] == [(2, None), (4, 2.0)]
    assert Settings().data.sets == (DataSet(frames=16, stride=4),)


def test_an_image_fills_one_tubelet():
    s = Settings.model_validate({"data": {"path": {"a": {"frames": 1}, "b": 2}, "tubelet": 4}})
    assert s.data.lengths == (4, 16)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("data.path={a: {fraems: 4}}", "data.path: unknown key fraems of a, nearest valid key: frames"),
        (
            "data.path={a: {frames: 4.5}}",
            "data.path: expected a whole number (at least 1) or null as frames of a, given 4.5",
        ),
        ("data.path={a: {weight: 0}}", "data.path: expected a number (above 0) as weight of a, given 0"),
        (
            "data.path={a: -1}",
            "data.path: expected a number (above 0) or a group of weight, frames, stride, duration, fps "
            "as weight of a, given -1",
        ),
        (
            "data.path=[a, b]",
            "data.path: expected a mixture as a map from paths to weights, {A: 1, B: 1}, given the list",
        ),
        (
            "data.path={}",
            "data.path: expected a mixture with at least one path and its weight, {A: 1, B: 1}, given {}\n",
        ),
        (
            "data.path={a: }",
            "data.path: expected a number (above 0) or a group of weight, frames, stride, duration, fps "
            "as weight of a, given null\n",
        ),
        (
            "data.path={a: {fps: 0}}",
            "data.path: expected a number (above 0) or null as fps of a, given 0\n",
        ),
        (
            "data.path={a: {frames: 1, stride: 7}, b: 1}",
            "data.path: expected no stride beside frames 1, for there is no next frame, given 7 for a",
        ),
        ("data.path={a: 1e308, b: 1e308}", "data.path: expected weights whose sum is a number"),
        (
            "data.path={2024: 1}",
            "expected a path before each weight, in quotes where it looks like a number, given 2024",
        ),
        ("data.path={'': 1}", "data.path: expected a path that is not empty before each weight, given ''"),
        ("data.path={a: {frames: 3}}", "up to data.frames 16, the longest clip of the networks, given 3 for a\n"),
        ("data.path={a: {frames: 5}, b: 1}", "frames 1 or a multiple of data.tubelet 2 up to data.frames 16, the"),
        ("data.path={a: {frames: 32}, b: 1}", "given 32 for a (or set data.frames=32)\n"),
        ("data.path={a: {fps: 4, stride: 2}}", "data.path: expected one of stride, duration and fps, which say the "),
        (
            "data.path={a: {frames: 8}}",
            "data.frames: expected 8, the longest clip of a data set in data.path, given 16",
        ),
        ("loss.lengths=equal", "loss.lengths: expected the default clips where all clips have one length, given equal"),
    ],
)
def test_a_wrong_data_set_is_refused_in_one_sentence(recipe, given, sentence, capsys):
    with pytest.raises(SystemExit) as left:
        from_command_line([str(recipe), "data.frames=16", given])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "compat.fps_whole_stride=true",
            "compat.fps_whole_stride: expected false without data.fps, which it rounds",
        ),
        (
            "data.decoder=dali_cpu",
            "data.decoder: expected auto, pyav or torchcodec where data.path has clips of several",
        ),
        (
            "compat.mask_token_by_length=true",
            "compat.mask_token_by_length: expected false where data.path has clips of",
        ),
    ],
)
def test_what_several_lengths_do_not_go_with_is_refused(recipe, more, sentence, capsys):
    with pytest.raises(SystemExit):
        from_command_line([str(recipe), "data.frames=16", "data.path={a: 1, b: {frames: 8}}", more])
    assert sentence in capsys.readouterr().err


def test_clips_of_their_own_make_another_run(mixed):
    plain = dict.fromkeys(mixed, 1)
    prints = [open_collections(Settings.model_validate({"data": {"path": one, "frames": 8}}).data.path, 0).fingerprint
              for one in (plain, {**plain, FILMS: {"weight": 1}}, {**plain, FILMS: {"frames": 4}},
                          {**plain, FILMS: {"stride": 2}})]  # fmt: skip
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_settings_go_through_a_file_and_back(mixed):
    s = settings_of(mixed)
    again = Settings.model_validate(s.model_dump(mode="json", by_alias=True))
    assert again == s
    assert config.flat(again) == config.flat(s)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_batches_are_grouped_by_length_each_with_masks_on_its_own_grid(mixed):
    lengths = set()
    for batch in loaded(settings_of(mixed)):
        seen = [group.clips.shape[2] for group in batch.groups]
        assert seen == sorted(set(seen))
        assert sorted(batch.slots) == list(range(min(batch.slots), min(batch.slots) + 4))
        for group in batch.groups:
            tokens = group.clips.shape[2] // 2 * 16
            for one in (*group.masks_context, *group.masks_target):
                index = one.index if hasattr(one, "lengths") else one
                assert int(index.max()) < tokens
            if group.clips.shape[2] == 2:
                assert torch.equal(group.clips[:, :, 0], group.clips[:, :, 1])
        lengths.update(seen)
    assert lengths == {2, 4, 8}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("world", "workers", "batch_size"), [(1, 1, 4), (1, 2, 12), (2, 0, 6), (2, 2, 3), (3, 0, 2), (1, 0, 1)]
)
def test_clips_and_masks_are_the_same_however_a_step_is_divided(mixed, world, workers, batch_size):
    s = settings_of(mixed)
    wanted = by_slot(loaded(s))
    parts = [loaded(s, rank=rank, world=world, workers=workers, batch_size=batch_size) for rank in range(world)]
    assert by_slot(itertools.chain(*parts)) == wanted
    assert len(wanted) == 24


def test_only_clips_of_one_length_are_cut_together(mixed):
    """A clip keeps what it has in common with those of its group and length: fewer are cut, and less."""
    s = settings_of(mixed)
    shape = build_dataset(s, open_collections(s.data.path, 0)).plan.shape
    generators = {frames: masks.generators[0] for frames, masks in masks_by_length(s).items()}
    less = 0
    for slot, (_, (context, _)) in by_slot(loaded(s, steps=(2, 6))).items():
        generator, step = generators[shape(slot).length], slot // 12
        group = range(slot // 3 * 3, slot // 3 * 3 + 3)
        counts = {other: len(generator.sample(step, other)[0]) for other in group}
        assert len(context) == min(counts[other] for other in group if shape(other) == shape(slot))
        less += len(context) > min(counts.values())
    assert less


@pytest.mark.parametrize("equal", [False, True])
def test_shares_make_the_loss_of_the_whole_step_however_it_is_divided(mixed, equal):
    """A made-up loss of every clip: the mean over all batches is that of the step, by clips or by lengths."""
    s = settings_of(mixed)
    s = s.model_copy(update={"loss": s.loss.model_copy(update={"lengths": "equal" if equal else "clips"})})
    for world, batch_size in ((1, 12), (1, 4), (2, 3), (3, 1)):
        parts = [loaded(s, rank=rank, world=world, batch_size=batch_size, steps=(2, 3)) for rank in range(world)]
        batches = list(itertools.chain(*parts))
        loss = np.mean(
            [sum(w * np.mean([slot**2 for slot in g.slots]) for w, g in zip(b.shares, b.groups)) for b in batches]
        )
        of_length = {}
        for group in itertools.chain.from_iterable(batch.groups for batch in batches):
            of_length.setdefault(group.clips.shape[2], []).extend(slot**2 for slot in group.slots)
        wanted = (
            np.mean([np.mean(one) for one in of_length.values()])
            if equal
            else np.mean(list(itertools.chain(*of_length.values())))
        )
        assert loss == pytest.approx(wanted, rel=1e-12)


def test_a_data_set_without_times_is_refused_only_where_its_own_clips_need_them(mixed, pictures, tmp_path):
    frames = tmp_path / "folder"
    frames.mkdir()
    for number in range(8):
        Image.new("RGB", (48, 48), (number, 0, 0)).save(frames / f"{number}.png")
    path = {FILMS: {"fps": 12}, str(frames): {"frames": 4, "stride": 1}}
    for dataset, fails in ((path, False), ({**path, str(frames): {"frames": 4, "fps": 12}}, True)):
        s = settings_of(dataset)
        built = build_dataset(s, open_collections(s.data.path, 0))
        slot = next(slot for slot in range(100) if built.plan.shape(slot).length == 4)
        sample = built[slot]
        assert [reason for _, reason in sample.bad] == ["its frame rate is not known, and data.fps needs it"] * fails
        assert sample.clips[0].shape[1] == 4


def test_a_video_in_a_set_of_single_frames_is_still(mixed):
    """So moving shapes can stand for images."""
    s = settings_of({FILMS: {"frames": 1}, MORE: {}}, tubelet=4)
    built = build_dataset(s, open_collections(s.data.path, 0))
    drawn = [(built.plan.shape(slot).frames, built[slot].clips[0]) for slot in range(12)]
    for frames, clip in drawn:
        assert clip.shape[1] == (4 if frames == 1 else 8)
        assert torch.equal(clip[:, :1].expand_as(clip), clip) == (frames == 1)
    assert {frames for frames, _ in drawn} == {1, 8}


def test_frame_rates_by_whole_strides_are_the_settings_choice(mixed):
    """At 24 frames/s, 10 a second are every second frame by the public rule, and not by the times."""
    strides = {}
    for by_stride in (False, True):
        s = settings_of({FILMS: {"frames": 4, "fps": 10}, MORE: {}})
        s = s.model_copy(update={"compat": s.compat.model_copy(update={"fps_whole_stride": by_stride})})
        built = build_dataset(s, open_collections(s.data.path, 0))
        slots = [slot for slot in range(40) if built.plan.shape(slot).frames == 4]
        info = built.reader.info(built.plan.order.video(slots[0]))
        draws = [built.plan.clip(slot, 100, 48, 48, info.rate, np.arange(100) / 24).frames for slot in slots]
        strides[by_stride] = {int(step) for draw in draws for step in np.diff(draw)}
    assert strides[True] <= {2, 3}  # both ends of the window are included
    assert {tuple(np.diff(draw)) for draw in draws} == {(2, 3, 2)}
    assert strides[False] == {2, 3}


# -- runs --------------------------------------------------------------------------------------------------------------


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"].hex() for row in rows(folder)]


@pytest.mark.parametrize("more", [("loss.lengths=equal", "data.workers=2"), ("model.targets=noised",)])
def test_a_run_of_mixed_lengths_goes_on_bit_for_bit(run, mixed, more):
    given = overrides(mixed, "optim.steps=6", *more)
    _, whole = run(*given, folder="whole")
    code, _ = run(*given, "runtime.stop_at=3", folder="parts")
    assert code == Exit.DONE
    _, parts = run(*given, folder="parts")
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 6


@pytest.mark.parametrize("lengths", ["clips", "equal"])
def test_batch_size_and_execution_do_not_change_a_run_of_mixed_lengths(run, mixed, lengths):
    given = overrides(mixed, "optim.steps=3", f"loss.lengths={lengths}")
    _, wanted = run(*given, "data.batch_size=12", folder="wanted")
    for number, other in enumerate((("data.batch_size=3",), ("data.batch_size=12", "runtime.execution=reference"))):
        _, folder = run(*given, *other, folder=f"other{number}")
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in rows(folder)] == pytest.approx([r[key] for r in rows(wanted)], rel=1e-4)


def test_lengths_weigh_as_the_setting_says(run, mixed):
    found = [
        run(*overrides(mixed, "optim.steps=2", f"loss.lengths={one}"), folder=one)[1] for one in ("clips", "equal")
    ]
    assert losses(found[0]) != losses(found[1])


def test_a_mixture_of_one_length_is_the_run_that_it_was(run, mixed):
    """A weight in a group is the weight: same batches, same numbers, same run."""
    plain = {FILMS: 2, MORE: 1}
    names = [run(*overrides(path, "optim.steps=2"), folder=str(number))[1]
             for number, path in enumerate((plain, {FILMS: {"weight": 2}, MORE: {"weight": 1}}))]  # fmt: skip
    assert losses(names[0]) == losses(names[1])
    assert names[0].name == names[1].name


def test_the_plan_counts_every_length_and_fits_the_longest(mixed):
    s = settings_of(mixed)
    masks = masks_by_length(s)
    plan = make_plan(s, build_jepa(s), masks[8], float("inf"))
    assert [(one.frames, one.share, one.tokens) for one in plan.lengths] == [(2, 0.25, 16), (4, 0.5, 32), (8, 0.25, 64)]
    assert (plan.tokens, plan.shape.sets, plan.shape.union) == (64, plan.lengths[2].sets, plan.lengths[2].union)
    # A step in which all clips have the length of one of them.
    of_length = [
        replace(plan, shape=replace(plan.shape, tokens=one.tokens, sets=one.sets, union=one.union), lengths=())
        for one in plan.lengths
    ]
    floor = [sum(item.flop for item in one.work) for one in (plan, *of_length)]
    assert floor[0] == pytest.approx(0.25 * floor[1] + 0.5 * floor[2] + 0.25 * floor[3])
    assert plan.held == held_bytes(of_length[2].shape)


def test_the_plan_counts_the_tokens_of_the_masks_that_a_run_of_mixed_lengths_draws(mixed):
    """Only clips of one length are cut together: there is more left of each than of a whole group."""
    s = settings_of(mixed)
    plan = make_plan(s, build_jepa(s), masks_by_length(s)[8], float("inf"))
    kept = {one.frames: [] for one in plan.lengths}
    for batch in loaded(s, batch_size=12, steps=(0, MOST_DRAWS)):
        for group in batch.groups:
            context, target = (
                [tokens_by_clip(one) for one in sets] for sets in (group.masks_context, group.masks_target)
            )
            first = [at for at, slot in enumerate(group.slots) if slot % 12 < 3]
            kept[group.clips.shape[2]] += [(len(context[0][at]), len(target[0][at])) for at in first]
    for one in plan.lengths:
        means = torch.tensor(kept[one.frames], dtype=torch.float64).mean(0).tolist()
        assert [one.sets[0].context, one.sets[0].target] == pytest.approx(means)
    uniform = settings_of(FILMS)
    whole = make_plan(uniform, build_jepa(uniform), masks_by_length(uniform)[8], float("inf"))
    assert plan.context[0] > whole.context[0]


def test_a_length_too_rare_to_be_met_is_counted_as_if_all_clips_had_it():
    rare = settings_of({FILMS: {"weight": 1, "frames": 4}, MORE: {"weight": 1e-9}})
    plan = make_plan(rare, build_jepa(rare), masks_by_length(rare)[8], float("inf"))
    alone = settings_of({MORE: {"frames": 8}})
    expected = make_plan(alone, build_jepa(alone), masks_by_length(alone)[8], float("inf"))
    assert plan.lengths[1].sets == expected.shape.sets
    assert plan.held == expected.held


def test_loader_processes_can_be_started_anew(mixed):
    """Outside of Linux they are: what they are given is pickled."""
    s = settings_of(mixed)
    dataset = build_dataset(s, open_collections(s.data.path, 0))
    lengths, _ = build_loading(s, masks_by_length(s), dataset)
    again = pickle.loads(pickle.dumps(lengths))
    assert [again.of_slot(slot) for slot in range(24)] == [lengths.of_slot(slot) for slot in range(24)]
    assert len({lengths.of_slot(slot) for slot in range(24)}) == 3


def test_probes_cut_by_the_settings_of_data_whatever_data_sets_have_of_their_own(mixed):
    s = settings_of(mixed, fps=4)
    assert build_reader(s, open_collections(s.data.path, 0)).needs_rate == "data.fps"
    own = settings_of({FILMS: {"stride": 2, "frames": 4}, MORE: {"fps": 12}}, fps=4)
    assert not build_dataset(own, open_collections(own.data.path, 0)).reader.needs_rate

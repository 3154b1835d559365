"""From video files to batches on the device: decoders, transform, masks, and the loader beside a step.

Videos are made in the session (`bench.data.videos`) and read from the memory of the file system: a slow disk shows
nowhere here. What one process does is timed by its processors, what waits for others by the clock on the wall.
"""

import pytest

from bench.data import loading
from bench.data.decoders import FRAMES, STRIDE, differences, draws, frames_decoded, readers, spaced
from bench.data.loading import CLIPS, LOADED, Beside, processors, settings_of
from bench.data.videos import GOPS, SIZES
from bench.files import quantiles
from bench.pairing import alternate, processor_clock, rate_row, ratio_row
from bench.step.ways import ROOT
from fastjepa import configfile
from fastjepa.build import build_masks
from fastjepa.data.decode import probe, read_frames
from fastjepa.data.sampling import Augmentation
from fastjepa.data.transforms import transform
from fastjepa.masks import target_union
from fastjepa.start import auto_workers

KIND = "data"
ON_A_DEVICE = True
READ, READ_ROUNDS = 6, 3  # clips of one timed call, and its rounds
CUT = 2
ROUNDS, BESIDE_ROUNDS = 5, 3
CROP = 224
AUGMENTED = {
    "": Augmentation(),
    " with motion shift": Augmentation(motion_shift=True),
    " with erasing": Augmentation(erase=1.0, crop=CROP),
    " with RandAugment": Augmentation(auto_augment=True),
}
MASKS = {
    "multiblock": (),
    "multiblock, no truncation": ("mask.truncation=none",),
    "tube": ("mask.kind=tube",),
}
OF_THE_HOST = {"clock": "processor"}  # also on a machine with a GPU
MASKED_CLIPS, MASKED_STEPS = 24, 4  # the published clips of a GPU; steps of one timed call


@pytest.mark.parametrize("gop", GOPS)
@pytest.mark.parametrize("size", SIZES)
def test_decode(benchmark, results, device, videos, size, gop):
    """Clips of 16 frames at random places of a video, read by every decoder; what they read is compared first."""
    benchmark.group = f"decode {size} gop {gop}"
    path = videos.path(size, gop)
    info = probe(path)
    clips = spaced(info, READ)
    ways, lacking = readers(info)
    apart = differences(ways, clips)
    variants = {name: lambda read=read: [read(frames) for frames in clips] for name, read in ways.items()}
    times = alternate(benchmark, variants, processor_clock, READ_ROUNDS, warm_up=0)  # the comparison has warmed all up
    where = {"size": size, "gop": gop, "frames": FRAMES, "stride": STRIDE}
    for name, ms in times.items():
        decoded = sum(frames_decoded(info, frames, name) for frames in clips)
        results([rate_row(f"decode, {name}", ms, READ, "clips/s", where) | OF_THE_HOST])
        results([rate_row(f"source frames, {name}", ms, decoded, "frames/s", where) | OF_THE_HOST])
    results([{"name": f"decode, {name}", "skipped": reason, "parameters": where} for name, reason in lacking.items()])
    known, new, *others = times  # in a first epoch all videos are new
    for ours in (new, known):
        ratios = [ratio_row(f"speed of {ours} over {name}", times, name, where, of=ours) for name in others]
        results([ratio | OF_THE_HOST for ratio in ratios])
    results([{"name": f"difference of {name}", "value": apart[name], "unit": "grey levels", "parameters": where}
             for name in others])  # fmt: skip
    megabits = 8e-6 * path.stat().st_size / info.frames * float(info.rate)
    results([{"name": "bit rate of the video", "value": megabits, "unit": "Mbit/s", "parameters": where}])


@pytest.mark.parametrize("size", SIZES)
def test_transform(benchmark, results, device, videos, size):
    """Decoded frames to the clip that the network sees, as published and with each further draw."""
    benchmark.group = f"transform {size}"  # all variants cut the same boxes out of the same frames
    info = probe(videos.path(size, GOPS[0]))
    frames = read_frames(info, draws(info, 1)[0].frames)

    def cutting(augmentation):
        drawn, floats = draws(info, CUT, augmentation), augmentation.erase > 0
        return lambda: [transform(frames, draw, CROP, floats=floats) for draw in drawn]

    variants = {name: cutting(augmentation) for name, augmentation in AUGMENTED.items()}
    times = alternate(benchmark, variants, processor_clock, 2 * ROUNDS)
    where = {"size": size, "crop": CROP, "frames": FRAMES}
    results([rate_row(f"transform{name}", ms, CUT, "clips/s", where) | OF_THE_HOST for name, ms in times.items()])


def test_masks(benchmark, results, device):
    """The masks of a batch of 24 and the union of their targets, which the host draws for every step of ViT-H."""
    benchmark.group = "masks"

    def drawing(more):
        s = configfile.load(ROOT / "configs" / "vith.yaml", [f"optim.global_batch={MASKED_CLIPS}", *more])
        masks, tokens = build_masks(s), s.data.frames // s.data.tubelet * (s.data.crop // s.data.patch) ** 2

        def draw():
            for step in range(MASKED_STEPS):
                _, target = masks.draw(step, range(step * MASKED_CLIPS, (step + 1) * MASKED_CLIPS))
                target_union(target, tokens)

        return draw

    variants = {name: drawing(more) for name, more in MASKS.items()}
    times = alternate(benchmark, variants, processor_clock, 4 * ROUNDS)
    where = {"model": "vith", "clips": MASKED_CLIPS}
    for name, ms in times.items():
        results([rate_row(f"masks, {name}", ms, MASKED_STEPS, "batches/s", where) | OF_THE_HOST])


def test_beside_a_step(benchmark, results, device, videos):
    """Training steps that wait for the loader, the same steps on batches at hand, and the loader with no steps.

    "data wait" is that of the training log: the time that the host waits, in which a GPU may still be at work.
    """
    benchmark.group = "beside a step"
    on_gpu, workers, clips = device.type == "cuda", auto_workers(), CLIPS[device.type]
    s = settings_of(videos.path(*LOADED), clips, *(() if on_gpu else loading.TINY))
    beside = Beside(s, workers, device)
    times = alternate(benchmark, beside.variants(), loading.own_clock, BESIDE_ROUNDS, warm_up=0)
    where = {"model": s.model.name, "clips": clips, "crop": s.data.crop, "workers": workers, "processors": processors(),
             "size": LOADED[0], "gop": LOADED[1]}  # fmt: skip
    results(
        [rate_row(name, ms, beside.steps * clips, "clips/s", where) | {"clock": "wall"} for name, ms in times.items()]
    )
    p20, median, p80 = quantiles([100 * share for share in beside.waited])
    results([{"name": "data wait", "value": median, "unit": "%", "p20": p20, "p80": p80,
              "n": len(beside.waited), "parameters": where}])  # fmt: skip

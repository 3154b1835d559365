"""From video files to batches on the device: decoders, transform, masks, and the loader beside a step.

Videos are made in the session (`bench.data.videos`) and read from the memory of the file system: a slow disk shows
nowhere here. What one process does is timed by its processors, what waits for others by the clock on the wall.
"""

import time
from dataclasses import replace

import pytest
import torch

from bench.data import batches, loading
from bench.data.decoders import FRAMES, PLAIN, STRIDE, differences, draws, frames_decoded, readers, spaced
from bench.data.loading import CLIPS, LOADED, PREPARED, Beside, processors, settings_of
from bench.data.videos import CODECS as CODED
from bench.data.videos import CODED_GOP, CODED_SIZE, GOPS, SIZES
from bench.files import quantiles
from bench.pairing import alternate, processor_clock, rate_row, ratio_row
from bench.step.ways import ROOT
from fastjepa import configfile
from fastjepa.build import build_masks
from fastjepa.data.decode import probe, read_frames
from fastjepa.data.decoders import dali
from fastjepa.data.decoders.choose import decodes_av1
from fastjepa.data.sampling import Augmentation
from fastjepa.data.transforms import transform
from fastjepa.masks import target_union
from fastjepa.start import auto_workers

KIND = "data"
ON_A_DEVICE = True
READ, READ_ROUNDS = 6, 3  # clips of one timed call, and its rounds
BATCHED_SIZES = ("340x256", "1280x720")
BATCH_ROUNDS = 3
PYAV, DALI = "pyav", {"cuda": "dali_gpu", "cpu": "dali_cpu"}
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
    """Clips of 16 frames all over a video, read by every decoder in turns; what they read is compared first.

    A way that reads other frames than are there is measured, and says so.
    """
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
        at = where | {"way": name}
        p20, median, p80 = quantiles([one / READ / 1e3 for one in ms])
        decoded = sum(frames_decoded(info, frames, name) for frames in clips)
        rows = [
            rate_row("decode", ms, READ, "clips/s", at),
            {"name": "processor time of a clip", "value": median, "unit": "s", "p20": p20, "p80": p80, "n": len(ms),
             "parameters": at},
            ratio_row(f"over {PLAIN}", times, PLAIN, at, of=name),
            rate_row("source frames", ms, decoded, "frames/s", at),
        ]  # fmt: skip
        results([row | OF_THE_HOST for row in rows])
        compared = (("wrong frames", 100 * apart[name].wrong, "%"), ("difference", apart[name].levels, "grey levels"))
        results([{"name": what, "value": value, "unit": unit, "parameters": at} for what, value, unit in compared])
    results([{"name": "decode", "skipped": f"{name}: {reason}", "parameters": where | {"way": name}}
             for name, reason in lacking.items()])  # fmt: skip
    megabits = 8e-6 * path.stat().st_size / info.frames * float(info.rate)
    results([{"name": "bit rate of the video", "value": megabits, "unit": "Mbit/s", "parameters": where}])


def batch_cases():
    """(codec, size, gop): H.264 in the sizes and groups of videos on the web, others once."""
    yield from (("h264", size, gop) for size in BATCHED_SIZES for gop in GOPS)
    yield from ((codec, CODED_SIZE, CODED_GOP) for codec in CODED)


def batches_lack(codec, device):
    """Why DALI cannot decode this codec here, or empty."""
    if reason := dali.why_not(device):
        return reason
    if codec not in batches.CODECS[device.type]:
        return f"DALI reads no {codec} on a {device.type}"
    if codec == "av1" and device.type == "cuda" and not decodes_av1(torch.cuda.get_device_capability(device)):
        return "this GPU decodes no AV1"
    return ""


@pytest.mark.parametrize(("codec", "size", "gop"), list(batch_cases()))
def test_batches(benchmark, results, device, videos, codec, size, gop):
    """Batches of clips on the device: DALI by threads and by batches under way, beside one process of PyAV."""
    benchmark.group = f"batches {codec} {size} gop {gop}"
    where = {"codec": codec, "size": size, "gop": gop, "crop": batches.CROP, "clips": batches.SIZE[device.type]}
    if reason := batches_lack(codec, device):
        results([{"name": "batches", "skipped": reason, "parameters": where}])
        pytest.skip(reason)
    source = batches.Source(videos.path(size, gop) if codec == "h264" else videos.coded(codec), device)
    threads = [n for n in batches.THREADS[device.type] if n <= 2 * processors()]
    ways = sorted({(n, 2) for n in threads} | {(threads[-1], ahead) for ahead in batches.PREFETCH[device.type]})
    decoders = {way: batches.decoder(device, *way) for way in ways}

    def through(way):
        for pixels in batches.decoded(decoders[way], source.batches, way[1]):
            assert pixels.shape[0] == source.size

    def by_pyav():
        for number in range(len(source.batches)):
            source.by_pyav(number).to(device)

    for one in decoders.values():
        batches.check(source, next(batches.decoded(one, source.batches[:1], 1)))
    variants = {PYAV: batches.Timed(by_pyav, device)}
    variants |= {way: batches.Timed(lambda way=way: through(way), device) for way in ways}
    with batches.engines_watched() as engines:
        times = alternate(benchmark, variants, loading.own_clock, BATCH_ROUNDS, warm_up=1)
    for way, timed in variants.items():
        name, (n, ahead) = (
            ("pyav", (1, 0)) if way == PYAV else (f"dali_{'gpu' if device.type == 'cuda' else 'cpu'}", way)
        )
        at = where | {"way": name, "threads": n, "prefetch": ahead}
        results([rate_row("batches", times[way], source.clips, "clips/s", at) | {"clock": "wall"}])
        p20, median, p80 = quantiles([one / source.clips for one in timed.processor])
        results([{"name": "processor time of a clip", "value": median, "unit": "s", "p20": p20, "p80": p80,
                  "n": len(timed.processor), "parameters": at} | OF_THE_HOST])  # fmt: skip
    if device.type == "cuda":
        row = {"name": "video engines in use", "parameters": where}
        used = [one for one in engines if one > 0]
        results(
            [row | ({"value": max(used), "unit": "%"} if used else {"skipped": "nvidia-smi tells nothing of them"})]
        )
    _a_bad_file(results, source, decoders[threads[-1], 2], where)


def _a_bad_file(results, source, one, where):
    """A batch with a file that is no video, and three good ones after it: what the first costs; all must be right."""
    good = source.batches[0]
    broken = [replace(good[0], path="broken.mp4", encoded=batches.NOT_A_VIDEO), *good[1:]]
    ratios = []
    for _ in range(BATCH_ROUNDS):
        times = []
        for clips in (broken, good, good, good):
            began = time.perf_counter()
            one.begin(clips)
            pixels, failed = one.finish()
            times.append(time.perf_counter() - began)
            assert list(failed) == ([0] if clips is broken else []), failed
            batches.check(source, pixels, first=int(clips is broken))
        ratios.append(times[0] / (sum(times[1:]) / 3))
    p20, median, p80 = quantiles(ratios)
    results([{"name": "a batch with a bad file over one without", "value": median, "unit": "x", "p20": p20, "p80": p80,
              "n": len(ratios), "parameters": where, "clock": "wall"}])  # fmt: skip


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

    "data wait" is that of the training log: the time that the host waits, in which a GPU may still be at work. On a GPU
    the videos are like prepared ones, decoded there and by the loader's processes.
    """
    benchmark.group = "beside a step"
    on_gpu, workers, clips = device.type == "cuda", auto_workers(), CLIPS[device.type]
    size, gop = PREPARED if on_gpu else LOADED
    s = settings_of(videos.path(size, gop), clips, *(() if on_gpu else loading.TINY))
    where = {"model": s.model.name, "clips": clips, "crop": s.data.crop, "workers": workers, "processors": processors(),
             "size": size, "gop": gop}  # fmt: skip
    reason = dali.why_not(device) if on_gpu else "there is no GPU to decode on"
    if reason:
        results([{"name": "steps with the loader", "skipped": f"dali_gpu: {reason}",
                  "parameters": where | {"decoder": "dali_gpu"}}])  # fmt: skip
    beside = Beside(s, workers, device, ["pyav"] if reason else ["dali_gpu", "pyav"])
    times = alternate(benchmark, beside.variants(), loading.own_clock, BESIDE_ROUNDS, warm_up=0)
    for (name, decoder), ms in times.items():
        at = where | {"decoder": decoder}
        results([rate_row(name, ms, beside.steps * clips, "clips/s", at) | {"clock": "wall"}])
    for decoder, shares in beside.waited.items():
        p20, median, p80 = quantiles([100 * share for share in shares])
        results([{"name": "data wait", "value": median, "unit": "%", "p20": p20, "p80": p80, "n": len(shares),
                  "parameters": where | {"decoder": decoder}}])  # fmt: skip

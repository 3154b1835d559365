"""DALI on the CPU: the same graph as on a GPU, on codecs that DALI decodes everywhere."""

import gc
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from fastjepa.data.decode import probe, read_frames
from fastjepa.data.decoders import dali
from fastjepa.data.decoders.dali import DaliDecoder, EncodedClip, why_not
from fastjepa.data.sampling import Box, ClipDraw, random_box
from fastjepa.data.transforms import transform

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

CPU = torch.device("cpu")
T, CROP = 4, 56
COLOURS = 3.0  # grey levels in the mean, for another upsampling of chroma
VP9 = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu_used": "8"}
MJPEG = {"codec": "mjpeg", "pixels": "yuvj420p"}


@pytest.fixture(scope="module")
def files(tmp_path_factory, film):
    """Videos of different sizes and codecs, two of them turned; by name."""
    folder = tmp_path_factory.mktemp("dali")
    made = {
        "wide.webm": ((96, 160), VP9),
        "tall.mp4": ((144, 112), VP9),
        "intra.mkv": ((120, 128), MJPEG),
        "turned.mp4": ((96, 160), {**VP9, "rotation": 90}),
        "over.mov": ((80, 128), {**MJPEG, "rotation": 180}),
        "back.mp4": ((96, 160), {**VP9, "rotation": -90}),
    }
    for name, (size, settings) in made.items():
        film.write(folder / name, [film.picture(i, *size) for i in range(40)], **settings)
    return folder


@pytest.fixture
def decoder():
    made = []

    def make(**settings):
        made.append(DaliDecoder(**{"frames": T, "crop": CROP, "most": 4, "device": CPU, "threads": 2, **settings}))
        return made[-1]

    yield lambda **settings: make(**{"prefetch": 2, **settings})
    for one in made:
        one.close()


def encoded(path, frames, box=None, flip=False):
    info = probe(path)
    box = box or Box(0, 0, info.height, info.width)
    bytes_ = np.fromfile(path, np.uint8)
    return EncodedClip(str(path), bytes_, np.asarray(frames), box, flip, info.height, info.width, info.rotation)


def drawn(path, rng):
    info = probe(path)
    box = random_box(info.height, info.width, (0.3, 1.0), (0.75, 1.35), rng)
    return encoded(path, rng.integers(0, info.frames, T), box, bool(rng.integers(2)))


def reference(clip, crop=CROP):
    """int32 [3, T, crop, crop]: the clip by way of PyAV."""
    frames = read_frames(probe(clip.path), clip.frames)
    return transform(frames, ClipDraw(clip.frames, clip.box, clip.flip), crop).int()


def distance(found, clip):
    return (found.cpu().int() - reference(clip, found.shape[-1])).abs().float().mean((0, 2, 3)).max().item()


def test_importing_the_decoder_does_not_import_dali():
    code = "import sys, fastjepa.data.decoders.dali; sys.exit(any(name.startswith('nvidia') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("box", [Box(3, 5, CROP, CROP), Box(10, 11, 31, 23), Box(0, 0, 96, 90)])
def test_crop_and_resize_are_those_of_the_cpu_but_for_rounding(tmp_path, film, decoder, box, antialias):
    path = film.write(tmp_path / "square.mkv", [film.picture(i, 96, 96) for i in range(T)], **MJPEG)
    whole, one = decoder(crop=96), decoder(antialias=antialias)
    whole.begin([encoded(path, range(T))])  # cut to its own size, so that these are the frames as DALI decodes them
    frames = whole.finish()[0][0].permute(1, 2, 3, 0).numpy()
    one.begin([encoded(path, range(T), box, flip=True)])
    found = one.finish()[0][0].int()
    if antialias:
        window = torch.from_numpy(frames[:, box.top : box.top + box.height, box.left : box.left + box.width])
        wanted = interpolate(window.permute(0, 3, 1, 2).float(), (CROP, CROP), mode="bilinear", antialias=True)
        wanted = wanted.round().permute(1, 0, 2, 3).flip(-1)
    else:
        wanted = transform(frames, ClipDraw(np.arange(T), box, True), CROP)
    difference = (found - wanted.int()).abs().float()
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_a_batch_of_different_files_boxes_flips_and_unordered_repeated_frames(files, decoder):
    rng = np.random.default_rng(0)
    one = decoder()
    clips = [drawn(files / name, rng) for name in ("wide.webm", "tall.mp4", "intra.mkv", "wide.webm")]
    clips[0].frames[:] = [9, 3, 9, 0]
    clips[1].frames[:] = [39, 39, 39, 38]
    one.begin(clips)
    found, failed = one.finish()
    assert (found.shape, found.dtype, failed) == ((4, 3, T, CROP, CROP), torch.uint8, {})
    assert all(distance(pixels, clip) < COLOURS for pixels, clip in zip(found, clips))
    assert torch.equal(found[0][:, 0], found[0][:, 2])


@pytest.mark.parametrize(
    ("name", "flip"), list(product(["wide.webm", "turned.mp4", "over.mov", "back.mp4"], [False, True]))
)
def test_rotated_videos_are_cut_and_turned_as_displayed(files, decoder, name, flip):
    path = files / name
    assert probe(path).rotation == {"wide.webm": 0, "turned.mp4": 270, "over.mov": 180, "back.mp4": 90}[name]
    clip, straight = encoded(path, [0, 7, 5, 7], Box(11, 6, 50, 70), flip), encoded(files / "tall.mp4", range(T))
    one = decoder()
    one.begin([straight, clip])
    found, _ = one.finish()
    assert distance(found[1], clip) < COLOURS
    assert distance(found[0], straight) < COLOURS


def test_batches_of_changing_size_come_back_in_order(files, decoder):
    one = decoder(prefetch=3)
    clips = [encoded(files / "wide.webm", [i, i + 1, 39 - i, i]) for i in range(12)]
    sizes = [1, 4, 2, 1, 4]
    batches = [clips[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    for batch in batches[:3]:
        one.begin(batch)
    for number, batch in enumerate(batches):
        found, failed = one.finish()
        if number + 3 < len(batches):
            one.begin(batches[number + 3])
        assert len(found) == len(batch)
        assert not failed
        assert all(distance(pixels, clip) < COLOURS for pixels, clip in zip(found, batch))


def test_later_batches_do_not_overwrite_a_result(files, decoder):
    rng = np.random.default_rng(1)
    one = decoder()
    held = []
    for _ in range(12):
        one.begin([drawn(files / "wide.webm", rng), drawn(files / "turned.mp4", rng)])
        found, _ = one.finish()
        held.append((found, found.clone()))
    assert all(torch.equal(found, then) for found, then in held)
    assert len({found.data_ptr() for found, _ in held}) == len(held)
    one.close()
    gc.collect()
    assert all(torch.equal(found, then) for found, then in held)


def test_bytes_that_the_caller_drops_are_decoded_all_the_same(files, decoder):
    one = decoder()
    clips = [encoded(files / "intra.mkv", [20, 1, 2, 3]) for _ in range(4)]
    one.begin(clips)
    del clips
    gc.collect()
    waste = [np.zeros((files / "intra.mkv").stat().st_size, np.uint8) for _ in range(50)]
    found, failed = one.finish()
    assert (len(waste), failed) == (50, {})
    assert distance(found[3], encoded(files / "intra.mkv", [20, 1, 2, 3])) < COLOURS


def test_memory_does_not_grow_over_300_batches(files, decoder):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    rng = np.random.default_rng(2)
    one = decoder()
    clips = [[drawn(files / name, rng) for name in ("wide.webm", "intra.mkv")] for _ in range(10)]
    for number in range(400):
        if number == 100:
            before = resident()
        one.begin(clips[number % len(clips)])
        one.finish()
    assert resident() - before < 40e6  # 300 results are 11 MB each hundred, their pictures 200


def test_frame_numbers_are_those_of_a_decode_in_order(shared, decoder):
    rng = np.random.default_rng(3)
    one = decoder(frames=6, crop=128, most=1)
    paths = sorted((shared / "clips" / "dali_cpu").iterdir())
    assert paths
    for path in paths:
        info = probe(path)
        numbers = rng.integers(1, info.frames - 1, 6)
        one.begin([encoded(path, numbers)])
        found, failed = one.finish()
        assert not failed
        shifts = [reference(encoded(path, numbers + shift), 128) for shift in (-1, 0, 1)]
        means = torch.stack([(found[0].int() - shift).abs().float().mean((0, 2, 3)) for shift in shifts])
        assert (means[1] < COLOURS).all(), path.name
        # Where the picture stands still, its neighbours are just as near.
        assert (means[1] <= means.min(0).values + 0.02).all(), path.name


@pytest.mark.parametrize("count", [0, 5])
def test_a_batch_of_the_wrong_size_is_refused(files, decoder, count):
    with pytest.raises(ValueError, match=f"expected a batch of 1 to 4 clips, given {count}"):
        decoder().begin([encoded(files / "wide.webm", range(T))] * count)


def test_misuse_is_refused_with_a_sentence(files, decoder):
    one, clip = decoder(prefetch=1), encoded(files / "wide.webm", range(T))
    with pytest.raises(ValueError, match="no batch is under way"):
        one.finish()
    with pytest.raises(ValueError, match="expected 4 frame numbers"):
        one.begin([encoded(files / "wide.webm", range(T + 1))])
    one.begin([clip])
    with pytest.raises(ValueError, match="1 batches are under way"):
        one.begin([clip])
    with pytest.raises(ValueError, match=r"does not lie in a picture of 96 x 160$"):
        encoded(files / "wide.webm", range(T), Box(50, 0, 47, 20))
    with pytest.raises(ValueError, match="rotation of 0, 90, 180 or 270"):
        EncodedClip("a", clip.encoded, clip.frames, clip.box, False, 96, 160, 45)


def test_a_decoder_can_be_closed_while_batches_are_under_way(files, decoder):
    one = decoder()
    one.begin([encoded(files / "wide.webm", range(T))] * 4)
    one.begin([encoded(files / "wide.webm", range(T))] * 4)
    one.close()


def test_the_reason_against_dali_names_what_is_missing(monkeypatch):
    assert why_not(CPU) == ""
    assert "not on mps" in why_not(torch.device("mps"))
    monkeypatch.setattr("nvidia.dali.__version__", "2.1.1")
    assert why_not(CPU) == "DALI 2.1.1 is too old: 2.2 or later is needed"
    monkeypatch.setattr(dali, "find_spec", lambda name: None)
    assert "DALI is not installed" in why_not(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not(torch.device("cuda")) == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(dali.ctypes, "CDLL", missing)
    assert "libnvcuvid.so.1: cannot open" in why_not(torch.device("cuda", 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_pipeline_that_cannot_be_built_is_one_sentence(decoder):
    with pytest.raises(RuntimeError, match=r"^DALI cannot decode on cuda:0: [^\n]+$"):
        decoder(device=torch.device("cuda", 0))


@pytest.mark.gpu
def test_a_gpu_decodes_the_same_and_its_results_last(tmp_path, film, decoder):
    gpu = torch.device("cuda")
    if reason := why_not(gpu):
        pytest.fail(f"the GPU is there, but {reason}")
    images = [film.picture(i, 192, 256) for i in range(30)]  # NVDEC refuses small pictures
    paths = [
        film.write(tmp_path / "h264.mp4", images, bf="2"),
        film.write(tmp_path / "vp9.webm", images, **VP9),
        film.write(tmp_path / "turned.mp4", images, rotation=90),
    ]
    rng = np.random.default_rng(4)
    one, held = decoder(device=gpu), []
    text = EncodedClip("text", np.frombuffer(b"text" * 900, np.uint8), np.arange(T), Box(0, 0, 9, 9), False, 192, 256)
    for number in range(30):
        clips = [drawn(path, rng) for path in paths] + ([text] if number % 10 == 3 else [])
        with torch.cuda.stream(torch.cuda.Stream()):
            one.begin(clips)
            found, failed = one.finish()
            held.append((clips, found, found.clone()))
        assert list(failed) == ([3] if number % 10 == 3 else [])
    torch.cuda.synchronize()
    for clips, found, then in held:
        assert torch.equal(found, then)
        assert all(distance(pixels, clip) < COLOURS for pixels, clip in zip(found, clips) if clip is not text)

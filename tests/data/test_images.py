"""Images as videos of one frame, and folders of numbered images as videos."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from fastjepa.data import images
from fastjepa.data.dataset import ClipDataset, Reader
from fastjepa.data.decode import VideoError
from fastjepa.data.images import sequence
from fastjepa.data.index import update_index
from fastjepa.data.media import encoded, probe, read_frames, status
from fastjepa.data.sampling import ClipPlan
from fastjepa.data.source import open_videos

EXIF_TURN = Image.Exif()
EXIF_TURN[0x0112] = 6  # to be shown turned by 90 degrees clockwise


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return str(path)


@pytest.fixture
def frames(tmp_path, film):
    """A folder of pictures that show their number, which is also the number in their name."""

    def make(numbers, name="clip", pattern="frame_{:04}.png"):
        for number in numbers:
            save(tmp_path / name / pattern.format(number), film.picture(number))
        return tmp_path / name

    return make


# -- single images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.jpg", "jpeg", {"quality": 95}),
        ("a.JPEG", "jpeg", {"quality": 95}),
        ("a.png", "png", {}),
        ("a.webp", "webp", {"lossless": True}),
        ("a.bmp", "bmp", {}),
        ("a.tif", "tiff", {"compression": "tiff_lzw"}),
        ("not_really.png", "jpeg", {"format": "JPEG", "quality": 95}),
    ],
)
def test_an_image_is_a_video_of_one_frame(tmp_path, film, name, codec, options):
    info = probe(save(tmp_path / name, film.picture(77), **options))
    assert (info.frames, info.height, info.width, info.codec) == (1, film.HEIGHT, film.WIDTH, codec)
    assert info.still
    assert info.rate is info.duration is None
    read = read_frames(info, [0, 0, 0])
    assert (read.shape, read.dtype) == ((3, film.HEIGHT, film.WIDTH, 3), np.uint8)
    assert [film.number_of(picture) for picture in read] == [77] * 3
    with pytest.raises(ValueError, match=r"^frame 1 does not exist"):
        read_frames(info, [1])


def test_a_clip_of_an_image_takes_the_memory_of_one_picture(tmp_path, film):
    read = read_frames(probe(save(tmp_path / "a.png", film.picture(3))), [0] * 16)
    assert np.shares_memory(read[0], read[15])
    assert read.flags.writeable  # torch warns of arrays that are not


def test_the_orientation_of_a_photo_is_applied(tmp_path, film):
    upright = film.picture(9)
    info = probe(save(tmp_path / "a.png", np.rot90(upright), exif=EXIF_TURN))
    assert (info.height, info.width) == (film.HEIGHT, film.WIDTH)
    assert np.array_equal(read_frames(info, [0])[0], upright)


def one_pixel(mode, value):
    return Image.new(mode, (4, 4), value)


PALETTE = one_pixel("RGB", (10, 200, 30)).quantize()
HALF = one_pixel("RGBA", (200, 100, 50, 128))


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", one_pixel("L", 90), (90, 90, 90)),
        ("bit.png", one_pixel("1", 1), (255, 255, 255)),
        ("palette.png", PALETTE, (10, 200, 30)),
        ("palette.bmp", PALETTE, (10, 200, 30)),
        ("half_transparent.png", HALF, (100, 50, 25)),
        ("hidden_colour.png", one_pixel("RGBA", (255, 255, 255, 0)), (0, 0, 0)),
        ("grey_alpha.png", one_pixel("LA", (200, 128)), (100, 100, 100)),
        ("deep.png", Image.fromarray(np.full((4, 4), 0x8040, np.uint16)), (0x80, 0x80, 0x80)),
        ("deep.tif", Image.fromarray(np.full((4, 4), 0x8040, np.uint16)), (0x80, 0x80, 0x80)),
        ("deeper.tif", Image.fromarray(np.full((4, 4), 0x8040, np.int32)), (0x80, 0x80, 0x80)),
        ("print.tif", one_pixel("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    ],
)
def test_all_kinds_of_pixels_become_8_bit_rgb(tmp_path, name, image, expected):
    read = read_frames(probe(save(tmp_path / name, image)), [0])
    assert read.shape == (1, 4, 4, 3)
    assert np.abs(read.astype(int) - expected).max() <= 1


def test_transparent_colours_of_a_palette_show_black(tmp_path):
    index = PALETTE.getpixel((0, 0))
    info = probe(save(tmp_path / "a.png", PALETTE, transparency=index))
    assert not read_frames(info, [0]).any()


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def noise(path):
    return save(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


BAD = {
    "text.jpg": (lambda path: path.write_text("no image\n" * 50), images.DAMAGED),
    "video_list.png": (lambda path: path.write_text("a.mp4 1\n"), images.DAMAGED),
    "vector.png": (lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), images.DAMAGED),
    "script.jpg": (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), images.DAMAGED),
    "other_format.jpg": (lambda path: path.write_bytes(b"P6 2 2 255\n" + bytes(12)), images.DAMAGED),
    "empty.png": (lambda path: path.touch(), "the file is empty"),
    "missing.png": (lambda path: None, "the file does not exist"),
    "folder.jpg": (lambda path: path.mkdir(), "it is a folder, and not one of frames with consecutive numbers"),
    "pipe.png": (lambda path: os.mkfifo(path), "it is not a regular file"),
    "cut.jpg": (lambda path: noise(path) and cut(path), images.DAMAGED),
    "cut.png": (lambda path: noise(path) and cut(path), images.DAMAGED),
    "cut.webp": (lambda path: noise(path) and cut(path), images.DAMAGED),
    "cut.bmp": (lambda path: noise(path) and cut(path), images.DAMAGED),
    "cut.tif": (lambda path: noise(path) and cut(path), images.DAMAGED),
    "float.tif": (
        lambda path: save(path, np.ones((4, 4), np.float32)),
        "its pixels are floating-point numbers, whose range is not known",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_read_is_refused_with_a_sentence(tmp_path, name):
    make, sentence = BAD[name]
    make(tmp_path / name)
    with pytest.raises(VideoError) as caught:
        probe(str(tmp_path / name))
    assert (str(caught.value), caught.value.path) == (sentence, str(tmp_path / name))


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = noise(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(VideoError, match=r"^it has more than 4,094 pixels$"):
        probe(path)


def test_an_encoded_video_is_not_to_be_had_of_images_and_folders(tmp_path, frames):
    with pytest.raises(VideoError, match="it is an image, not an encoded video"):
        encoded(noise(tmp_path / "a.png"))
    with pytest.raises(VideoError, match="it is a folder"):
        encoded(str(frames(range(3))))


def test_the_encoded_video_is_the_file(tmp_path, film):
    path = film.video(tmp_path / "a.mp4", 4)
    assert encoded(str(path)).tobytes() == path.read_bytes()
    with pytest.raises(VideoError, match="does not exist"):
        encoded(str(tmp_path / "b.mp4"))


# -- folders of frames: the rule --------------------------------------------------------------------------------------


def numbered(numbers, pattern="f{}.jpg"):
    return [pattern.format(number) for number in numbers]


@pytest.mark.parametrize(
    "names",
    [
        ["f0.jpg", "f1.jpg"],
        ["7.png", "8.png", "9.png"],
        numbered(range(300), "frame_{:04}.jpg"),
        numbered(range(98, 103)),  # without padding the order of names is another
        numbered(range(5), "cam2 take1.{:03}.TIFF"),
    ],
)
def test_consecutive_numbers_make_a_video_in_the_order_of_the_numbers(names):
    assert sequence(sorted(names)) == names
    assert sequence([*names, "notes.txt", "._" + names[0], ".DS_Store"]) == names


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["f1.jpg"],
        ["a.jpg", "b.jpg"],
        ["f1.jpg", "f3.jpg"],
        ["f1.jpg", "f2.png"],
        ["f1.jpg", "g2.jpg"],
        ["f1.jpg", "f01.jpg", "f2.jpg"],  # one number twice
        ["f1.jpg", "f2.jpg", "cover.jpg"],
        numbered([0, 1, 2, 3, 4, 5, 7]),  # seven of eight are too few to call it a hole
        numbered([*range(9), 10_000_000_000]),
        numbered([0, 1, 2, 3, 4, 5, 6, 7, 9, 10][:9]),  # nine of ten are not more than 90 %
    ],
)
def test_other_images_are_images(names):
    assert sequence(names) is None


def test_a_hole_is_filled_with_the_nearest_earlier_frame():
    there = [number for number in range(5, 35) if number not in (10, 11)]
    filled = sequence(numbered(there))
    assert filled == numbered(9 if number in (10, 11) else number for number in range(5, 35))
    assert sequence(numbered([0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11])) is not None


# -- folders of frames: reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["frame_{:04}.png", "{}.png"])
def test_a_folder_of_frames_is_a_video(frames, film, pattern):
    info = probe(str(frames(range(7, 27), pattern=pattern)))
    assert (info.frames, info.height, info.width, info.codec) == (20, film.HEIGHT, film.WIDTH, "png")
    assert not info.still
    assert info.rate is info.duration is None
    assert [film.number_of(picture) for picture in read_frames(info, [19, 0, 3, 3])] == [26, 7, 10, 10]
    with pytest.raises(ValueError, match=r"^frame 20 does not exist"):
        read_frames(info, [20])


def test_missing_and_damaged_frames_are_replaced_by_the_nearest_earlier_one(frames, film):
    folder = frames(number for number in range(20) if number != 12)
    for number in (0, 1, 5, 6):
        (folder / f"frame_{number:04}.png").write_text("no image")
    info = probe(str(folder))
    assert info.frames == 20
    shown = [film.number_of(picture) for picture in read_frames(info, [0, 1, 2, 5, 6, 7, 12])]
    assert shown == [2, 2, 2, 4, 4, 7, 11]
    for file in folder.iterdir():
        file.write_text("no image")
    for reading in (lambda: probe(str(folder)), lambda: read_frames(info, [3])):
        with pytest.raises(VideoError, match=r"^none of its frames can be decoded$"):
            reading()


def test_all_frames_have_the_size_of_the_first(frames, film):
    folder = frames(range(4))
    save(folder / "frame_0002.png", film.picture(2, film.HEIGHT * 2, film.WIDTH * 3))
    read = read_frames(probe(str(folder)), range(4))
    assert read.shape == (4, film.HEIGHT, film.WIDTH, 3)
    assert [film.number_of(picture) for picture in read] == [0, 1, 2, 3]


def test_a_folder_that_lost_frames_since_is_an_error(frames):
    folder = frames(range(5))
    info = probe(str(folder))
    (folder / "frame_0004.png").unlink()
    with pytest.raises(VideoError, match=r"^it had 5 frames before, and has 4 now$"):
        read_frames(info, [2])


def test_a_folder_has_the_size_and_latest_time_of_its_frames(frames):
    folder = frames(range(3))
    for file in folder.iterdir():
        os.utime(file, ns=(0, 5_000))
    os.utime(folder / "frame_0001.png", ns=(0, 9_000))
    assert status(str(folder)) == (sum(file.stat().st_size for file in folder.iterdir()), 9_000)


# -- collections ------------------------------------------------------------------------------------------------------


def names_of(videos, root):
    return [os.path.relpath(path, root) for path in videos.paths]


def test_folders_of_frames_and_images_are_found_where_there_is_no_video(tmp_path, frames):
    for name in ("b/clip2", "b/clip1", "c"):
        frames(range(3), name)
    for name in ("b/photo.png", "a.jpg", "z.webp", "c/deeper/x.bmp"):
        noise(tmp_path / name)
    (tmp_path / "b/notes.txt").write_text("x")
    videos = open_videos(str(tmp_path), 0)
    assert names_of(videos, tmp_path) == ["a.jpg", "z.webp", "b/photo.png", "b/clip1", "b/clip2", "c", "c/deeper/x.bmp"]
    assert videos.description == f"3 folders of frames, 4 images under {tmp_path}"
    assert videos.shards is None


def test_a_folder_of_frames_can_be_the_whole_collection(frames):
    folder = frames(range(3))
    videos = open_videos(str(folder), 0)
    assert [os.path.normpath(path) for path in videos.paths] == [str(folder)]
    assert videos.description == f"1 folder of frames under {folder}"


def test_images_beside_videos_change_nothing_and_are_said(tmp_path, frames):
    for name in ("v/a.mp4", "v/deep/b.mkv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    before = open_videos(str(tmp_path / "v"), 0)
    assert before.description == f"2 videos under {tmp_path / 'v'}"
    noise(tmp_path / "v/a.jpg")
    noise(tmp_path / "v/other/photo.jpg")
    frames(range(3), "v/frames")
    after = open_videos(str(tmp_path / "v"), 0)
    assert (after.paths, after.fingerprint) == (before.paths, before.fingerprint)
    assert after.description == before.description + "; left out beside videos: 1 folder of frames, 2 images"


def test_the_fingerprint_of_a_folder_of_videos_is_the_one_it_always_had(tmp_path):
    for name in ("b.mp4", "sub/a.mkv", "sub/c d.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    # Runs of earlier versions go on only where this stays.
    known = "4c9e620ba8bb13ee976810f429c220baabffcf2aa0b3d87c14cf45a5349a0bbb"
    assert open_videos(str(tmp_path), 0).fingerprint == known


def test_a_list_may_name_folders_of_frames_and_images_beside_videos(tmp_path, frames, film):
    film.video(tmp_path / "a.mp4", 8)
    frames(range(30, 36), "take 1")
    noise(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("a.mp4,x\ntake 1,y\na.png,x\n")
    videos = open_videos(str(tmp_path / "list.csv"), 0)
    assert names_of(videos, tmp_path) == ["a.mp4", "take 1", "a.png"]
    assert videos.tasks["label"].labels.tolist() == [0, 1, 0]
    assert [probe(path).frames for path in videos.paths] == [8, 6, 1]


def test_one_image_is_a_collection(tmp_path):
    path = noise(tmp_path / "a.png")
    videos = open_videos(path, 0)
    assert (videos.paths, videos.description) == ([path], f"the image {path}")


def test_names_that_are_no_text_are_read(tmp_path, film):
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    for number in range(3):
        save(folder / f"{os.fsdecode(bytes([0xE9]))}{number}.png", film.picture(number))
    videos = open_videos(str(tmp_path), 0)
    assert videos.paths == [str(folder)]
    assert film.number_of(read_frames(probe(videos.paths[0]), [2])[0]) == 2


def test_an_image_is_exempt_from_the_least_length_and_its_clip_stands_still(tmp_path, frames):
    path = noise(tmp_path / "a.png")
    short = str(frames(range(2)))
    reader = Reader([path, short], least_frames=4)
    with pytest.raises(VideoError, match="it has 2 frames, fewer than one tubelet of 4"):
        reader.info(1)
    plan = ClipPlan(0, np.arange(1), 8, 4, (1.0, 1.0), (1.0, 1.0), False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (clip,) = ClipDataset(reader, plan, 64)[0].clips
    assert clip.shape == (3, 8, 64, 64)
    assert np.array_equal(clip[:, 0].permute(1, 2, 0), np.asarray(Image.open(path)))
    assert (clip == clip[:, :1]).all()


def test_the_index_describes_images_and_frames_and_opens_only_what_changed(tmp_path, frames):
    place = tmp_path / "data"
    noise(place / "a.png")
    (place / "bad.jpg").write_text("no image")
    frames(range(10), "data/clip")
    file = tmp_path / "index.jsonl"
    index = update_index(str(place), file, say=print)
    still, bad, clip = sorted(index.entries, key=lambda entry: entry.path)
    assert (still.frames, still.still, still.seekable, still.rate, still.decoders) == (1, True, True, None, ("pyav",))
    assert (clip.frames, clip.still, clip.seekable, clip.gop) == (10, False, True, 1.0)
    assert bad.reason == images.DAMAGED
    again = update_index(str(place), file, say=print)
    assert (again.entries, again.opened) == (index.entries, 0)
    save(place / "clip" / "frame_0003.png", np.zeros((9, 9, 3), np.uint8))
    assert update_index(str(place), file, say=print).opened == 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_what_pillow_makes_of_damaged_bytes_is_a_sentence():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        out = io.BytesIO()
        picture.save(out, kind, exif=EXIF_TURN) if kind != "BMP" else picture.save(out, kind)
        refused = 0
        for _ in range(60):
            content = np.frombuffer(out.getvalue(), np.uint8).copy()
            content[rng.integers(0, 80, 8)] = rng.integers(0, 255, 8)
            try:
                images.probe_image("a", io.BytesIO(content.tobytes()))
            except VideoError:
                refused += 1
        assert refused, kind

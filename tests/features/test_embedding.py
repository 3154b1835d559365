"""Features are those of the encoder on the same frames, whatever the batches and processes; files are whole."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastjepa.__main__ import main
from fastjepa.build import build_jepa
from fastjepa.config import Settings, flat
from fastjepa.data.media import probe, read_frames
from fastjepa.data.replaced import TooManyBadFiles
from fastjepa.data.sampling import central_box
from fastjepa.data.source import open_videos
from fastjepa.data.transforms import cut
from fastjepa.exits import Exit
from fastjepa.features import embed, embed_to_file
from fastjepa.features.files import read_features
from fastjepa.fit import state_of
from fastjepa.interop import Weights, write_folder

SETTINGS = Settings.model_validate(
    {
        "model": {"name": "vit_nano", "predictor_dim": 16, "predictor_depth": 1, "init_std": 0.05},
        "data": {"frames": 4, "stride": 1, "crop": 16, "patch": 8, "path": "x"},
    }
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An exported folder."""
    out = tmp_path_factory.mktemp("weights") / "nano"
    held = Weights(out, "weights of a test", state_of(build_jepa(SETTINGS)), [], "yours", (2, 2), flat(SETTINGS))
    write_folder(held, SETTINGS, out, "target_encoder", everything=False)
    return out


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A folder of five clips of 10 frames, and its names."""
    root = tmp_path_factory.mktemp("videos")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        drawn = open_videos("synthetic://moving-shapes?videos=8&size=32&frames=10", 0).paths
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before
    (root / "clips").mkdir()
    for number, path in enumerate(drawn[:5]):
        shutil.copy(path, root / "clips" / f"{number}.mp4")
    return root / "clips"


@pytest.fixture
def videos(collection, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(collection, tmp_path / "clips")


def by_hand(weights, path, numbers):
    from fastjepa.opened import open_encoder

    opened = open_encoder(weights)
    info = probe(str(path))
    frames = read_frames(info, np.array(numbers))
    clip = cut(frames, central_box(info.height, info.width), False, 16)
    return opened.encoder(clip[None])[0]


def test_features_are_those_of_the_encoder_on_the_same_frames(weights, videos):
    found = embed(weights, videos / "0.mp4")
    assert found.start_frame.tolist() == [0, 4, 6]  # 10 frames: the last window ends with the video
    np.testing.assert_allclose(found.start_seconds, probe(str(videos / "0.mp4")).times[[0, 4, 6]])
    tokens = torch.stack([by_hand(weights, videos / "0.mp4", range(first, first + 4)) for first in (0, 4, 6)])
    torch.testing.assert_close(found.features, tokens.mean(dim=1))
    kept = embed(weights, videos / "0.mp4", pool="tokens").features
    torch.testing.assert_close(kept, tokens)
    slots = embed(weights, videos / "0.mp4", pool="slots").features
    torch.testing.assert_close(slots, tokens.unflatten(1, (2, 4)).mean(dim=2))
    assert not torch.allclose(found.features[0], found.features[1])


def test_batches_change_rounding_only_and_processes_nothing(weights, videos):
    alone = embed(weights, videos, every=1, batch=4)
    assert len(alone.features) == 5 * 7
    assert alone.video.tolist() == [number for number in range(5) for _ in range(7)]
    assert alone.start_frame.tolist() == 5 * list(range(7))
    together = embed(weights, videos, every=1, batch=4, workers=2)
    for name in ("features", "video", "start_frame", "start_seconds"):
        assert torch.equal(getattr(alone, name), getattr(together, name)), name
    for batch in (1, 3, 64):
        other = embed(weights, videos, every=1, batch=batch)
        torch.testing.assert_close(other.features, alone.features)
        assert torch.equal(other.start_frame, alone.start_frame)
        assert torch.equal(other.video, alone.video)


def test_a_file_holds_the_same(weights, videos, tmp_path):
    found = embed(weights, videos)
    report = embed_to_file(weights, videos, tmp_path / "f.safetensors")
    tensors, names = read_features(tmp_path / "f.safetensors")
    assert (report.windows, report.shape, report.videos) == (15, (64,), 5)
    assert names == found.videos
    for name in ("features", "video", "start_frame", "start_seconds"):
        assert torch.equal(tensors[name], getattr(found, name)), name
    embed_to_file(weights, videos, tmp_path / "half.safetensors", store="float16", pool="tokens")
    halves = read_features(tmp_path / "half.safetensors")[0]["features"]
    assert (halves.dtype, halves.shape) == (torch.float16, (15, 8, 64))
    with safe_open(str(tmp_path / "f.safetensors"), "pt") as opened:
        assert opened.metadata()["pool"] == "mean"
        assert opened.metadata()["licence"] == "yours"


def test_labels_go_along(weights, videos, tmp_path):
    (tmp_path / "list.csv").write_text("".join(f"{videos / f'{n}.mp4'},{'ab'[n % 2]}\n" for n in range(4)))
    assert embed(weights, tmp_path / "list.csv", central=True).labels == {"label": ["a", "b", "a", "b"]}


def test_what_cannot_be_read_is_named_and_left_out(weights, videos, tmp_path, capsys):
    (videos / "1.mp4").write_bytes(b"no video")
    out = tmp_path / "f.safetensors"
    assert main(["embed", str(weights), str(videos), "--out", str(out), "--workers", "0"]) == Exit.DONE
    shown = capsys.readouterr()
    assert f"left out   {videos / '1.mp4'}: it is not a video file" in shown.err
    assert "[12, 64] of 12 windows of 4 videos" in shown.out
    assert read_features(out)[0]["video"].unique().tolist() == [0, 2, 3, 4]
    for path in videos.iterdir():
        path.write_bytes(b"no video")
    again = tmp_path / "none.safetensors"
    assert main(["embed", str(weights), str(videos), "--out", str(again), "--workers", "0"]) == Exit.TOO_MANY_BAD_FILES
    assert "none of the 5 files can be read" in capsys.readouterr().err
    assert not again.exists()


def test_a_video_that_fails_while_it_is_decoded_costs_itself(weights, videos, tmp_path, monkeypatch):
    from fastjepa.data.dataset import Reader
    from fastjepa.data.decode import VideoError

    read = Reader.read

    def breaks(self, video, frames):
        if video == 2:
            raise VideoError("the disk is away", self.paths[video])
        return read(self, video, frames)

    monkeypatch.setattr(Reader, "read", breaks)
    report = embed_to_file(weights, videos, tmp_path / "f.safetensors", batch=4)
    assert [reason for _, reason in report.bad] == ["the disk is away"]
    tensors, _ = read_features(tmp_path / "f.safetensors")
    assert tensors["features"].shape == (12, 64)
    assert tensors["video"].unique().tolist() == [0, 1, 3, 4]


def test_too_many_that_cannot_be_read_end_it_before_anything_is_computed(weights, videos, tmp_path, capsys):
    for number in range(11):
        (videos / f"bad{number}.mp4").write_bytes(b"no video")
    command = ["embed", str(weights), str(videos), "--out", str(tmp_path / "f.safetensors"), "--workers", "0"]
    assert main(command) == Exit.TOO_MANY_BAD_FILES
    assert "11 of 16 files cannot be read, more than the 10 that" in capsys.readouterr().err
    counted = set()
    with pytest.raises(TooManyBadFiles):
        embed(weights, videos, progress=lambda what, done, total: counted.add(what))
    assert counted == {"videos looked at"}
    assert main([*command, "--max-bad", "1"]) == Exit.DONE


@pytest.mark.parametrize("name", ["f.safetensors", "f.parquet"])
def test_an_interrupt_leaves_no_file(weights, videos, tmp_path, monkeypatch, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")

    def interrupted(what, done, total):
        if what == "windows" and done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_to_file(weights, videos, tmp_path / name, progress=interrupted, batch=4, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--out", "f.txt"], "ends in .safetensors or .parquet, given 'f.txt'"),
        (["--out", "f.safetensors", "--every", "often"], "expected a number of source frames"),
        (
            ["--out", "f.safetensors", "--center", "--every", "4"],
            "--every: expected without --center, which is one window of a video, given 4\n",
        ),
        (
            ["--out", "f.safetensors", "--stride", "2", "--fps", "3"],
            "--stride: expected without --fps, which takes its place, given 2\n",
        ),
        (["--out", "f.safetensors", "--stride", "0"], "expected a whole number (at least 1), given '0'"),
        (["--out", "f.safetensors", "--max-bad", "2"], "expected a share from 0 to 1, given '2'"),
        (["--out", "f.safetensors", "--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N, given 'tpu'"),
        ([], "--out"),
    ],
)
def test_mistakes_are_sentences(weights, videos, tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    assert main(["embed", str(weights), str(videos), *more]) == Exit.WRONG_INPUT
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_nothing_is_overwritten(weights, videos, tmp_path, capsys):
    (tmp_path / "f.safetensors").write_text("mine")
    assert main(["embed", str(weights), str(videos), "--out", str(tmp_path / "f.safetensors")]) == Exit.WRONG_INPUT
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "f.safetensors").read_text() == "mine"


def test_parquet_without_pyarrow_is_a_sentence(weights, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["embed", str(weights), str(videos), "--out", str(tmp_path / "f.parquet")]) == Exit.WRONG_INPUT
    assert "needs pyarrow" in capsys.readouterr().err


def test_parquet_holds_the_same(weights, videos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    (tmp_path / "list.csv").write_text("".join(f"{videos / f'{n}.mp4'},{'ab'[n % 2]}\n" for n in range(4)))
    found = embed(weights, tmp_path / "list.csv", pool="slots")
    embed_to_file(weights, tmp_path / "list.csv", tmp_path / "f.parquet", pool="slots")
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["path", "label", "start_frame", "start_seconds", "feature"]
    shape = json.loads(table.schema.metadata[b"shape"])
    features = np.stack(table["feature"].to_numpy(zero_copy_only=False)).reshape(-1, *shape)
    assert np.array_equal(features, found.features.numpy())
    assert table["path"].to_pylist() == [found.videos[n] for n in found.video.tolist()]
    assert table["label"].to_pylist() == ["ab"[n % 2] for n in found.video.tolist()]


def test_the_program_ends_with_its_processes(weights, videos, tmp_path):
    """With worker processes the command comes to an end by itself."""
    out = tmp_path / "f.safetensors"
    command = [
        sys.executable,
        "-m",
        "fastjepa",
        "embed",
        str(weights),
        str(videos),
        "--out",
        str(out),
        "--workers",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert "15 windows of 5 videos" in done.stdout

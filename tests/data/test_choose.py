"""Which decoder a run takes, and what it says about it."""

import pytest
import torch

from fastjepa.data.decoders import choose
from fastjepa.data.decoders.choose import choose_decoder, decodes_av1
from fastjepa.data.indexfile import Entry

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def entry(number, codec="h264", pixels="yuv420p", decoders=("pyav", "dali_gpu"), reason=None):
    facts = {"frames": 50, "width": 320, "height": 240, "codec": codec, "pixel_format": pixels, "decoders": decoders}
    return Entry(f"/{number}.mp4", 9, 9, reason, **({} if reason else facts))


MIXED = [
    entry(0),
    entry(1, "hevc", "yuv420p10le", ("pyav",)),
    entry(2, reason="it has no video stream"),
    entry(3, "vp9", decoders=("pyav", "dali_gpu", "dali_cpu")),
    entry(4),
]


def not_needed():
    raise AssertionError("the index is not needed for this")


@pytest.fixture
def dali(monkeypatch):
    """Makes DALI usable, or not for a reason."""

    def make(reason="", capability=(9, 0)):
        monkeypatch.setattr(choose.dali, "why_not", lambda device: reason)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    make()
    return make


def test_on_a_gpu_dali_decodes_what_it_can_and_pyav_the_rest(dali):
    decoder = choose_decoder("auto", CUDA, "", lambda: MIXED)
    assert (decoder.name, decoder.reason) == ("dali_gpu", "DALI and a GPU are there")
    assert decoder.encoded.tolist() == [True, False, False, True, True]
    assert decoder.entries == MIXED
    assert [line.strip() for line in decoder.lines] == [
        "dali_gpu 3 videos, pyav 1, unreadable 1",
        "for pyav: 1 hevc yuv420p10le 320 x 240",
    ]


@pytest.mark.parametrize(("capability", "taken"), [((9, 0), False), ((8, 0), False), ((8, 9), True)])
def test_av1_goes_to_pyav_where_the_gpu_cannot_decode_it(dali, capability, taken):
    dali(capability=capability)
    entries = [entry(0, "av1"), entry(1), entry(2, "av1", decoders=("pyav",))]
    decoder = choose_decoder("dali_gpu", CUDA, "", lambda: entries)
    assert decoder.encoded.tolist() == [taken, True, False]
    assert [line.strip() for line in decoder.lines] == [
        f"dali_gpu {1 + taken} videos, pyav {2 - taken}, unreadable 0",
        f"for pyav: {2 - taken} av1 yuv420p 320 x 240",
    ]


def test_av1_is_decoded_by_gpus_from_ampere_for_desktops_on_but_not_by_hopper():
    with_it = [(8, 6), (8, 9), (10, 0), (10, 3), (12, 0)]
    without = [(7, 0), (7, 5), (8, 0), (9, 0)]
    assert [decodes_av1(capability) for capability in with_it + without] == [True] * 5 + [False] * 4


def test_asked_for_on_a_cpu_dali_takes_what_its_own_decoders_read(dali, monkeypatch):
    monkeypatch.delattr(torch.cuda, "get_device_capability")
    decoder = choose_decoder("dali_cpu", CPU, "", lambda: MIXED)
    assert (decoder.name, decoder.reason) == ("dali_cpu", "asked for")
    assert decoder.encoded.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("device", "needs", "dali_says", "entries", "reason"),
    [
        (CPU, "", "", not_needed, "there is no GPU to decode on"),
        (CUDA, "", "DALI is not installed", not_needed, "DALI is not installed"),
        (CUDA, "data.erase", "", not_needed, "data.erase works on frames in the loader processes"),
        (
            CUDA, "", "", lambda: MIXED[1:3],
            "it can decode none of the 2 videos: 1 hevc yuv420p10le 320 x 240, 1 unreadable",
        ),
    ],
)  # fmt: skip
def test_otherwise_auto_is_pyav_with_the_reason(dali, device, needs, dali_says, entries, reason):
    dali(dali_says)
    decoder = choose_decoder("auto", device, needs, entries)
    assert (decoder.name, decoder.reason, decoder.encoded) == ("pyav", f"not dali_gpu: {reason}", None)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/cache"), RuntimeError("no process")])
def test_without_an_index_auto_is_pyav_and_a_name_is_refused(dali, error):
    def entries():
        raise error

    decoder = choose_decoder("auto", CUDA, "", entries)
    assert (decoder.name, decoder.encoded) == ("pyav", None)
    assert decoder.reason == f"not dali_gpu: the index of the videos cannot be made: {error}"
    with pytest.raises(ValueError, match=r"^data\.decoder: dali_gpu cannot be used here: the index of the video"):
        choose_decoder("dali_gpu", CUDA, "", entries)


def test_what_was_asked_for_and_cannot_run_is_refused_in_a_sentence(dali, monkeypatch):
    dali("libnvcuvid.so.1 cannot be loaded")
    with pytest.raises(ValueError, match=r"^data\.decoder: dali_gpu cannot be used here: libnvcuvid\.so\.1 cannot be "):
        choose_decoder("dali_gpu", CUDA, "", not_needed)
    dali()
    with pytest.raises(ValueError, match=r"^data\.decoder: dali_cpu cannot be used here: it can decode none of the 1 "):
        choose_decoder("dali_cpu", CPU, "", lambda: MIXED[:1])
    monkeypatch.setattr(choose.torchcodec, "why_not", lambda: "torchcodec is not installed")
    with pytest.raises(ValueError, match=r"^data\.decoder: torchcodec cannot run here: torchcodec is not installed$"):
        choose_decoder("torchcodec", CPU, "", not_needed)


def test_decoders_of_the_loader_processes_need_no_index(monkeypatch):
    monkeypatch.setattr(choose.torchcodec, "why_not", lambda: "")
    for name in ("pyav", "torchcodec"):
        decoder = choose_decoder(name, CUDA, "data.erase", not_needed)
        assert (decoder.name, decoder.reason, decoder.entries, decoder.encoded) == (name, "asked for", None, None)


def test_many_kinds_are_summed_up():
    kinds = [entry(n, f"codec{n}", decoders=("pyav",)) for n in range(7)]
    assert choose._kinds(kinds).endswith(" and 3 more kinds")

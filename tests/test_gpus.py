import pytest
import torch

from fastjepa import gpus
from fastjepa.gpus import GPUS, called, named, of_device, of_this_machine, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["h200", "H200", " NVIDIA H200 ", "nvidia-h200"])
def test_a_gpu_is_named_as_people_write_it(name):
    assert named(name) is GPUS["h200"]


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "GeForce RTX 4090", "rtx-4090"])
def test_cards_of_desktops_are_named_as_people_write_them(name):
    assert named(name) is GPUS["rtx4090"]


def test_a_gpu_is_named_as_it_is_printed_too():
    for gpu in GPUS.values():
        assert named(gpu.name) is gpu


@pytest.mark.parametrize(("name", "nearest"), [("h201", "h20"), ("a100-20gb", "a100-40gb"), ("b20", "b200")])
def test_an_unknown_name_is_one_sentence_with_the_nearest_names_first(name, nearest):
    with pytest.raises(ValueError, match=f"--gpu: expected one of .*, given '{name}'$") as error:
        named(name)
    listed = str(error.value).removeprefix("--gpu: expected one of ").partition(", given")[0].split(", ")
    assert nearest in listed[:2]
    assert set(listed) == set(GPUS)


@pytest.mark.parametrize(
    ("driver", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
    ],
)
def test_drivers_names_are_known(driver, key):
    assert called(driver) is GPUS[key]


@pytest.mark.parametrize(
    "driver",
    ["NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "NVIDIA A10",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "Tesla T4", "NVIDIA B300"],
)  # fmt: skip
def test_other_cards_are_not_taken_for_known_ones(driver):
    assert called(driver) is None


@pytest.mark.parametrize("key", GPUS)
def test_ceilings_stay_below_the_data_sheet(key):
    gpu = GPUS[key]
    assert 0.75 < gpu.product(2) / gpu.bf16 < 0.85
    assert 0.85 < gpu.copy / gpu.bandwidth < 0.95
    assert gpu.product(4) < gpu.float32 < gpu.bf16


def test_the_measured_ceilings_of_the_h200():
    assert (GPUS["h200"].product(2), GPUS["h200"].copy) == (790e12, 4.3e12)


def stand_in_for_cuda(monkeypatch, name: str, memory: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, memory))


def test_the_gpu_of_this_machine_has_the_memory_that_it_has(monkeypatch):
    stand_in_for_cuda(monkeypatch, "NVIDIA A100-SXM4-80GB", 85_000_000_000)
    gpu, reason = of_this_machine()
    assert (gpu.name, gpu.memory) == ("A100 80GB", 85e9)
    assert "of this machine" in reason
    assert peak_flops(torch.device("cuda", 0)) == 312e12


def test_without_a_known_gpu_the_plan_is_for_the_h200_and_says_why(monkeypatch):
    stand_in_for_cuda(monkeypatch, "NVIDIA T1000", 4_000_000_000)
    gpu, reason = of_this_machine()
    assert gpu is GPUS["h200"]
    assert "no figures for this machine's NVIDIA T1000" in reason
    assert of_device(torch.device("cuda", 0)) is None
    monkeypatch.setattr(gpus.torch.cuda, "is_available", lambda: False)
    gpu, reason = of_this_machine()
    assert gpu is GPUS["h200"]
    assert "no GPU" in reason


def test_mfu_has_no_peak_on_a_cpu():
    assert peak_flops(CPU) is None

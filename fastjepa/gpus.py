"""GPUs whose figures are public: memory, peaks, bandwidth. What a plan is made for, and what MFU is counted against."""

import difflib
import re
from dataclasses import dataclass, replace

import torch

# What long products and copies of large tensors reach of the data sheet where nobody has measured it: the shares that
# the measured H200 has, 790 of 989 TFLOP/s and 4.3 of 4.8 TB/s.
PRODUCT_SHARE = 0.80
COPY_SHARE = 0.90


@dataclass(frozen=True)
class GPU:
    """One GPU. Bytes, FLOP/s (dense, accumulated in float32), bytes/s and Hz, as on the data sheet.

    `measured_product` (bf16, FLOP/s) and `measured_copy` (bytes/s, read and written) take the place of the shares.
    """

    name: str
    pattern: str
    memory: float
    bf16: float
    float32: float
    bandwidth: float
    sms: int
    clock: float
    measured_product: float | None = None
    measured_copy: float | None = None

    def product(self, value_bytes: int) -> float:
        """FLOP/s that long matrix products reach: half precision at 2 bytes a value, float32 at 4 (torch's default)."""
        if value_bytes == 4:
            return PRODUCT_SHARE * self.float32
        return self.measured_product or PRODUCT_SHARE * self.bf16

    @property
    def copy(self) -> float:
        """Bytes/s, read and written, that a copy of a large tensor reaches."""
        return self.measured_copy or COPY_SHARE * self.bandwidth

    @property
    def exponentials(self) -> float:
        """Exponentials a second: 16 an SM and clock."""
        return 16.0 * self.sms * self.clock


# Sources: NVIDIA's data sheets of A100, H100, H200, GH200, L40S and DGX B200 (an eighth of the system), and the
# architecture white papers of Ampere, Hopper, Ada and Blackwell (GeForce figures, SMs, boost clocks). H20 has no public
# data sheet: figures of vendors. Sparse peaks are halved. The two measured figures are of one H200 SXM.
GPUS: dict[str, GPU] = {
    "a100": GPU("A100 80GB", r"\bA100\b", 80e9, 312e12, 19.5e12, 2.039e12, 108, 1.41e9),
    "a100-40gb": GPU("A100 40GB", r"\bA100\b.*40GB", 40e9, 312e12, 19.5e12, 1.555e12, 108, 1.41e9),
    "h100": GPU("H100 SXM", r"\bH100\b(?!.*(PCIe|NVL))", 80e9, 989e12, 67e12, 3.35e12, 132, 1.98e9),
    "h100-pcie": GPU("H100 PCIe", r"\bH100 PCIe", 80e9, 756e12, 51e12, 2.0e12, 114, 1.755e9),
    "h20": GPU("H20", r"\bH20\b", 96e9, 148e12, 44e12, 4.0e12, 78, 1.98e9),
    "h200": GPU("H200", r"\bH200\b(?! NVL)", 141e9, 989e12, 67e12, 4.8e12, 132, 1.98e9, 790e12, 4.3e12),
    "gh200": GPU("GH200 96GB", r"\bGH200\b", 96e9, 989e12, 67e12, 4.0e12, 132, 1.98e9),
    "b200": GPU("B200", r"\bB200\b", 180e9, 2250e12, 75e12, 8.0e12, 148, 1.965e9),
    "l40s": GPU("L40S", r"\bL40S\b", 48e9, 362e12, 91.6e12, 0.864e12, 142, 2.52e9),
    "rtx4090": GPU("RTX 4090", r"\bRTX 4090\b(?! (D|Laptop))", 24e9, 165e12, 82.6e12, 1.008e12, 128, 2.52e9),
    "rtx5090": GPU("RTX 5090", r"\bRTX 5090\b(?! (D|Laptop))", 32e9, 209.5e12, 104.8e12, 1.792e12, 170, 2.41e9),
}


def named(name: str) -> GPU:
    """The GPU that a person names. Errors: ValueError, with the known names, the nearest first."""
    key = _key(re.sub(r"^nvidia[ -]?|^geforce[ -]?", "", name.strip().lower()))
    by_name = {_key(gpu.name): gpu for gpu in GPUS.values()} | GPUS
    if key in by_name:
        return by_name[key]
    likeness = {known: difflib.SequenceMatcher(None, key, known).ratio() for known in GPUS}
    known = ", ".join(sorted(GPUS, key=lambda k: -likeness[k]))
    raise ValueError(f"--gpu: expected one of {known}, given {name!r}")


def _key(name: str) -> str:
    return name.lower().replace(" ", "-").replace("rtx-", "rtx")


def called(device_name: str) -> GPU | None:
    """The GPU that a driver calls by this name, or None where it is not in the table. Slices of one (MIG) are not."""
    if "MIG" in device_name:
        return None
    # The longest pattern is the most particular one.
    fitting = [gpu for gpu in GPUS.values() if re.search(gpu.pattern, device_name)]
    return max(fitting, key=lambda gpu: len(gpu.pattern)) if fitting else None


def of_device(device: torch.device) -> GPU | None:
    """The GPU behind a device, with the memory that it really has; None for a CPU or a GPU not in the table."""
    if device.type != "cuda":
        return None
    gpu = called(torch.cuda.get_device_name(device))
    return None if gpu is None else replace(gpu, memory=float(torch.cuda.mem_get_info(device)[1]))


def of_this_machine() -> tuple[GPU, str]:
    """(the GPU that a plan is for where none is named, why): this machine's, or else the H200, which is measured."""
    if not torch.cuda.is_available():
        return GPUS["h200"], "this machine has no GPU; --gpu names another"
    gpu = of_device(torch.device("cuda", torch.cuda.current_device()))
    if gpu is None:
        return GPUS["h200"], f"no figures for this machine's {torch.cuda.get_device_name()}; --gpu names another"
    return gpu, "the GPU of this machine; --gpu names another"


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of the device in FLOP/s, where it is known: what MFU is counted against."""
    gpu = called(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.bf16

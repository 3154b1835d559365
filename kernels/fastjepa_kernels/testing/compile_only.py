"""What a kernel needs on a GPU, without one: compiled for a target, registers, spills and instructions counted.

Works where Triton is installed and not interpreted. Source of the figures: `cuobjdump`, which Triton brings along.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# Shared memory that one block may use, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers and spilled bytes; of one block: shared bytes; counted instructions of the kernel.

    `tensor_core` counts all products on tensor cores, `wgmma` those of them that are Hopper's asynchronous ones,
    `copies` the asynchronous copies from global to shared memory.
    """

    registers: int
    spilled: int
    shared: int
    tensor_core: int
    wgmma: int
    copies: int
    float64: int


def compile_for(
    target: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], *, warps: int = 4, stages: int = 3
) -> Resources:
    """Compile a `triton.jit` function for "sm_80", "sm_90" or "sm_100".

    `signature` maps the names of its arguments to types such as "*bf16" or "i32", `constants` those that are fixed.
    Pointers count as aligned to 16 bytes, as those of torch are. Errors: RuntimeError of the compiler where the
    architecture cannot run the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(
        fn=kernel, signature=types, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", TARGETS[target], 32), options=options)
    return _resources(compiled.asm["cubin"], compiled.metadata.shared)


def _resources(cubin: bytes, shared: int) -> Resources:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return Resources(
        registers=found["REG"],
        spilled=found["STACK"],
        shared=shared,
        tensor_core=len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)\b", code)),
        wgmma=len(re.findall(r"\bHGMMA\b", code)),
        copies=len(re.findall(r"\bLDGSTS\b", code)),
        float64=len(re.findall(r"\b(?:DADD|DMUL|DFMA|DSETP)\b", code)),
    )

"""The library's step beside the public code's, a black box in a process of its own, in turns of ten, on the same masks.

    JEPA_REPO=peers/jepa pytest bench/test_public.py --benchmark-only

JEPA_REPO names a checkout in an ignored folder. Three variants: as shipped; without the statistics that it logs, which
wait for the device about a thousand times a step; and compiled. On a CPU a tiny model shows that both run: its ratio is
no figure for a GPU.
"""

import pytest

from bench.failures import CannotRun
from bench.public.beside import WARM_UP, NoCheckout, PublicCode, Size, checkout
from bench.public.black_box import VARIANTS
from bench.step.contenders import Own
from bench.step.pairs import STEPS, TURN, Pair, Side
from bench.step.ways import fit_together, plan_of, settings_of
from fastjepa.memory import usable_memory

KIND = "public"
ON_A_DEVICE = True
PUBLISHED = {"vitl": "vit_large", "vith": "vit_huge", "vith_384": "vit_huge"}
TINY = Size("vit_tiny", crop=64, frames=4, batch=2)
TINY_SETTINGS = (
    "model.name=vit_tiny", f"data.crop={TINY.crop}", f"data.frames={TINY.frames}", f"mask.group={TINY.batch}",
    f"optim.global_batch={TINY.batch}", f"data.batch_size={TINY.batch}", "optim.dtype=float32", "runtime.threads=1",
)  # fmt: skip
CPU_STEPS = 20


@pytest.mark.parametrize("model", ["tiny", *PUBLISHED])  # the first variant of all models comes first
@pytest.mark.parametrize("variant", VARIANTS)
def test_public(benchmark, results, device, model, variant):
    """Packed beside one variant."""
    if (model == "tiny") != (device.type == "cpu"):
        pytest.skip("needs a CUDA device: these steps take minutes each on a CPU" if model != "tiny" else "for a CPU")
    if model == "tiny" and variant == "compiled":
        pytest.skip("compiling the public code for a CPU takes ten minutes, and its ratio is no figure for a GPU")
    benchmark.group = f"public {model}"
    try:
        with_public(benchmark, results, device, model, variant)
    except NoCheckout as error:
        pytest.skip(str(error))
    except CannotRun as error:
        if "OutOfMemoryError" in str(error):
            pytest.skip(str(error))
        pytest.fail(str(error), pytrace=False)


def with_public(benchmark, results, device, model, variant):
    """Measure one case. Errors: CannotRun where there is no public code, or it does not run here."""
    base, overrides = ("vitl", TINY_SETTINGS) if model == "tiny" else (model, ())
    settings = [settings_of(base, way, quick=False, overrides=overrides) for way in ("packed", "reference")]
    s = settings[0]
    size = Size(PUBLISHED.get(model, TINY.model), s.data.crop, s.data.frames, s.optim.global_batch)
    steps = CPU_STEPS if device.type == "cpu" else STEPS
    plans = [plan_of(one, device) for one in settings]
    repo = checkout()
    # Its process has its state on the device from the start: it cannot follow ours.
    if not fit_together(plans, usable_memory(device)):
        pytest.skip("both do not fit into the memory of this device together")
    public = PublicCode(repo, variant, size, steps, TURN, device)
    ours = Side("packed", lambda: Own(s, public.batches, device, WARM_UP), plans[0])
    theirs = Side(f"public {variant}", lambda: public, plans[0])
    try:
        # Weights differ, so losses do.
        results(Pair(model, ours, theirs, device, same=False).measure(benchmark, steps))
    finally:
        public.close()

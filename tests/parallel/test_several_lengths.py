"""Clips of several lengths in several processes: the run of one process."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.parallel.test_runs import FSDP2, Run

FILMS = "synthetic://moving-shapes?videos=48&size=48&frames=8"


@pytest.mark.parametrize("lengths", ["clips", "equal"])
def test_processes_share_a_step_of_several_lengths(recipe, tmp_path, lengths):
    """One process may have clips of one length alone; the loss still is that of the whole step."""
    (tmp_path / "images").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{'abcde'[number]}_picture.png")
    path = json.dumps({FILMS: {"weight": 1}, str(tmp_path / "images"): {"frames": 1}})
    given = (f"data.path={path}", f"loss.lengths={lengths}", "optim.steps=4")
    alone = Run(recipe, tmp_path / "alone", 1, *given)
    said = alone.wait()
    assert said.count("lengths    50.0% of the clips have") == 2, said
    others = (("ddp", ()), ("fsdp2", FSDP2)) if lengths == "equal" else (("ddp", ()),)
    for name, more in others:
        two = Run(recipe, tmp_path / name, 2, *given, *more)
        said = two.wait()
        assert two.process.returncode == 0, said
        assert two.losses() == pytest.approx(alone.losses(), rel=1e-5)
        assert [row["grad_norm"] for row in two.rows()] == pytest.approx(
            [row["grad_norm"] for row in alone.rows()], rel=1e-4
        )

"""Settings that are valid one by one, but ask for more than any machine has."""

import pytest

from fastjepa.exits import Exit

# An address space that a tiny run fits into several times.
MEMORY = 8 << 30


@pytest.mark.parametrize(
    "override", ["data.frames=1000000000", "data.crop=1000000000", "model.predictor_dim=1000000000"]
)
def test_a_network_that_no_memory_holds_is_refused_in_one_sentence(lab, override):
    child = lab.start("runs", override, sabotage=[["memory", {"limit": MEMORY}]])
    assert child.wait() == Exit.WRONG_INPUT
    assert child.err.count("\n") == 1
    assert not (lab.folder / "runs").exists()

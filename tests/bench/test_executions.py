"""The bench of the two executions: what it compares, and its check before timing."""

import pytest

from bench import executions


@pytest.mark.parametrize("shape", ["64x3", "64x3-noised"])
def test_executions_agree(shape):
    assert 0 < executions.largest_difference(shape) < 1e-4


def test_executions_that_differ_are_not_timed(monkeypatch):
    real = executions.build

    def tampered(shape, execution):
        jepa = real(shape, execution)
        if execution == "packed":
            jepa.predictor.predictor_proj.bias.data += 1e-3
        return jepa

    monkeypatch.setattr(executions, "build", tampered)
    with pytest.raises(ValueError, match="64x3: the executions differ"):
        executions.largest_difference("64x3")


def test_contenders_start_from_the_same_weights_and_take_whole_steps(monkeypatch):
    built = []
    real = executions.build
    monkeypatch.setattr(executions, "build", lambda *args: built.append(real(*args)) or built[-1])
    steps = executions.contenders("64x3")
    assert list(steps) == ["packed", "reference", "reference, public optimizer path"]
    before = [[p.clone() for p in jepa.parameters()] for jepa in built]
    assert all((a == b).all() for other in before[1:] for a, b in zip(before[0], other))
    for step, jepa, weights in zip(steps.values(), built, before):
        for _ in range(2):  # the first step of the schedule may be too small to move every weight
            step()
        moved = [not (a == b).all() for a, b in zip(jepa.target_encoder.parameters(), jepa.encoder.parameters())]
        assert any(moved), "the target encoder trails behind the encoder"
        assert any((a != b).any() for a, b in zip(weights, jepa.parameters()))

"""Each way in which a crash or a hand can spoil a checkpoint is seen."""

from __future__ import annotations

import pytest

from ygivenx.errors import CheckpointError
from ygivenx.training import checkpoint


@pytest.fixture
def sealed(tmp_path):
    staged = tmp_path / ".staging" / "checkpoint-3"
    (staged / "sub").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"weights")
    (staged / "sub" / "rng_state.pth").write_bytes(b"rng")
    checkpoint.seal(staged)
    checkpoint.publish(staged, tmp_path / "checkpoint-3")
    return tmp_path / "checkpoint-3"


def test_a_sealed_one_holds_and_is_found(sealed):
    checkpoint.verify(sealed)
    assert checkpoint.newest(sealed.parent) == sealed


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda d: (d / checkpoint.MANIFEST).unlink(), "no manifest"),
        (lambda d: (d / checkpoint.MANIFEST).write_text("{"), "unreadable manifest"),
        (lambda d: (d / checkpoint.MANIFEST).write_text("[]"), "unreadable manifest"),
        (lambda d: (d / "sub" / "rng_state.pth").unlink(), "missing"),
        (lambda d: (d / "model.safetensors").write_bytes(b"weightz"), "altered"),
        (lambda d: (d / "model.safetensors").write_bytes(b"short"), "altered"),
    ],
)
def test_a_spoiled_one_is_refused_and_passed_over(sealed, spoil, what):
    spoil(sealed)
    with pytest.raises(CheckpointError, match=what):
        checkpoint.verify(sealed)
    assert checkpoint.newest(sealed.parent) is None


def test_newest_means_most_steps_not_latest_name(tmp_path):
    for n in (9, 10, 2):
        d = tmp_path / f"checkpoint-{n}"
        d.mkdir()
        checkpoint.seal(d)
    assert checkpoint.newest(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-11").mkdir()  # begun, never sealed
    assert checkpoint.newest(tmp_path).name == "checkpoint-10"


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for n in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{n}").mkdir()
    checkpoint.rotate(tmp_path, 1, protect=str(tmp_path / "checkpoint-2"))
    assert [p.name for p in checkpoint.listed(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_no_directory_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None

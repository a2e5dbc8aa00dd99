"""Each way in which a crash or a hand can spoil a checkpoint is seen."""

from __future__ import annotations

import os
import shutil

import pytest

from ygivenx.errors import CheckpointError
from ygivenx.training import checkpoint


@pytest.fixture
def sealed(tmp_path):
    staged = tmp_path / checkpoint.STAGING / "checkpoint-3"
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
        (lambda d: (d / checkpoint.MANIFEST).write_text('{"files": {}}'), "unreadable manifest"),
        (lambda d: (d / checkpoint.MANIFEST).write_text('{"files": {"a": {}}}'), "unreadable manifest"),
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


def test_any_damaged_bit_of_a_manifest_falls_back_to_the_older_one_by_name(sealed, caplog):
    shutil.copytree(sealed, sealed.with_name("checkpoint-4"))
    manifest = sealed.with_name("checkpoint-4") / checkpoint.MANIFEST
    whole = manifest.read_bytes()
    at = whole.index(b'"files"')  # what comes before is the version
    for bit in range(8 * at, 8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        if bytes(damaged).split() == whole.split():  # white space for white space
            continue
        manifest.write_bytes(bytes(damaged))
        assert checkpoint.newest(sealed.parent) == sealed, bytes(damaged)
    assert "checkpoint-4 is passed over: unreadable manifest" in caplog.text


def test_newest_means_most_steps_not_latest_name(tmp_path):
    for n in (9, 10, 2):
        d = tmp_path / f"checkpoint-{n}"
        d.mkdir()
        (d / "model.safetensors").write_bytes(b"weights")
        checkpoint.seal(d)
    assert checkpoint.newest(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-11").mkdir()  # begun, never sealed
    assert checkpoint.newest(tmp_path).name == "checkpoint-10"


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for n in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{n}").mkdir()
    checkpoint.rotate(tmp_path, 1, 4, protect=str(tmp_path / "checkpoint-2"))
    assert [p.name for p in checkpoint.listed(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_rotation_does_not_count_what_lies_ahead(tmp_path):
    """Resumed from 10 where 20 and 30 are too: the new 15 isn't one of the oldest."""
    for n in (5, 10, 15, 20, 30):
        (tmp_path / f"checkpoint-{n}").mkdir()
    checkpoint.rotate(tmp_path, 2, 15)
    assert [p.name for p in checkpoint.listed(tmp_path)] == [f"checkpoint-{n}" for n in (10, 15, 20, 30)]


def staged(run_dir, n, content):
    directory = run_dir / checkpoint.STAGING / f"checkpoint-{n}"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(content)
    checkpoint.seal(directory)
    return directory


def test_one_of_the_same_name_is_replaced(sealed):
    checkpoint.publish(staged(sealed.parent, 3, b"newer"), sealed)
    checkpoint.verify(sealed)
    assert (sealed / "model.safetensors").read_bytes() == b"newer"
    assert [p.name for p in sealed.parent.iterdir() if p.name != checkpoint.STAGING] == ["checkpoint-3"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_crash_while_one_is_replaced_loses_nothing(sealed, monkeypatch, renames):
    """Killed after the first or the second rename; the next start finds a complete checkpoint."""
    new = staged(sealed.parent, 3, b"newer")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        rename, left = os.rename, [renames]

        def counted(*args):
            left[0] -= 1
            return rename(*args) if left[0] >= 0 else killed()

        patch.setattr(os, "rename", counted)
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.publish(new, sealed)
    assert checkpoint.start(sealed.parent, "auto") == sealed
    checkpoint.verify(sealed)
    assert (sealed / "model.safetensors").read_bytes() == (b"weights" if renames == 1 else b"newer")
    assert not list(sealed.parent.glob("*.replaced"))


def test_a_start_beside_another_run_s_checkpoints_is_refused(sealed, tmp_path):
    assert checkpoint.start(sealed.parent, "auto") == sealed
    assert checkpoint.start(sealed.parent, str(sealed)) == sealed
    assert checkpoint.start(sealed.parent, None, {"checkpoint-3"}) is None
    assert checkpoint.start(tmp_path / "absent", None) is None
    with pytest.raises(CheckpointError, match=r"another run are there: checkpoint-3"):
        checkpoint.start(sealed.parent, None)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.start(sealed.parent, str(sealed) + "0")
    (tmp_path / "b" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"another run are there: checkpoint-1"):
        checkpoint.start(tmp_path / "b", str(sealed))
    (sealed / "model.safetensors").unlink()  # not complete, and not ours to delete or to count
    with pytest.raises(CheckpointError, match="another run"):
        checkpoint.start(sealed.parent, "auto")


def test_no_directory_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None


def test_a_file_that_the_disk_no_longer_gives_is_an_error_of_ours_and_passed_over(
    sealed, monkeypatch, caplog
):
    older = sealed.with_name("checkpoint-1")
    shutil.copytree(sealed, older)
    hashing = checkpoint._hash

    def broken(path):
        if path.is_relative_to(sealed):
            raise OSError(5, "Input/output error")
        return hashing(path)

    monkeypatch.setattr(checkpoint, "_hash", broken)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.verify(sealed)
    assert checkpoint.newest(sealed.parent) == older
    assert f"{sealed.name} is passed over" in caplog.text

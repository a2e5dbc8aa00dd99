"""Two real gloo processes give the loss and the gradients of one, also when a rank has nothing to train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run(out: Path, ranks: int, *settings: int, script: Path = HERE / "ranked.py") -> dict:
    # On CPUs `accelerate launch` starts several processes through MPI only; torchrun is what it uses elsewhere.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [
        sys.executable,
        *(launch if ranks > 1 else []),
        str(script),
        str(out),
        *map(str, settings),
    ]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=HERE, env=env
    ) as p:
        try:
            _, errors = p.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            p.terminate()  # torchrun ends its ranks, where a kill would leave them
            raise
    assert p.returncode == 0, errors[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.full
@pytest.mark.parametrize(
    ("rows", "max_tokens"), [(4, 24), (1, 10_000)], ids=["uneven packs", "a rank without y"]
)
def test_two_ranks_are_one(tmp_path, rows, max_tokens):
    steps = 2
    one = run(tmp_path / "one.pt", 1, rows, max_tokens, 2 if rows > 1 else 1, steps)
    two = run(tmp_path / "two.pt", 2, rows, max_tokens, 1, steps)
    assert two["packs"] == max(2, one["packs"])
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    for a, b in zip(one["grads"], two["grads"], strict=True):
        assert ((a - b).norm() / a.norm()).item() < 1e-6


@pytest.mark.full
@pytest.mark.parametrize(("chunk", "sharded"), [(0, 0), (16, 0), (0, 1)])
def test_the_loss_of_a_wrapped_model_is_that_of_one_process(tmp_path, chunk, sharded):
    script = HERE / "ranked_loss.py"
    one, two = (run(tmp_path / f"{n}.pt", n, chunk, sharded, script=script) for n in (1, 2))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert one["grad"].norm() > 0
    assert ((one["grad"] - two["grad"]).norm() / one["grad"].norm()).item() < 1e-6
    if sharded:
        torch.testing.assert_close(two["sums"], one["sums"])


@pytest.mark.full
def test_two_ranks_resume_and_agree_on_the_best(tmp_path):
    told = run(tmp_path / "two.pt", 2, script=HERE / "ranked_resume.py")
    assert told == {"resumed": [True, True], "best": [True, True]}

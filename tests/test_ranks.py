"""Two real gloo processes give the loss and the gradients of one, also when a rank has nothing to train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = pytest.mark.full


def run(script: str, out: Path, ranks: int, cases: Any = None) -> Any:
    """What a script of several cases writes; a start of two ranks takes longer than the cases do."""
    # On CPUs `accelerate launch` starts several processes through MPI only; torchrun is what it uses elsewhere.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [
        sys.executable,
        *(launch if ranks > 1 else []),
        str(HERE / script),
        str(out),
        json.dumps(cases),
    ]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=HERE, env=env
    ) as p:
        try:
            _, errors = p.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            p.terminate()  # torchrun ends its ranks, where a kill would leave them
            raise
    assert p.returncode == 0, errors[-3000:]
    return torch.load(out, weights_only=True)


def test_two_ranks_are_one(tmp_path):
    uneven_packs, a_rank_without_y = (4, 24), (1, 10_000)
    one = run("ranked.py", tmp_path / "one.pt", 1, [[*uneven_packs, 2], [*a_rank_without_y, 1]])
    two = run("ranked.py", tmp_path / "two.pt", 2, [[*uneven_packs, 1], [*a_rank_without_y, 1]])
    for alone, together in zip(one, two, strict=True):
        assert together["packs"] == max(2, alone["packs"])
        for a, b in zip(alone["losses"], together["losses"], strict=True):
            assert a == pytest.approx(b, rel=1e-6)
        for a, b in zip(alone["grads"], together["grads"], strict=True):
            assert ((a - b).norm() / a.norm()).item() < 1e-6


def test_two_ranks_learn_from_rated_rows_as_one(tmp_path):
    """Three packs: with two ranks one of them gets a pack that weighs nothing."""
    one, two = (run("ranked_rated.py", tmp_path / f"{n}.pt", n, 4 // n) for n in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["margins"] == pytest.approx(one["margins"], rel=1e-4, abs=1e-5)
    assert two["measured"] == pytest.approx(one["measured"], rel=1e-4, abs=1e-5)
    assert ((two["weights"] - one["weights"]).norm() / one["weights"].norm()).item() < 1e-5


def test_the_loss_of_a_wrapped_model_is_that_of_one_process(tmp_path):
    cases = [(0, False), (16, False), (0, True)]  # chunk, sharded
    one, two = (run("ranked_loss.py", tmp_path / f"{n}.pt", n, cases) for n in (1, 2))
    for (_, sharded), a, b in zip(cases, one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert a["grad"].norm() > 0
        assert ((a["grad"] - b["grad"]).norm() / a["grad"].norm()).item() < 1e-6
        if sharded:
            torch.testing.assert_close(b["sums"], a["sums"])


def test_two_ranks_resume_and_agree_on_the_best(tmp_path):
    found = run("ranked_resume.py", tmp_path / "two.pt", 2)
    told = ["nothing of rank 1 is in it", "nothing of rank 0 is in it"]
    assert found.pop("fsdp").startswith("fsdp is given")
    assert found == {"resumed": [True, True], "best": [True, True], "apart": told}

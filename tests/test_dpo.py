"""The DPO example: a pair as one forest gives what the two sequences give apart."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCAB, llama
from trees import assert_same, gradients

from ygivenx.sequence import Sequence

example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "dpo.py"))


def pair() -> list[Sequence]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, VOCAB, 20)
    ys = [rng.integers(0, VOCAB, n) for n in (7, 9)]
    ys[1][:2] = ys[0][:2]  # they part inside y
    return [Sequence(np.concatenate((x, y)), np.repeat([0.0, 1.0], [20, len(y)])) for y in ys]


def apart(model, s: Sequence) -> torch.Tensor:
    ids = torch.from_numpy(np.array(s.ids))
    log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return log_p[torch.from_numpy(s.weights[1:] > 0)].sum()


def test_it_equals_the_pair_computed_apart():
    model, reference = llama(seed=0), llama(seed=1)
    chosen, rejected = pair()
    ours = example["dpo"](model, reference, chosen, rejected, beta=0.3)
    gain = [apart(model, s) - apart(reference, s).detach() for s in (chosen, rejected)]
    theirs = -torch.nn.functional.logsigmoid(0.3 * (gain[0] - gain[1]))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_same(gradients(model, ours), gradients(model, theirs))


def test_it_is_short():
    assert len((Path(__file__).parents[1] / "examples" / "dpo.py").read_text().splitlines()) < 60

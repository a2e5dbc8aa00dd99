"""Identities of scores on the real model: both routes, any cut, order, windows, chunks, borders, odd pairs."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from tiny import score_sequences

import ygivenx as yx
from ygivenx.scores.node_log_probs import node_log_probs
from ygivenx.scores.requests import pair_of_ids
from ygivenx.scores.scoring import request_builder_for, scores

pytestmark = pytest.mark.model

X = "The three primary colours are"
Y = " red, yellow and blue; a painter mixes all others from them."
PAIRS = [
    (X, Y), (X, " red"), (X, ""), ("", "Once upon a time"), ("Paris is in", " France"), (X, Y),
    ("def add(a, b):\n", "    return a + b\n"), ("Answer:", "(A)"), ("東京は", "日本の首都です"),
]  # fmt: skip


@pytest.fixture(scope="module")
def told(smol):
    return yx.score(*smol, PAIRS, tokens=True)


def test_each_equals_a_forward_pass_of_its_own(smol, told):
    model, tokenizer = smol
    for (x, y), s in zip(PAIRS, told, strict=True):
        ids = tokenizer(x + y, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        picked = logits.gather(1, ids[0, 1:, None])
        expected = picked[:, 0] - logits.logsumexp(-1)
        np.testing.assert_allclose(s.token_log_p[1:], expected, atol=1e-4)
        assert (np.abs(s.token_rank[1:] - (logits > picked).sum(-1).numpy()) <= 1).all()


def test_joint_is_marginal_plus_conditional_by_both_routes(smol, told):
    marginals = yx.score(*smol, [x for x, _ in PAIRS if x])
    for s, m in zip((s for (x, _), s in zip(PAIRS, told, strict=True) if x), marginals, strict=True):
        assert s.log_p_x + s.log_p_y_given_x == pytest.approx(s.log_p_xy, abs=1e-9)
        if not any("border" in n or "holds the end" in n for n in s.notes):
            assert s.log_p_xy - m.log_p_xy == pytest.approx(s.log_p_y_given_x, abs=2e-4)
            assert yx.check(s.log_p_xy, m.log_p_xy)


def test_order_duplicates_windows_and_chunks_do_not_matter(smol, told):
    model, tokenizer = smol
    order = list(range(len(PAIRS)))
    random.Random(0).shuffle(order)
    questions = [q for i in order for q in request_builder_for(model, tokenizer)(PAIRS[i])]
    for window, chunk in itertools.product((8, 10_000), (3, 1024)):
        for i, s in zip(order, scores(model, questions, window=window, chunk=chunk), strict=True):
            assert s.log_p_xy == pytest.approx(told[i].log_p_xy, abs=1e-4)
            assert s.log_p_y_given_x == pytest.approx(told[i].log_p_y_given_x, abs=1e-4)
            assert s.greedy == told[i].greedy


def test_one_token_continuations_sum_to_one(smol):
    model, tokenizer = smol
    x = tokenizer(X)["input_ids"]
    every = range(model.config.vocab_size)
    forest = yx.Forest.of((np.array([*x, v]), np.zeros(len(x) + 1)) for v in every)
    log_p = node_log_probs(model, forest)
    assert np.exp([log_p[path[-1]] for path in forest.paths]).sum() == pytest.approx(1, abs=1e-5)


def test_conditional_is_additive_over_any_cut_of_y(smol, told):
    model, tokenizer = smol
    x, whole = tokenizer(X)["input_ids"], tokenizer(X + Y)["input_ids"]
    for cut in range(len(x) + 1, len(whole)):
        parts = pair_of_ids(x, whole[len(x) : cut]), pair_of_ids(whole[:cut], whole[cut:])
        # A window of one token: each is read by itself, nothing is shared.
        first, second = score_sequences(model, parts, window=1)
        assert first.log_p_y_given_x + second.log_p_y_given_x == pytest.approx(
            told[0].log_p_y_given_x, abs=1e-4
        )


def test_several_ys_share_x(smol, told):
    together, (alone,) = yx.score_choices(*smol, [(X, [Y, " red"]), (X, Y)])
    assert [s.log_p_y_given_x for s in together] == pytest.approx(
        [told[0].log_p_y_given_x, told[1].log_p_y_given_x], abs=1e-4
    )
    assert alone.log_p_y_given_x == pytest.approx(together[0].log_p_y_given_x, abs=1e-9)


def test_empty_sides_are_explicit(smol, told):
    empty_y, empty_x = told[2], told[3]
    assert (empty_y.tokens, empty_y.log_p_y_given_x, empty_y.greedy) == (0, 0.0, True)
    assert np.isnan(empty_y.per_token)
    assert empty_y.log_p_xy == empty_y.log_p_x
    assert (empty_x.tokens_x, empty_x.log_p_x) == (0, 0.0)
    assert empty_x.scored == empty_x.tokens - 1  # no BOS: its first token has no probability
    assert empty_x.conditional_on_first
    assert any("no BOS" in n for n in empty_x.notes)
    (begun,) = yx.score(*smol, ["Once upon a time"], bos=True)
    assert begun.scored == begun.tokens == empty_x.tokens
    assert not begun.conditional_on_first
    with pytest.raises(yx.RowError, match="both empty"):
        yx.score(*smol, [("", "")])


def test_borders_are_explicit(smol, told):
    joint = told[7]  # ":(" is one token
    (split,) = yx.score(*smol, [PAIRS[7]], border="split")
    assert any("counted as y" in n for n in joint.notes)
    assert joint.tokens_x == split.tokens_x - 1
    assert joint.tokens == split.tokens
    assert joint.log_p_y_given_x != pytest.approx(split.log_p_y_given_x, abs=0.1)


def test_pmi_against_a_named_prompt(smol):
    (s,) = yx.score(*smol, [("The capital of France is", " Paris")], unconditional="Text:")
    (alone,) = yx.score(*smol, [("Text:", " Paris")])
    assert s.log_p_y == pytest.approx(alone.log_p_y_given_x, abs=1e-4)
    assert s.pmi == pytest.approx(s.log_p_y_given_x - alone.log_p_y_given_x, abs=1e-4)
    assert s.pmi > 1


def test_rolling_perplexity_is_the_sum_over_windows(smol):
    model, tokenizer = smol
    text = "A long text. " * 12 + "And its end."
    ids = tokenizer(text)["input_ids"]
    (s,) = yx.score(model, tokenizer, [text], overflow="roll", max_length=16)
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        stop = min(start + 17, len(ids))
        window = torch.tensor([ids[max(0, stop - 17) : stop]])
        with torch.no_grad():
            logits = model(window).logits[0, :-1].double()
        log_p = (logits.gather(1, window[0, 1:, None])[:, 0] - logits.logsumexp(-1)).numpy()
        total += log_p[-(stop - 1 - start) :].sum()
    assert s.log_p_y_given_x == pytest.approx(total, abs=1e-3)
    assert s.scored == len(ids) - 1
    assert s.perplexity == pytest.approx(np.exp(-total / (len(ids) - 1)), rel=1e-5)


def test_truncation_from_the_left_equals_the_shorter_pair(smol):
    (s,) = yx.score(*smol, [("Nothing of this is read. " + X, " red")], overflow="left", max_length=5)
    (short,) = yx.score(*smol, [(f" {X}", " red")])
    assert s.tokens_x == short.tokens_x == 5
    assert s.truncated > 0
    assert s.log_p_y_given_x == pytest.approx(short.log_p_y_given_x, abs=1e-4)
    with pytest.raises(yx.RowError, match="the model reads 5"):
        yx.score(*smol, [(X, Y)], max_length=5)


def test_chat_rows_score_the_reply(smol):
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    (s,) = yx.score(*smol, [row])
    assert s.tokens == 2  # the answer and the end of the turn
    assert s.bytes > 0

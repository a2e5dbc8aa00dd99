"""Scores are sums along paths: identities, order, duplicates, borders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import llama, score_sequences, sequences

import ygivenx as yx
from ygivenx.errors import ModelError, RowError
from ygivenx.scores.requests import NO_CONTEXT
from ygivenx.scores.scoring import Details
from ygivenx.sequence import Segment, Sequence


def one_by_one(model, s: Sequence) -> np.ndarray:
    """The slow twin: a plain forward pass and float64."""
    ids = torch.from_numpy(np.array(s.ids))
    with torch.no_grad():
        log_p = model(ids[None]).logits[0].double().log_softmax(-1)
    return np.array([np.nan, *log_p[:-1].gather(1, ids[1:, None])[:, 0].tolist()])


@pytest.mark.parametrize("window", [24, 64, 10_000])
def test_values_equal_the_twin_whatever_the_window(window):
    model, data = llama(), sequences(9, seed=6)
    for s, told in zip(
        data, score_sequences(model, data, window=window, details=Details(tokens=True)), strict=True
    ):
        expected = one_by_one(model, s)
        np.testing.assert_allclose(told.token_log_p, expected, atol=2e-5)
        assert told.log_p_y_given_x == pytest.approx(expected[s.output].sum(), abs=1e-4)
        assert told.log_p_x + told.log_p_y_given_x == pytest.approx(told.log_p_xy)
        assert told.tokens == s.output.sum()


def test_order_and_duplicates_do_not_matter():
    model, data = llama(), sequences(5, seed=2)
    forward = score_sequences(model, data)
    both = score_sequences(model, data[::-1] + data)
    for i, s in enumerate(forward):
        assert both[4 - i].log_p_xy == pytest.approx(s.log_p_xy, abs=1e-5)
        assert both[5 + i].log_p_xy == pytest.approx(s.log_p_xy, abs=1e-5)


def test_conditional_is_additive_over_any_cut_of_y():
    model, s = llama(), sequences(1, seed=7, low=20, high=21)[0]
    whole = score_sequences(model, [s])[0]
    start = int(np.flatnonzero(s.output)[0])
    for cut in range(start + 1, len(s)):
        parts = [
            Sequence(
                s.ids[:cut],
                np.zeros(cut, np.float32),
                (Segment(0, start, "prompt"), Segment(start, cut, "answer", True)),
            ),
            Sequence(
                s.ids,
                np.zeros(len(s), np.float32),
                (Segment(0, cut, "prompt"), Segment(cut, len(s), "answer", True)),
            ),
        ]
        a, b = score_sequences(model, parts)
        assert a.log_p_y_given_x + b.log_p_y_given_x == pytest.approx(whole.log_p_y_given_x, abs=1e-4)


def test_one_token_continuations_sum_to_one():
    from tiny import VOCAB

    x = sequences(1, seed=1)[0].ids
    data = [
        Sequence(
            np.append(x, v),
            np.zeros(len(x) + 1, np.float32),
            (Segment(0, len(x), "prompt"), Segment(len(x), len(x) + 1, "answer", True)),
        )
        for v in range(VOCAB)
    ]
    told = score_sequences(llama(), data)
    assert sum(np.exp(s.log_p_y_given_x) for s in told) == pytest.approx(1, abs=1e-5)
    assert sum(s.greedy for s in told) == 1


def test_nan_is_an_error_not_a_perfect_score():
    model = llama()
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="NaN for 20 of 20 tokens"):
        score_sequences(model, sequences(1))


def test_items_of_any_iterable_and_of_json(smol_tokenizer):
    model = llama(vocab_size=len(smol_tokenizer))
    items = [
        ("Paris is", " big"),
        ["Paris is", " big"],
        ("Paris is", [" big"]),
        ["Paris is", [" big", " old"]],
        "Paris is",
    ]
    scored = yx.score_choices(model, smol_tokenizer, (i for i in items))
    (one,), (same,), (several,), (first, second), (text,) = scored
    assert one.log_p_y_given_x == same.log_p_y_given_x == several.log_p_y_given_x == first.log_p_y_given_x
    assert second.log_p_y_given_x != first.log_p_y_given_x
    assert text.tokens_x == 0
    assert yx.score(model, smol_tokenizer, items[:2])[0].log_p_y_given_x == one.log_p_y_given_x
    for item in items[2:4]:
        with pytest.raises(RowError, match=r"item 1: it has \d scores?") as refused:
            yx.score(model, smol_tokenizer, [items[0], item])
        assert "score_choices" in refused.value.fix


@pytest.mark.parametrize(
    "item", [("x", None), ("x", ["y", None]), ("x", "y", "z"), 5, None, [], [["x", "y"]], (1, "y")]
)
def test_what_is_no_item_is_refused_with_the_forms(item, smol_tokenizer):
    with pytest.raises(RowError, match=f"it is a {type(item).__name__}") as refused:
        yx.score(llama(vocab_size=len(smol_tokenizer)), smol_tokenizer, [item])
    assert refused.value.reason == "wrong_type"
    assert "(x, [y, ...])" in refused.value.fix


def test_an_empty_unconditional_prompt_needs_a_bos(smol_tokenizer):
    """Without one y's first token would count after x and not alone."""
    model = llama(vocab_size=len(smol_tokenizer))
    items = [("Paris is", " big"), ("Paris is", " big, isn't it?"), ("Paris is", "")]
    for bare in yx.score(model, smol_tokenizer, items, unconditional="", bos=False):
        assert bare.log_p_y is None
        assert NO_CONTEXT in bare.notes
    told = yx.score(model, smol_tokenizer, [("Paris is", " big"), ("", " big")], unconditional="", bos=True)
    assert told[0].log_p_y == pytest.approx(told[1].log_p_y_given_x, abs=1e-4)
    assert told[1].pmi == pytest.approx(0, abs=1e-4)


def test_a_bos_that_is_written_in_x_is_one(smol_tokenizer):
    model, bos = llama(vocab_size=len(smol_tokenizer)), smol_tokenizer.bos_token
    x, y = "user asks: what is big?", " Paris"
    (added,) = yx.score(model, smol_tokenizer, [(x, y)], bos=True)
    for control in ("parse", "refuse"):
        (written,) = yx.score(model, smol_tokenizer, [(bos + x, y)], control=control)
        assert not written.conditional_on_first
        assert written.notes == added.notes
        assert (written.tokens_x, written.log_p_xy) == (added.tokens_x, added.log_p_xy)
        (cut,) = yx.score(
            model, smol_tokenizer, [(bos + x, y)], control=control, overflow="left", max_length=4, tokens=True
        )
        assert cut.token_text == (bos, " is", " big", "?", " Paris")


def test_bytes_of_a_reply_count_each_character_once(smol_tokenizer):
    """Several tokens may spell one character, and each of them stands where that stands."""
    model, reply = llama(vocab_size=len(smol_tokenizer)), "😀 東京"
    encoder = yx.Encoder(smol_tokenizer)
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}]}
    end = smol_tokenizer.eos_token
    items = [row, encoder(row), encoder({"x": "hi", "y": reply}), ("hi", reply)]
    told = yx.score(model, smol_tokenizer, items, unconditional="Answer:")
    assert [s.bytes for s in told] == [len((reply + end).encode())] * 3 + [len(reply.encode())]
    (alone,) = yx.score(model, smol_tokenizer, [("Answer:", reply + end)])
    assert told[0].log_p_y == pytest.approx(alone.log_p_y_given_x, abs=1e-4)


def test_scores_say_nothing_about_training(smol_tokenizer):
    model = llama(vocab_size=len(smol_tokenizer))
    for s in yx.score(model, smol_tokenizer, [("Paris is", " big")], bos=True, unconditional="It is"):
        assert s.notes == ()
    for item in ("A", ("A", "")):
        with pytest.raises(RowError, match="one token, which has no probability") as refused:
            yx.score(model, smol_tokenizer, [item])
        assert refused.value.reason == "no_context"
        assert yx.score(model, smol_tokenizer, [item], bos=True)


@pytest.mark.parametrize("item", ["\ud800", ("x", "\ud800"), ("\ud800", ["y"])])
def test_half_a_character_is_refused(item, smol_tokenizer):
    with pytest.raises(RowError, match="half a surrogate pair"):
        yx.score(llama(vocab_size=len(smol_tokenizer)), smol_tokenizer, [item])


def test_without_the_marginal_tokens_of_x_have_no_value_whoever_stands_beside(smol_tokenizer):
    model, item, beside = llama(vocab_size=len(smol_tokenizer)), ("a b", " c d"), ("a", " b c d")
    for items in ([item], [item, beside]):
        s = yx.score(model, smol_tokenizer, items, marginal=False, tokens=True)[0]
        assert np.isnan(s.token_log_p).tolist() == [True, True, False, False]
        assert (s.token_rank[:2] == -1).all()


@pytest.mark.model
def test_real_text(smol):
    model, tokenizer = smol
    pairs = [("The capital of France is", " Paris"), ("The capital of France is", " Rome"), ("2 + 2 =", " 4")]
    scores = yx.score(model, tokenizer, pairs)
    assert scores[0].log_p_y_given_x > scores[1].log_p_y_given_x
    assert all(yx.check(s.log_p_xy, s.log_p_x) for s in scores)
    assert scores[0].log_p_x == pytest.approx(scores[1].log_p_x, abs=1e-4)


@pytest.mark.model
def test_direct_and_by_difference_on_the_real_model(smol):
    model, tokenizer = smol
    x, y = "The three primary colours are", " red, yellow and blue"
    s = yx.score(model, tokenizer, [(x, y)])[0]
    marginal = yx.score(model, tokenizer, [("", x)])[0]
    assert s.log_p_xy - marginal.log_p_xy == pytest.approx(s.log_p_y_given_x, abs=2e-4)

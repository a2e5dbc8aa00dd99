"""What is asked: windows bounded in tokens, rolling and truncated texts, each token counted once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ygivenx.errors import ConfigError, RowError
from ygivenx.forest import Forest
from ygivenx.scores.requests import MOST, Request, RequestBuilder, ScoredPart, pair_of_ids, rolling, windows
from ygivenx.sequence import Segment, Sequence


def with_bos(x: int, y: int) -> Sequence:
    n = 1 + x + y
    segments = (Segment(0, 1, "bos"), Segment(1, 1 + x, "prompt"), Segment(1 + x, n, "answer", output=True))
    return Sequence(np.arange(n), np.zeros(n, np.float32), segments, tuple(map(str, range(n))))


@given(st.integers(1, 200), st.integers(1, 40))
def test_rolling_counts_each_token_once_with_as_much_context_as_fits(length, limit):
    told = rolling(length, limit)
    assert [t for _, since, stop in told for t in range(since, stop)] == list(range(length))
    for start, since, stop in told:
        assert stop - start <= limit + 1  # the last token is never read
        assert start < since or start == 0
    assert told[-1][0] == max(0, length - limit - 1)


def test_rolling_is_the_harness_s():
    harness = pytest.importorskip("lm_eval.utils")
    for length in range(1, 40):
        theirs = harness.get_rolling_token_windows(list(range(1, length + 1)), 0, 7, 1)
        expected = [(a + b[-1:], len(b)) for a, b in theirs]
        told = [
            (list(range(start, stop)), stop - max(since, 1)) for start, since, stop in rolling(length + 1, 7)
        ]
        assert told == expected


def test_left_cuts_x_after_its_bos_and_says_so():
    (request,) = RequestBuilder(None, limit=9, overflow="left")(with_bos(20, 5))
    cut = request.parts[0].sequence
    assert cut.ids.tolist() == [0, *range(17, 26)]
    assert cut.output.sum() == 5
    assert cut.segments[0] == Segment(0, 1, "bos")
    assert cut.tokens == tuple(map(str, cut.ids))
    assert request.truncated == 16
    assert any("lost 16 tokens" in n for n in request.notes)


def test_what_does_not_fit_is_refused_with_a_way_out():
    with pytest.raises(RowError, match="26 tokens long, and the model reads 9") as refused:
        RequestBuilder(None, limit=9)(with_bos(20, 5))
    assert "roll" in refused.value.fix
    with pytest.raises(RowError, match="y doesn't fit") as refused:
        RequestBuilder(None, limit=9, overflow="left")(with_bos(20, 30))
    assert refused.value.reason == "y_too_long"
    bare = pair_of_ids(range(20), range(20, 30))  # without x and BOS y's first token would have no context
    assert RequestBuilder(None, limit=10, overflow="left")(bare)[0].truncated == 19
    with pytest.raises(RowError, match="y doesn't fit"):
        RequestBuilder(None, limit=9, overflow="left")(bare)
    assert len(RequestBuilder(None, limit=25)(with_bos(20, 5))[0].parts) == 1
    with pytest.raises(ConfigError, match="did you mean 'left'"):
        RequestBuilder(None, overflow="lift")
    for limit in (0, -1):  # not "as many as the model reads", and not a window of all there is
        with pytest.raises(ConfigError, match=f"max_length is {limit}"):
            RequestBuilder(None, limit, "roll")


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), max_size=60), st.integers(1, 200))
def test_windows_keep_order_and_bounds(rows, tokens):
    requests = [RequestBuilder(None)(pair_of_ids(ids, [3]))[0] for ids in rows]
    told = list(windows(requests, tokens))
    assert [q for window, _ in told for q in window] == requests
    for i, (window, forest) in enumerate(told):
        first = len(window[0].sequences[0])
        assert sum(len(s) for q in window for s in q.sequences) <= MOST * max(tokens, first)
        assert len(forest) <= first + max(tokens, first)
        assert len(forest.paths) == len(window)
        if i + 1 < len(told):  # what comes next had no room
            further = [*window, told[i + 1][0][0]]
            assert len(Forest.of(s for q in further for s in q.sequences)) > first + max(tokens, first)


def test_what_is_shared_stays_together():
    stem = list(range(100, 400))
    requests = [RequestBuilder(None)(pair_of_ids([*stem, i], [i]))[0] for i in range(40)]
    (only,) = windows(requests, 1000)  # 12,080 tokens, 380 of them distinct
    assert len(only[1]) == 380


@pytest.mark.parametrize(("prompt", "count", "most"), [(30_000, 64, 1), (40_000, 64, 1), (8_000, 1_000, 4)])
def test_a_long_prompt_is_computed_as_often_as_memory_demands_and_no_more(prompt, count, most):
    sequence = pair_of_ids(range(prompt), [0])
    requests = [
        Request((ScoredPart(replace(sequence, ids=np.append(sequence.ids[:-1], i))),)) for i in range(count)
    ]
    told = list(windows(requests))
    assert len(told) <= most
    assert sum(len(forest) for _, forest in told) == len(told) * prompt + count


def test_prompts_in_turns_share_a_window():
    prompts = [list(range(1000 * k, 1000 * k + 500)) for k in (1, 2)]
    requests = [RequestBuilder(None)(pair_of_ids(prompts[i % 2], [i]))[0] for i in range(40)]
    (only,) = windows(requests, 1000)
    assert len(only[1]) == 2 * 500 + 40

"""The forest: what merges, what the mask says, and packs that lose nothing."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import tree

import ygivenx as yx
from ygivenx import packing
from ygivenx.errors import ConfigError, RowError
from ygivenx.forest import _comparable
from ygivenx.sequence import Example, Sequence

EXAMPLES = int(os.environ.get("YGX_EXAMPLES", "60"))


def row(*ids: int, weight: float = 1.0) -> Sequence:
    return Sequence(np.array(ids), np.array([0.0] + [weight] * (len(ids) - 1), np.float32))


rows_strategy = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=7).map(lambda ids: row(*ids, weight=0.5)), max_size=12
)


def twin(sequences) -> dict[tuple[int, ...], float]:
    """Each distinct prefix with the sum of its weights: a dictionary is the slow forest."""
    prefixes: dict[tuple[int, ...], float] = {}
    for s in sequences:
        for i in range(len(s)):
            key = tuple(s.ids[: i + 1].tolist())
            prefixes[key] = prefixes.get(key, 0.0) + float(s.weights[i])
    return prefixes


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows_strategy)
def test_a_forest_is_the_set_of_prefixes(sequences):
    f = yx.Forest.of(sequences)
    prefixes = []
    for v in range(len(f)):
        path, u = [], v
        while u >= 0:
            path.append(int(f.token[u]))
            u = int(f.parent[u])
        prefixes.append(tuple(reversed(path)))
        assert f.depth[v] == len(path) - 1
    assert dict(zip(prefixes, f.weight.tolist(), strict=True)) == pytest.approx(twin(sequences))
    assert len(set(prefixes)) == len(f)
    for s, path in zip(sequences, f.paths, strict=True):
        assert f.token[path].tolist() == s.ids.tolist()


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows_strategy)
def test_end_is_the_whole_mask(sequences):
    """k <= q < end[k] is exactly 'k is q or an ancestor of q', for all nodes and for those that are fed."""
    f = yx.Forest.of(sequences)
    ancestors = [set() for _ in range(len(f))]
    for v in range(len(f)):
        p = int(f.parent[v])
        assert p < v
        ancestors[v] = {v} | (ancestors[p] if p >= 0 else set())
    q, k = np.arange(len(f))[:, None], np.arange(len(f))
    mask = (k <= q) & (q < f.end)
    assert [set(np.flatnonzero(m).tolist()) for m in mask] == ancestors
    i = np.arange(len(f.fed))
    assert ((i <= i[:, None]) & (i[:, None] < f.fed_end)).tolist() == mask[np.ix_(f.fed, f.fed)].tolist()
    assert set(f.fed.tolist()) == set(f.parent.tolist()) - {-1}


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows_strategy)
def test_of_branches_the_deepest_comes_first(sequences):
    forest = yx.Forest.of(sequences)
    deepest = [forest.depth[k:stop].max() for k, stop in enumerate(forest.end)]
    for parent in range(-1, len(forest)):
        children = [deepest[c] for c in np.flatnonzero(forest.parent == parent)]
        assert children == sorted(children, reverse=True)


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows_strategy)
def test_edges_lead_from_fed_rows(sequences):
    f = yx.Forest.of(sequences)
    trained, scored = f.edges(), f.edges(scored=True)
    assert set(trained.nodes.tolist()) == set(np.flatnonzero((f.weight != 0) & (f.parent >= 0)).tolist())
    assert set(scored.nodes.tolist()) == set(np.flatnonzero(f.parent >= 0).tolist())
    some = np.arange(len(f)) % 2 == 0
    assert set(f.edges(some).nodes.tolist()) == set(np.flatnonzero((f.parent >= 0) & some).tolist())
    for e in (trained, scored):
        assert (np.diff(e.rows) >= 0).all()
        assert (f.fed[e.rows] == f.parent[e.nodes]).all()
        assert (f.token[e.nodes] == e.targets).all()
        assert (f.weight[e.nodes] == e.weights).all()


def test_merging_adds_weights():
    f = yx.Forest.of([row(1, 2, 3), row(1, 2, 3, weight=0.5), row(1, 2, 4)])
    assert f.token.tolist() == [1, 2, 3, 4]
    assert f.weight.tolist() == [0, 2.5, 1.5, 1]


def test_a_prefix_of_another_has_its_own_end():
    f = yx.Forest.of([row(5, 6), row(5, 6, 7, 8)])
    assert [p.tolist() for p in f.paths] == [[0, 1], [0, 1, 2, 3]]
    assert f.fed.tolist() == [0, 1, 2]


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows_strategy, st.sampled_from([1, 8, 1 << 23]))
def test_sequences_are_compared_block_by_block_as_a_whole(sequences, block):
    """The order is Python's own order of lists, and what neighbours share is counted token by token."""
    lists = [s.ids.tolist() for s in sequences]
    in_order = sorted(range(len(lists)), key=lists.__getitem__)
    shared = [len(os.path.commonprefix([lists[a], lists[b]])) for a, b in pairwise(in_order)]  # noqa: RUF071
    with patch.object(packing, "BLOCK", block):
        order, common = packing.prefix_order(*_comparable(sequences))
    assert order.tolist() == in_order
    assert common[1:].tolist() == shared


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows_strategy, st.integers(1, 12))
def test_a_plan_counts_the_distinct_tokens_of_its_packs(sequences, max_tokens):
    packs = yx.pack(sequences, max_tokens, seed=1)
    assert (
        list(map(len, packs)) == packing.plan(*_comparable(sequences), max_tokens, seed=1).distinct.tolist()
    )


def test_an_id_that_is_too_large_is_refused():
    with pytest.raises(RowError, match="too large"):
        yx.Forest.of([row(1, 2**31)])


def test_single_tokens_need_no_forward_pass():
    f = yx.Forest.of([row(3), row(4)])
    assert len(f.fed) == 0
    assert len(f.edges(scored=True).rows) == 0


def test_no_sequences_no_nodes():
    assert len(yx.Forest.of([])) == 0
    assert yx.pack([]) == []


def test_what_cannot_be_a_path_is_refused():
    with pytest.raises(RowError, match="sequence 1: it has no tokens"):
        yx.Forest.of([row(1), Sequence(np.zeros(0), np.zeros(0))])
    with pytest.raises(RowError, match="-100 is negative"):
        yx.Forest.of([row(1, -100)])
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        yx.pack([row(1)], max_tokens=0)


def test_examples_and_pairs_are_sequences_too():
    s = row(1, 2, 3)
    f = yx.Forest.of([Example((s, s)), (s.ids, s.weights)])
    assert f.weight.tolist() == [0, 3, 3]
    assert f.members == (0, 1, 2)


def test_it_prints_itself():
    text = str(yx.Forest.of([row(1, 2, 3), row(1, 2, 4)]))
    assert text == "Forest: 2 sequences, 4 distinct of 6 tokens (1.50× shared), 3 trained (75.0%)"


# -- packs -----------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows_strategy, st.integers(1, 20), st.integers(0, 3))
def test_packs_hold_every_sequence_once_and_stay_small(sequences, max_tokens, seed):
    packs = yx.pack(sequences, max_tokens=max_tokens, seed=seed)
    assert sorted(i for f in packs for i in f.members) == list(range(len(sequences)))
    for f in packs:
        for member, path in zip(f.members, f.paths, strict=True):
            assert f.token[path].tolist() == sequences[member].ids.tolist()
        if len(f) > max_tokens:
            # Only one sequence, or several on one stem, may be longer than asked for.
            assert all(_shared(sequences[a], sequences[b]) for a in f.members for b in f.members)


def _shared(a: Sequence, b: Sequence) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a.ids[:n] != b.ids[:n])
    return int(differs[0]) if len(differs) else n


def test_packs_are_a_function_of_seed_and_epoch():
    rows = tree(3, count=60)
    members = lambda **k: [f.members for f in yx.pack(rows, max_tokens=64, **k)]  # noqa: E731
    assert members(seed=1, epoch=2) == members(seed=1, epoch=2)
    assert members(seed=1, epoch=2) != members(seed=1, epoch=3)
    assert members(seed=1, epoch=2) != members(seed=2, epoch=2)


def test_completions_of_one_prompt_stay_together():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(20):
        prompt = rng.integers(0, 50_000, 60)
        rows += [row(*prompt, *rng.integers(0, 50_000, 100)) for _ in range(4)]
    for f in yx.pack(rows, max_tokens=1000):
        groups = [m // 4 for m in f.members]
        assert all(groups.count(g) == 4 for g in groups)


def test_a_common_first_word_keeps_nobody_together():
    """All start alike; company in a pack must be the seed's choice, not the alphabet's."""
    rng = np.random.default_rng(0)
    rows = [row(7, word, *rng.integers(0, 50_000, 50)) for word in range(40) for _ in range(10)]
    packs = yx.pack(rows, max_tokens=600)
    words = [len({m // 10 for m in f.members}) for f in packs]
    assert np.mean(words) > 5


def test_turns_of_one_conversation_stay_together():
    """Per-turn samples: each prompt continues the one before, and the replies part from it."""
    rng = np.random.default_rng(1)
    rows, history = [], rng.integers(0, 50_000, 30)
    for _ in range(20):
        rows.append(row(*history, *rng.integers(0, 50_000, 50)))
        history = np.concatenate((history, rng.integers(0, 50_000, 60)))
    (f,) = yx.pack(rows, max_tokens=4096)
    assert len(f.members) == 20


def test_a_common_stem_is_counted_once_per_pack():
    """A system prompt that all rows share must not leave packs half empty."""
    rng = np.random.default_rng(0)
    system = rng.integers(0, 50_000, 200)
    rows = [row(*system, *rng.integers(0, 50_000, 200)) for _ in range(200)]
    packs = yx.pack(rows, max_tokens=1024)
    assert [len(f) for f in packs] == [1000] * 50


def test_a_conversation_longer_than_a_pack_is_not_torn_into_its_turns():
    rng = np.random.default_rng(1)
    rows, history = [], rng.integers(0, 50_000, 300)
    for _ in range(30):
        rows.append(row(*history, *rng.integers(0, 50_000, 50)))
        history = np.concatenate((history, rng.integers(0, 50_000, 100)))
    others = [row(*rng.integers(0, 50_000, 100)) for _ in range(50)]
    packs = yx.pack(rows + others, max_tokens=1000)
    assert sum(map(len, packs)) <= 1.05 * len(yx.Forest.of(rows + others))


def test_completions_that_do_not_fit_are_cut_where_the_prompt_is_cheap():
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, 50_000, 100)
    packs = yx.pack([row(*prompt, *rng.integers(0, 50_000, 300)) for _ in range(16)], max_tokens=1024)
    assert all(len(f) <= 1024 for f in packs)
    assert sum(map(len, packs)) == 16 * 300 + len(packs) * 100


def test_a_million_tokens_in_a_second():
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 50_000, (1000, 100))
    rows = [
        Sequence(np.concatenate((p, rng.integers(0, 50_000, 100))), np.zeros(200))
        for p in prompts
        for _ in range(9)
    ]
    started = time.process_time()
    f = yx.Forest.of(rows)
    # The bar is 1 s alone; four times that here, where others may be running.
    assert len(f) > 999_000
    assert time.process_time() - started < 4


def test_merged_weights_are_summed_in_float64():
    """A thousand weights of 1e-8 beside a weight of 1: float32 would round each of them away."""
    merged = yx.Forest.of([row(1, 2), *(row(1, 2, weight=1e-8) for _ in range(1000))])
    assert merged.weight.tolist() == [0, np.float32(1.00001)]


def test_a_pack_is_filled_to_the_last_token():
    assert list(map(len, yx.pack([row(1, 2, 3, 4), row(5, 6, 7, 8)], max_tokens=8))) == [8]

"""The demo's task is deterministic, disjoint and well-formed. (The run itself is `make demo`.)"""

from __future__ import annotations

import json

from ygivenx.demo.task import splits


def answer(row):
    return json.loads(row["messages"][-1]["content"])


def test_same_seed_same_rows():
    assert splits(50, 20, seed=3) == splits(50, 20, seed=3)
    assert splits(50, 20, seed=3) != splits(50, 20, seed=4)


def test_held_out_rows_are_new():
    train, held_out = splits(400, 100)
    triples = [{(a["buyer"], a["item"], a["city"]) for a in map(answer, rows)} for rows in (train, held_out)]
    assert (len(train), len(held_out)) == (400, 100)
    assert not triples[0] & triples[1]


def test_every_fact_stands_in_the_sentence():
    for row in splits(200, 0)[0]:
        text, facts = row["messages"][1]["content"], answer(row)
        for key in ("buyer", "item", "city", "count", "price"):
            assert str(facts[key]) in text

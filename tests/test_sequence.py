"""Sequence: what it refuses, and that it leaves the caller's arrays alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ygivenx import Example, Sequence
from ygivenx.errors import RowError
from ygivenx.sequence import Segment
from ygivenx.show import visible, visible_json


def test_it_is_frozen_and_the_callers_arrays_are_not():
    ids, weights = np.arange(4), np.array([0, 0, 1, 1], np.float32)
    s = Sequence(ids, weights)
    with pytest.raises(ValueError, match="read-only"):
        s.ids[0] = 7
    with pytest.raises(ValueError, match="read-only"):
        s.weights[1] = 7
    ids[0], weights[1] = 7, 0.5  # still the caller's to write
    assert s.labels.tolist() == [-100, -100, 2, 3]


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([1, 2], [0], "one length"),
        ([[1, 2]], [[0, 1]], "1-D"),
        ([1, 2], [1, 1], "first token has no context"),
        ([1, 2], [0, -1], "not negative"),
        ([1, 2], [0, float("nan")], "finite"),
        ([1.7, 2.2], [0, 1], "whole numbers, got float64"),
        ([True, False], [0, 1], "whole numbers, got bool"),
    ],
)
def test_what_is_refused(ids, weights, message):
    with pytest.raises(ValueError, match=message):
        Sequence(np.array(ids), np.array(weights, np.float32))


def test_an_example_of_several_sequences_has_no_single_ids():
    s = Sequence(
        np.arange(3), np.array([0, 0, 1], np.float32), (Segment(0, 3, "answer", True),), ("a", "b", "c")
    )
    many = Example((s, s))
    assert many.trained == ["c", "c"]
    with pytest.raises(ValueError, match="one per turn"):
        many.ids  # noqa: B018


def test_print_marks_what_is_trained_and_tames_controls():
    s = Sequence(
        np.arange(3), np.array([0, 0.5, 0], np.float32), (), ("a", "b\x1b[31m", "c"), ("a note\x1b",)
    )
    assert str(s).splitlines()[0] == "a⟦b␛[31m×0.5⟧c"
    assert "note: a note␛" in str(s)


@pytest.mark.parametrize(
    "char", [chr(c) for c in (0x00, 0x0D, 0x1B, 0x7F, 0x9B, 0x202E, 0x2066, 0x2069, 0xD800)]
)
def test_what_a_terminal_would_obey_is_not_shown_to_it(char):
    assert char not in visible(f"a{char}b")
    error = RowError(f"w{char}", reason="r", field=f"messages[0].{char}", why=f"y{char}", fix=f"f{char}")
    assert char not in str(error)
    assert visible("a\tb\nc é ⟦") == "a\tb\nc é ⟦"
    document = visible_json(json.dumps({"a": char + "é"}, ensure_ascii=False))
    assert char not in document
    assert json.loads(document) == {"a": char + "é"}

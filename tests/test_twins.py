"""TRL's `_training` templates as an oracle: every token where its mask differs from ours, by class.

| class | what |
|---|---|
| supplied by the prompt | TRL trains what inference supplies: `<think>\\n`, `<|start|>assistant` |
| after the end of the turn | TRL trains what follows the token at which generation stops: a newline, an eos |
| without weight | the row gives this reply the weight 0, which TRL doesn't know |
| end of the turn | TRL leaves out the token that ends the turn (Gemma's tool response) |
| half a character | TRL leaves out the last tokens of a character that has several |
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from templates.conversations import ALL
from templates.stock import stock_templates, tokenizer_for

from ygivenx import Encoder, RowError, Sequence
from ygivenx.rows.formats import normalise

SHELF = stock_templates()
TWINS = [n for n in SHELF if n.endswith("_training") and n.removesuffix("_training") in SHELF]
KNOWN = {
    "supplied by the prompt", "after the end of the turn", "without weight", "end of the turn", "half a character",
}  # fmt: skip


def compared(name: str, title: str) -> Counter[str]:
    """How many tokens differ, by class; "same" or "other ids" where none can."""
    base = name.removesuffix("_training")
    tokenizer, row = tokenizer_for(base, SHELF[base]), ALL[title]
    try:
        example = Encoder(tokenizer, repair="none")(row)
    except RowError:
        return Counter({"refused": 1})
    if len(example.sequences) > 1:
        return Counter({"split": 1})
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in normalise(row).messages]
    more = {k: row.get(k) for k in ("tools", "documents")}
    twin = tokenizer.apply_chat_template(
        messages, **more, chat_template=SHELF[name], return_dict=True, return_assistant_tokens_mask=True
    )
    if twin["input_ids"] != example.ids.tolist():
        return Counter({"other ids": 1})
    differing = differences(example.only, [bool(m) for m in twin["assistant_masks"]])
    return differing or Counter({"same": 1})


def differences(sequence: Sequence, theirs: list[bool]) -> Counter[str]:
    ours = (sequence.weights > 0).tolist()
    kinds = [s.kind for s in sequence.segments for _ in range(s.start, s.stop)]
    zero = [s.kind == "answer" and not s.output for s in sequence.segments for _ in range(s.start, s.stop)]
    found: Counter[str] = Counter()
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a and not b:
            found[_missed(sequence, kinds, theirs, i)] += 1
        elif b and not a:
            found[_added(ours, theirs, zero, i)] += 1
    return found


def _added(ours: list[bool], theirs: list[bool], zero: list[bool], i: int) -> str:
    left = right = i
    while left and theirs[left - 1] and not ours[left - 1]:
        left -= 1
    while right + 1 < len(theirs) and theirs[right + 1] and not ours[right + 1]:
        right += 1
    if any(zero[left : right + 1]):
        return "without weight"
    if right + 1 < len(ours) and ours[right + 1]:
        return "supplied by the prompt"
    return "after the end of the turn" if left and ours[left - 1] else "unexplained"


def _missed(sequence: Sequence, kinds: list[str], theirs: list[bool], i: int) -> str:
    if kinds[i] == "end_of_turn":
        return "end of the turn"
    if not sequence.tokens[i] or not sequence.tokens[i].isascii():
        return "half a character"
    return "unexplained"


@cache
def found_with(name: str) -> Counter[str]:
    found = Counter[str]()
    for title in ALL:
        found += compared(name, title)
    return found


@pytest.mark.skipif(not TWINS, reason="TRL is not installed")
@pytest.mark.parametrize("name", TWINS)
def test_every_difference_is_explained(name):
    found = found_with(name)
    print(name, dict(found))
    assert set(found) <= KNOWN | {"same", "split", "refused", "other ids"}, dict(found)


@pytest.mark.skipif(not TWINS, reason="TRL is not installed")
def test_the_table_has_no_class_that_does_not_occur():
    assert {kind for name in TWINS for kind in found_with(name)} >= KNOWN

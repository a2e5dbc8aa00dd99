"""Rows whose replies are rated: what they mean, and that each reply is encoded as by itself."""

from __future__ import annotations

import numpy as np
import pytest
from templates.conversations import reply, user
from test_chats import CHATML, encoder, trained

from ygivenx import PreferenceEncoder, Targets, loss
from ygivenx.errors import LossError, RowError
from ygivenx.rows.data import Conversation, Pair, normalise, read
from ygivenx.rows.nouns import Rated

GOOD, BAD = reply("4"), reply("5")
PAIR = {"prompt": [user("2+2?")], "chosen": [GOOD], "rejected": [BAD]}
TEXTS = (Pair("2+2=", "4"), Pair("2+2=", "5"))
SAME = (Conversation((user("2+2?"), GOOD)), Conversation((user("2+2?"), BAD)))


@pytest.mark.parametrize(
    ("row", "replies", "rewards"),
    [
        ({"prompt": "2+2=", "completion": "4", "label": True}, (Pair("2+2=", "4"),), (1.0,)),
        ({"messages": [user("2+2?"), BAD], "kto_tag": "false"}, SAME[1:], (-1.0,)),
        ({"question": "2+2?", "answer": "5", "label": 0}, SAME[1:], (-1.0,)),
        ({"prompt": "2+2=", "completions": ["4", "5"], "rewards": [2, 0.5]}, TEXTS, (2, 0.5)),
        ({"prompt": [user("2+2?")], "responses": [[GOOD], [BAD]], "scores": "[1, 0]"}, SAME, (1, 0)),
        ({"prompt": [user("2+2?")], "responses": ["4", "5"], "scores": [1, 0]}, SAME, (1, 0)),
        ({"instruction": "2+2?", "candidates": ["4", "5"], "ratings": [1, 0]}, SAME, (1, 0)),
        ({"messages": [user("2+2?")], "answers": [GOOD, BAD], "scores": [1, 0]}, SAME, (1, 0)),
    ],
)  # fmt: skip
def test_replies_and_their_rewards(row, replies, rewards):
    noun = normalise(row)
    assert isinstance(noun, Rated)
    assert (noun.replies, noun.rewards) == (replies, rewards)


def test_a_class_is_no_judgement_and_the_rows_weight_is_the_rows():
    assert isinstance(normalise({"prompt": "x", "completion": "y", "label": "sports"}), Pair)
    assert isinstance(normalise({"text": "x", "label": 1}), Pair)
    noun = normalise({"prompt": "x", "completion": "y", "label": 1, "weight": 0.5})
    assert (noun.weight, noun.replies[0].weight) == (0.5, 1.0)


def test_each_reply_is_encoded_as_by_itself():
    encode = encoder(CHATML)
    rated = PreferenceEncoder(encode)(PAIR)
    assert (rated.rewards, rated.names) == ((1, -1), ("chosen", "rejected"))
    for done, row in zip(rated.replies, (GOOD, BAD), strict=True):
        alone = encode({"messages": [user("2+2?"), row]})
        np.testing.assert_array_equal(done.ids, alone.ids)
        np.testing.assert_array_equal(done.weights, alone.weights)
        assert done.segments == alone.segments
    assert [trained(r) for r in rated.replies] == ["4<|im_end|>", "5<|im_end|>"]
    targets = Targets.of([rated])
    shared = int(np.argmin(rated.replies[0].ids == rated.replies[1].ids))
    assert len(targets.forest) == targets.forest.total - shared


def test_token_ids_with_a_reward_are_one_rated_reply():
    (reply,) = PreferenceEncoder(encoder(CHATML))(
        {"prompt_ids": [1, 2], "completion_ids": [3], "reward": -0.5}
    ).replies
    assert reply.ids.tolist() == [1, 2, 3]
    assert reply.weights.tolist() == [0, 0, 1]


def test_accepted_and_rejected_rows_are_all_rows_and_a_reply_is_named(tmp_path):
    rows = [
        PAIR,
        PAIR | {"rejected": [reply("<|im_end|>")]},
        {"messages": [user(), GOOD]},
        PAIR | {"rejected": [GOOD]},
        {},
    ]
    examples, rejected = PreferenceEncoder(encoder(CHATML)).batch(rows)
    assert [e.index for e in examples] == [0]
    assert [r.reason for r in rejected] == ["control_text", "unrated_row", "same_replies", "unknown_format"]
    assert rejected[0].where.startswith("row 1, rejected, ")
    assert [r.where for r in rejected[1:]] == ["row 2", "row 3", "row 4"]


def test_rows_of_a_file_keep_their_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    reader = read(path)
    assert "label" in reader.format.partition("ignored")[0]
    example = PreferenceEncoder(encoder(CHATML))(next(iter(reader)))
    assert (example.index, example.rewards, example.row["completion"]) == (0, (1.0,), "b")


@pytest.mark.parametrize(
    ("row", "reason"),
    [(PAIR, "preference_row"), ({"prompt": "x", "completion": "y", "label": True}, "judged_row"),
     ({"prompt": "x", "completions": ["y", "z"], "scores": [1, 0]}, "preference_row")],
)  # fmt: skip
def test_supervised_training_refuses_them(row, reason):
    with pytest.raises(RowError, match="objective") as refused:
        encoder(CHATML)(row)
    assert refused.value.reason == reason


def test_the_supervised_loss_refuses_them():
    rated = PreferenceEncoder(encoder(CHATML))(PAIR)
    for batch in (rated, [rated]):
        with pytest.raises(LossError, match=r"PreferenceTrainer"):
            loss(None, batch)

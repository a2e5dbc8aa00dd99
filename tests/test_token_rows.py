"""Rows of token ids: every tool's columns, bitwise the ids given, and no call of the tokenizer."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from templates.conversations import reply, user
from test_chats import CHATML, encoder, trained

from ygivenx import Encoder, PreferenceEncoder
from ygivenx.errors import RowError
from ygivenx.rows.data import TokenRow, normalise

X, Y = [11, 12, 13], [14, 15]
WHOLE = X + Y
REPLY = {"prompt_ids": X, "completion_ids": Y}
ONE = {"prompt_ids": [1, 2], "completion_ids": [3]}
NAN, INF = float("nan"), float("inf")
LOGGED = [-0.5, -0.25]
RANKED = [
    {"7": {"logprob": -0.1}, "14": {"logprob": -0.5, "rank": 2}},
    {"15": {"logprob": -0.25}},
]  # vLLM's top k


@pytest.mark.parametrize(
    "row",
    [
        {"prompt_token_ids": X, "token_ids": Y, "logprobs": LOGGED},
        {"prompt_token_ids": X, "token_ids": Y, "logprobs": RANKED},
        {"input_ids": X, "output_ids": Y, "output_token_logprobs": [[-0.5, 14, "a"], [-0.25, 15, None]]},
        {"prompt_ids": X, "response_ids": Y, "response_mask": [1, 1], "response_logprobs": LOGGED},
        {"prompt_token_ids": X, "response_ids": Y, "loss_masks": [1, 1], "rollout_logprobs": LOGGED},
        {"prompt_ids": X, "completion_ids": Y, "completion_mask": [1, 1], "logprobs": LOGGED},
        {"prompt_ids": [X], "completion_ids": [Y], "logprobs": [LOGGED]},  # a batch of one
        {"tokens": WHOLE, "response_length": 2, "loss_mask": [1, 1], "rollout_log_probs": LOGGED},
        {"input_ids": WHOLE, "labels": [-100, -100, -100, 14, 15], "log_probs": [None, None, None, *LOGGED]},
        {"input_ids": WHOLE, "assistant_masks": [0, 0, 0, 1, 1]},
        {"input_ids": WHOLE, "weights": [0, 0, 0, 1, 1], "position_ids": [0, 1, 2, 3, 4]},
        {"input_ids": [0, *WHOLE, 0], "attention_mask": [0, 1, 1, 1, 1, 1, 0], "labels": [-100] * 4 + Y + [-100]},
    ],
)  # fmt: skip
def test_every_tools_columns_give_the_same_row(row):
    noun = normalise(row)
    assert noun.ids.tolist() == WHOLE
    assert noun.weights.tolist() == [0, 0, 0, 1, 1]
    if noun.log_probs is not None:
        np.testing.assert_array_equal(noun.log_probs, np.float32([np.nan] * 3 + LOGGED))
    assert [(s.start, s.stop, s.output) for s in noun.sequence().segments] == [(0, 3, False), (3, 5, True)]


def test_results_of_tools_between_the_models_own_tokens_are_context():
    noun = normalise({"prompt_ids": [1], "response_ids": [2, 3, 4], "response_mask": [1, 0, 1]})
    assert noun.weights.tolist() == [0, 1, 0, 1]
    assert [(s.kind, s.start, s.stop) for s in noun.segments()] == [
        ("prompt", 0, 1), ("answer", 1, 2), ("prompt", 2, 3), ("answer", 3, 4),
    ]  # fmt: skip


def test_advantages_of_any_sign_rewards_and_weights():
    noun = normalise({"prompt_ids": X, "completion_ids": Y, "advantages": -1.5, "reward": 2, "weight": 0.5})
    assert noun.advantages.tolist() == [0, 0, 0, -1.5, -1.5]
    assert (noun.reward, noun.weights.tolist()) == (2.0, [0, 0, 0, 0.5, 0.5])
    each = normalise({"prompt_ids": X, "completion_ids": Y, "advantages": [-1, 2], "rewards": [0.5, 1]})
    assert (each.advantages.tolist(), each.reward) == ([0, 0, 0, -1, 2], 1.5)


@pytest.mark.parametrize("encode", [encoder, lambda t: PreferenceEncoder(encoder(t))])
def test_what_is_logged_twice_or_as_text_counts_and_nonsense_is_refused(encode):
    def logged(further):
        done = encode(CHATML)(REPLY | further)
        return (done if encode is encoder else done.replies[0]).only.logged

    for further in ({"reward": "1.0"}, {"reward": 1, "score": 1.0, "rewards": [0.5, 0.5]}, {"reward": True}):
        assert logged(further).reward == 1
    twice = logged({"reward": 1, "logprobs": LOGGED, "old_log_probs": [None] * 3 + LOGGED, "advantages": "2"})
    np.testing.assert_array_equal(twice.log_probs, np.float32([NAN] * 3 + LOGGED))
    assert twice.advantages.tolist() == [0, 0, 0, 2, 2]
    # verl logs both, and they differ.
    both = logged({"reward": 1, "rollout_log_probs": LOGGED, "old_log_probs": [-0.25, -0.125]})
    np.testing.assert_array_equal(both.log_probs, np.float32([NAN] * 3 + [-0.25, -0.125]))
    for further in ({"reward": NAN}, {"advantages": INF}):
        with pytest.raises(RowError) as caught:
            encode(CHATML)(REPLY | further)
        assert caught.value.reason == "not_a_number"


def test_an_entry_of_one_token_is_no_batch_of_one():
    for logged in ([[-0.5, 3, None]], [[-0.5, 3]], [-0.5], [[-0.5]], [[None, None, -0.5]], [1e-3 - 0.501]):
        np.testing.assert_allclose(normalise(ONE | {"logprobs": logged}).log_probs, [NAN, NAN, -0.5])


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ({"input_ids": WHOLE, "labels": [-100, 12, 13, 14, 16]}, "conflict", "labels[4]"),
        ({"input_ids": WHOLE, "labels": [12, 13, 14, 15, -100]}, "conflict", "labels[0]"),  # shifted by one
        ({"input_ids": WHOLE, "loss_mask": [1, 1]}, "wrong_length", "loss_mask"),
        ({"prompt_ids": X, "response_ids": Y, "response_mask": [1]}, "wrong_length", "response_mask"),
        ({"input_ids": WHOLE, "loss_mask": [0, 0, 0, 0.5, 1]}, "bad_weight", "loss_mask"),
        ({"input_ids": WHOLE, "weights": [0, 0, 0, -1, 1]}, "bad_weight", "weights"),
        ({"input_ids": [1, 2.0], "labels": [1, 2]}, "bad_token", "input_ids[1]"),
        ({"input_ids": [1, -1], "labels": [1, -1]}, "bad_token", "input_ids[1]"),
        ({"input_ids": [], "labels": []}, "empty_tokens", "input_ids"),
        ({"input_ids": "1 2", "labels": []}, "broken_json", "input_ids"),
        ({"input_ids": WHOLE, "labels": WHOLE, "attention_mask": [1, 0, 1, 1, 1]}, "conflict", "attention_mask"),
        ({"input_ids": WHOLE, "labels": WHOLE, "position_ids": [0, 1, 2, 0, 1]}, "packed_row", "position_ids"),
        ({"input_ids": WHOLE, "labels": WHOLE, "seq_lengths": [3, 2]}, "packed_row", "seq_lengths"),
        ({"tokens": WHOLE, "response_length": 6}, "conflict", "response_length"),
        ({"prompt_ids": X, "completion_ids": Y, "logprobs": ["a", "b"]}, "wrong_type", "logprobs[0]"),
        *((REPLY | {key: value}, "not_a_number", key) for key in ("reward", "score", "advantages")
          for value in (NAN, INF, -INF)),
        (REPLY | {"advantages": [1, NAN]}, "not_a_number", "advantages[1]"),
        (REPLY | {"advantages": [1, None]}, "wrong_type", "advantages[1]"),
        (REPLY | {"rewards": [1, INF]}, "not_a_number", "rewards[1]"),
        (REPLY | {"reward": "good"}, "broken_json", "reward"),
        (REPLY | {"reward": {"math": 1}}, "wrong_type", "reward"),
        (REPLY | {"logprobs": [-0.5, 0.1]}, "bad_log_prob", "logprobs[1]"),
        (REPLY | {"logprobs": [-INF, -0.1]}, "bad_log_prob", "logprobs[0]"),
        (REPLY | {"logprobs": [[14, -0.5, None], [15, -0.25, None]]}, "conflict", "logprobs[0]"),
        (REPLY | {"logprobs": [[-0.5, 14, None], [-0.25, 99, None]]}, "conflict", "logprobs[1]"),
        (REPLY | {"logprobs": [{"14": {"logprob": -0.5}}, {"7": {"logprob": -0.25}}]}, "missing_field", "logprobs[1]"),
        *((ONE | {"logprobs": [entry]}, "conflict", "logprobs[0]")
          for entry in ([-0.5, 99, None], [-0.5, 99], [3, -0.5, "a"])),
        (REPLY | {"logprobs": LOGGED, "rollout_log_probs": [-0.5, -0.5]}, "conflict", "rollout_log_probs"),
        (REPLY | {"reward": 1, "score": -1}, "conflict", "score"),
        (REPLY | {"advantages": 1, "advantage": 2}, "conflict", "advantage"),
        (REPLY | {"response_ids": [14, 16]}, "conflict", "completion_ids"),
        (REPLY | {"prompt_token_ids": [11]}, "conflict", "prompt_ids"),
    ],
)  # fmt: skip
def test_every_fault_names_its_field(row, reason, field):
    with pytest.raises(RowError) as caught:
        normalise(row)
    assert (caught.value.reason, caught.value.field) == (reason, field)


class Counting:
    """A tokenizer that counts how often it is asked to encode."""

    def __init__(self, tokenizer):
        self._tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self._tokenizer(*args, **kwargs)

    def encode(self, *args, **kwargs):
        self.calls += 1
        return self._tokenizer.encode(*args, **kwargs)


def test_ids_reach_the_sequence_bitwise_without_a_call_of_the_tokenizer(monkeypatch):
    enc, calls = encoder(CHATML), []
    monkeypatch.setattr(type(enc.tokens), "encode_cut", lambda self, texts: calls.extend(texts) or iter(()))
    counting = Counting(enc.tokenizer)
    monkeypatch.setattr(enc.tokens, "tokenizer", counting)
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(0, 300, 9).tolist(), rng.integers(0, 300, 5).tolist()) for _ in range(20)]
    rows = [{"prompt_ids": x, "completion_ids": y} for x, y in drawn]
    examples, rejected = enc.batch(rows)
    assert (rejected, calls, counting.calls) == ([], [], 0)
    for row, example in zip(rows, examples, strict=True):
        assert example.ids.tolist() == row["prompt_ids"] + row["completion_ids"]
        assert example.weights.tolist() == [0] * 9 + [1] * 5


def test_ids_are_shown_as_the_text_that_they_are(smol_tokenizer):
    enc = Encoder(smol_tokenizer)
    s = enc({"messages": [user("日本 🙂 naïve?"), reply("Да, 🙂!")]}).only
    shown = enc({"input_ids": s.ids.tolist(), "labels": s.labels.tolist()})
    assert "".join(shown.only.tokens) == "".join(s.tokens)
    assert trained(shown) == trained(enc({"messages": [user("日本 🙂 naïve?"), reply("Да, 🙂!")]}))
    again = pickle.loads(pickle.dumps(shown))
    assert list(again.only.tokens) == list(shown.only.tokens)
    assert "[" in str(shown)


def test_what_an_encoder_wrote_is_read_back(tmp_path):
    enc = encoder(CHATML)
    s = enc({"messages": [user(), reply(weight=0.5)]}).only
    again = enc(
        {"input_ids": s.ids.tolist(), "labels": s.labels.tolist(), "weights": s.weights.tolist()}
    ).only
    assert (again.ids.tolist(), again.weights.tolist()) == (s.ids.tolist(), s.weights.tolist())


def test_a_policy_weighs_the_prompt_and_never_what_the_row_masks():
    row = {"prompt_ids": [1, 2], "response_ids": [3, 4, 5], "response_mask": [1, 0, 1]}
    assert encoder(CHATML, train="all")(row).weights.tolist() == [0, 1, 1, 0, 1]
    assert encoder(CHATML, train="prompt=0.5")(row).weights.tolist() == [0, 0.5, 1, 0, 1]


@pytest.mark.parametrize("row", [{"input_ids": [7]}, {"prompt_ids": [7], "completion_ids": []}])
def test_a_row_of_one_token_has_nothing_to_train(row):
    (segment,) = normalise(row).sequence().segments
    assert (segment.start, segment.stop) == (0, 1)
    with pytest.raises(RowError) as e:
        encoder(CHATML)(row)
    assert e.value.reason == "nothing_trained"


def test_an_id_of_another_tokenizer_is_refused():
    enc = encoder(CHATML)
    with pytest.raises(RowError, match="vocabulary"):
        enc({"prompt_ids": [1], "completion_ids": [10**6]})
    assert isinstance(normalise({"prompt_ids": [1], "completion_ids": [10**6]}), TokenRow)

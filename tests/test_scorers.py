"""What scorers compute of log Pr(y|x): accuracies, bits per byte, windows, words, distributions, sums by field."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from test_scorerun import lines, model_dir, ygx_score  # noqa: F401  (a fixture)
from tiny import llama

import ygivenx as yx
from ygivenx.errors import ConfigError, RowError
from ygivenx.scores.choices import Accuracy, gold_of
from ygivenx.scores.requests import rolling


@pytest.fixture(scope="module")
def model(smol_tokenizer):
    return llama(vocab_size=len(smol_tokenizer))


def log_softmax(model, ids) -> torch.Tensor:
    """float64 [T − 1, V]: of the token after each."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(torch.tensor(ids)[None]).logits[0, :-1].log_softmax(-1)


# -- choices ------------------------------------------------------------------------------------------------


def test_accuracies_are_the_harness_s_own():
    """By the harness's own function, on the same log-probabilities."""
    task = pytest.importorskip("lm_eval.api.task")
    rng = np.random.default_rng(0)
    choices = [["a", "bb cc", "ddd"], ["fü", "x", "yy"], ["one", "three", "two"], ["q", "w w w", "e"]]
    accuracy, theirs = Accuracy(), []
    for row, texts in enumerate(choices):
        log_p, gold = (-10 * rng.random(3)).tolist(), int(rng.integers(3))
        for k, (text, value) in enumerate(zip(texts, log_p, strict=True)):
            accuracy.add(
                {"row": row, "gold": k == gold, "log_p_y_given_x": value, "per_token": value,
                 "per_byte": value / len(text.encode()), "per_character": value / len(text)}
            )  # fmt: skip
        fake = type("Task", (), {
            "OUTPUT_TYPE": "multiple_choice", "multiple_input": False, "multiple_target": False,
            "multiple_numeric": False,
            "_metric_fn_list": {"acc": 0, "acc_norm": 0, "acc_bytes": 0},
            "config": property(lambda self: type("C", (), {"process_results": None})()), "prob_norm": False,
            "doc_to_choice": lambda self, doc, texts=texts: texts, "doc_to_text": lambda self, doc: 0,
            "doc_to_target": lambda self, doc, gold=gold: gold,
        })()  # fmt: skip
        theirs.append(task.ConfigurableTask.process_results(fake, {}, [(v, False) for v in log_p]))
    found = accuracy.to_dict()["choices"]
    assert found["rows"] == 4
    assert found["accuracy"]["raw"] == np.mean([t["acc"] for t in theirs])
    assert found["accuracy"]["per_character"] == np.mean([t["acc_norm"] for t in theirs])
    if "acc_bytes" in theirs[0]:
        assert found["accuracy"]["per_byte"] == np.mean([t["acc_bytes"] for t in theirs])


def test_a_choice_needs_scores_and_a_known_rule():
    with pytest.raises(ConfigError, match="nothing to choose from"):
        yx.best_choice([])
    with pytest.raises(ConfigError, match="per_byte"):
        yx.best_choice([{"log_p_y_given_x": -1.0}], "per_bite")


def test_the_best_choice_of_scores(model, smol_tokenizer):
    (choices,) = yx.score_choices(
        model, smol_tokenizer, [("The capital of France is", [" Paris", " a big old city", " é"])]
    )
    assert yx.best_choice(choices) == max(range(3), key=lambda i: choices[i].log_p_y_given_x)
    assert yx.best_choice(choices, "per_byte") == max(
        range(3), key=lambda i: choices[i].log_p_y_given_x / choices[i].bytes
    )
    assert [(c.bytes, c.characters, c.words) for c in choices] == [(6, 5, 1), (15, 14, 4), (3, 1, 1)]
    assert yx.best_choice([{"log_p_y_given_x": None}, {"log_p_y_given_x": -900.0}]) == 1, (
        "a file has null for −∞"
    )


@pytest.mark.parametrize("gold", [3, -1, True, "c", "b", None])
def test_a_gold_that_names_no_choice_is_refused(gold):
    with pytest.raises(RowError, match="names none of 3 choices"):
        gold_of(gold, ["a", "b", "b"])


def test_the_command_counts_choices_and_says_everything_in_one_line(model_dir, tmp_path):  # noqa: F811
    rows = [
        {"x": f"Request {i}?", "y": [" yes", " no, never", " it may be"], "gold": i % 3} for i in range(5)
    ]
    rows += [
        {"x": "Request?", "y": " yes"},
        {"x": "bad", "y": [" a", " b"], "gold": 7},
        rows[0] | {"gold": " yes"},
    ]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = ygx_score(data, "--model", model_dir, "-o", out, "--json")
    account, records = json.loads(done.stdout), lines(out)
    assert (account["accepted"], account["reasons"]) == (7, {"bad_gold": 1})
    groups = [[r for r in records if r["row"] == i] for i in (0, 1, 2, 3, 4, 7)]
    for by, share in account["choices"]["accuracy"].items():
        name = {"raw": "log_p_y_given_x"}.get(by, by)
        assert share == np.mean([max(g, key=lambda r: r[name])["gold"] for g in groups])
    assert ["gold" in r for r in records if r["row"] == 5] == [False]
    nats, n_bytes = -sum(r["log_p_y_given_x"] for r in records), sum(r["bytes"] for r in records)
    assert account["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes)
    assert account["bits_per_word"] == pytest.approx(nats / math.log(2) / sum(r["words"] for r in records))
    assert account["perplexity"] == pytest.approx(math.exp(nats / sum(r["scored"] for r in records)))
    assert "accuracy over 6 rows: raw" in done.stderr
    assert "bits/byte" in done.stderr
    assert "bad_gold, such as " in done.stderr
    assert "row 6 (line 7), gold: 7 names none of 2 choices" in done.stderr
    assert "ignored" not in account["format"]
    half = out.read_text().splitlines(keepends=True)[:4]
    out.write_text("".join(half))
    assert (
        json.loads(ygx_score(data, "--model", model_dir, "-o", out, "--json").stdout)["choices"]
        == account["choices"]
    )


# -- windows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_a_stride_gives_each_token_at_least_so_much_context(stride):
    for length in range(1, 40):
        found = rolling(length, 7, stride)
        assert [t for _, since, stop in found for t in range(since, stop)] == list(range(length))
        for start, since, stop in found:
            assert stop - start <= 8
            assert start == 0 or since - start >= 8 - stride


@pytest.mark.parametrize("window_bos", [False, True])
@pytest.mark.parametrize(("overflow", "stride"), [("roll", None), ("stride", 3), ("stride", None)])
def test_windows_are_scored_as_texts_of_their_own(model, smol_tokenizer, overflow, stride, window_bos):
    text, limit = "The quick brown fox jumps over the lazy dog. " * 3, 10
    s, = yx.score(
        model, smol_tokenizer, [text], overflow=overflow, stride=stride, max_length=limit,
        window_bos=window_bos, tokens=True,
    )  # fmt: skip
    ids = smol_tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = [smol_tokenizer.bos_token_id] * window_bos
    limit -= window_bos
    expected = [] if window_bos else [math.nan]
    for start, since, stop in rolling(len(ids), limit, limit if overflow == "roll" else stride or 5):
        log_p = log_softmax(model, bos + ids[start:stop])
        first = max(since, 1 - window_bos)
        expected += [float(log_p[t - start - 1 + window_bos, ids[t]]) for t in range(first, stop)]
    found = s.token_log_p[window_bos:]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert s.conditional_on_first == (not window_bos)
    assert s.tokens == len(ids)
    note = next(n for n in s.notes if "windows of 10 tokens" in n)
    assert ("BOS before it" in note) == window_bos


@pytest.mark.parametrize(
    "settings",
    [
        {"overflow": "roll", "stride": 3},
        {"overflow": "stride", "stride": 11},
        {"overflow": "left", "window_bos": True},
    ],
)
def test_windows_that_contradict_themselves_are_refused(model, smol_tokenizer, settings):
    with pytest.raises(ConfigError, match=r"stride is|without windows"):
        yx.score(model, smol_tokenizer, ["a text"], max_length=10, **settings)


# -- words, distributions, segments -------------------------------------------------------------------------


def test_words_have_their_own_borders_and_add_up(model, smol_tokenizer):
    x, y = "Say:", " unbelievably\n\nlong  words, aren't 日本 they? "
    s, = yx.score(model, smol_tokenizer, [(x, y)], tokens=True, words=True)  # fmt: skip
    assert "".join(s.word_text) == y
    assert [w.split() for w in s.word_text] == [[w] for w in y.split()]
    assert sum(s.word_log_p) == pytest.approx(s.log_p_y_given_x)
    tokens = iter(zip(s.token_text[-s.tokens :], s.token_log_p[-s.tokens :], strict=True))
    for word, log_p in zip(s.word_text, s.word_log_p, strict=True):
        text, total = "", 0.0
        while text != word:
            token, value = next(tokens)
            text, total = text + token, total + value
        assert log_p == pytest.approx(total)


def test_entropy_and_the_whole_distribution_at_every_token(model, smol_tokenizer):
    pair, k = ("The capital of France is", " Paris, a city"), len(smol_tokenizer)
    s, = yx.score(model, smol_tokenizer, [pair], tokens=True, entropy=True, top_k=k)  # fmt: skip
    ids = smol_tokenizer("".join(pair), add_special_tokens=False)["input_ids"]
    log_p = log_softmax(model, ids)
    assert np.isnan(s.token_entropy[0])
    np.testing.assert_allclose(s.token_entropy[1:], -(log_p.exp() * log_p).sum(1), atol=1e-4)
    whole = np.empty((len(ids) - 1, k))
    np.put_along_axis(whole, s.token_top_ids[1:], s.token_top_log_p[1:], 1)
    np.testing.assert_allclose(whole, log_p, atol=1e-4)
    assert (s.token_top_ids[1:, 0] == log_p.argmax(1).numpy()).all()


def test_sums_by_segment_and_field_add_up(model, smol_tokenizer):
    chat = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]}
    s, t = yx.score(model, smol_tokenizer, [chat, ("2+2=", "4")], segments=True)
    for found in (s, t):
        assert sum(r["log_p"] for r in found.segments) == pytest.approx(found.log_p_xy, abs=1e-6)
        assert sum(r["log_p"] for r in found.segments if r["output"]) == pytest.approx(found.log_p_y_given_x)
    fields = {r["field"]: r for r in s.segments}
    assert (fields["messages[1].content"]["kind"], fields["messages[1].content"]["output"]) == (
        "answer",
        True,
    )
    assert fields["messages[0].content"]["kind"] == "user"
    assert {r["field"] for r in t.segments} == {"x", "y"}


def test_every_column_of_the_command_is_documented_and_fits_parquet(model_dir, tmp_path):  # noqa: F811
    import re
    from pathlib import Path

    import pyarrow.parquet as pq

    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"x": "a b", "y": [" c d", " e"], "gold": 0}) + "\n")
    everything = ("--tokens", "--words", "--segments", "--entropy", "--top-k", "2", "--unconditional", "So")
    for name in ("out.jsonl", "out.parquet"):
        done = ygx_score(data, "--model", model_dir, "-o", tmp_path / name, *everything)
        assert done.exit_code == 0, done.output
    records, table = lines(tmp_path / "out.jsonl"), pq.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == records
    text = (Path(__file__).parents[1] / "docs/scoring.md").read_text()
    assert set(records[0]) == set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(table.column_names)


def test_one_bad_item_does_not_end_a_run(model, smol_tokenizer):
    items = [("a", " b"), ("a", "<|im_start|>"), 4, ("c", [" d", " e"])]
    first, control, kind, last = yx.score_each(model, smol_tokenizer, items)
    assert (control.reason, kind.reason) == ("control_text", "wrong_type")
    assert (control.where.split(",")[0], kind.where) == ("item 1", "item 2")
    assert first[0].log_p_xy == pytest.approx(yx.score(model, smol_tokenizer, items[:1])[0].log_p_xy)
    assert len(last) == 2

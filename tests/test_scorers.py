"""What scorers compute of log Pr(y|x): accuracies, bits per byte, windows, words, distributions, sums by field."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_scorerun import lines, model_dir, ygx_score  # noqa: F401  (a fixture)
from tiny import llama

import ygivenx as yx
from ygivenx import reference
from ygivenx.errors import ConfigError, RowError
from ygivenx.scores.choices import Accuracy, gold_of
from ygivenx.scores.counted import word_starts
from ygivenx.scores.requests import Request, ScoredPart, rolling
from ygivenx.scores.scoring import Details, scores


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


# -- words with their ends ----------------------------------------------------------------------------------

BOS, END, A, B = 0, 1, (2, 4), (3, 5)  # of each letter the token with white space before it, and without
STARTS = (2, 3, BOS, END)
TEXTS = ("<bos>", "<end>", " a", " b", "a", "b")


def word(letters) -> list[int]:
    first, *rest = letters
    return [first[0], *(letter[1] for letter in rest)]


def next_token(model, ids: list[int]) -> torch.Tensor:
    """log p of what comes after ids, float64 [V]."""
    return log_softmax(model, [*ids, 0])[-1]


def scored_words(model, ids: list[int]):
    weights = np.ones(len(ids))
    weights[0] = 0
    sequence = yx.Sequence(ids, weights, tokens=tuple(TEXTS[i] for i in ids))
    request = Request((ScoredPart(sequence),), "".join(sequence.tokens[1:]))
    (score,) = scores(model, [request], details=Details(words=True, word_starts=STARTS))
    return score


def test_words_with_their_ends_have_the_probabilities_that_enumeration_gives():
    """Over all words of up to three letters, what is longer, and the end of the text: 1."""
    model = llama(vocab_size=6, seed=2)
    exact = copy.deepcopy(model).double()
    context = [BOS, *word((A, B))]

    def end(ids) -> float:
        return float(next_token(exact, ids).exp()[list(STARTS)].sum())

    def joint(ids) -> float:
        return math.exp(sum(float(next_token(exact, ids[:i])[ids[i]]) for i in range(len(context), len(ids))))

    total = 0.0
    for letters in (w for n in (1, 2, 3) for w in itertools.product((A, B), repeat=n)):
        ids = [*context, *word(letters)]
        expected = joint(ids) * end(ids) / end(context)
        score = scored_words(model, ids)
        assert score.word_text == (" ab", "".join(TEXTS[i] for i in word(letters)))
        assert math.exp(score.word_log_p_corrected[1]) == pytest.approx(expected, rel=1e-5)
        total += expected + (len(letters) == 3) * joint(ids) * (1 - end(ids)) / end(context)
        # The first word follows no white space's absence: it begins with a token that says so.
        first = score.word_log_p[0] + math.log(end(context)) - math.log(end([BOS]))
        assert score.word_log_p_corrected[0] == pytest.approx(first, rel=1e-5)
    stops = next_token(exact, context).exp()[[BOS, END]].sum()
    assert total + float(stops) / end(context) == pytest.approx(1, abs=1e-6)


def test_a_word_that_no_white_space_begins_and_one_whose_end_can_not_be_read():
    model = llama(vocab_size=6, seed=2, max_position_embeddings=3)
    score = scored_words(model, [BOS, A[1], B[0], A[1]])  # "a ba": four tokens, of which three can be read
    log_p = next_token(model, [BOS, A[1]]).exp()[list(STARTS)].sum().log()
    assert score.word_log_p_corrected[0] == pytest.approx(score.word_log_p[0] + float(log_p), abs=1e-5)
    assert math.isnan(score.word_log_p_corrected[1])


def test_corrected_words_of_a_real_tokenizer(model, smol_tokenizer):
    x, y = "The old man", " the boat sank"
    (score,) = yx.score(model, smol_tokenizer, [(x, y)], corrected_words=True)
    assert score.word_text == (" the", " boat", " sank")
    ids = smol_tokenizer(x + y)["input_ids"]
    texts = [smol_tokenizer.decode([i]) for i in range(len(smol_tokenizer))]
    special = set(smol_tokenizer.all_special_ids)
    starts = [i for i, t in enumerate(texts) if t[:1].isspace() or i in special]
    ends = log_softmax(model, [*ids, 0])[len(ids) - 4 :, starts].logsumexp(1).tolist()
    for k, (plain, corrected) in enumerate(zip(score.word_log_p, score.word_log_p_corrected, strict=True)):
        assert corrected == pytest.approx(plain + ends[k + 1] - ends[k], abs=1e-4)
    assert score.to_dict()["word_log_p_corrected"] == list(score.word_log_p_corrected)


@pytest.mark.full
def test_corrected_words_of_a_real_model(smol):
    """Oh & Schuler's kind of sentence: each word has its own end, and all words together are the text with its end."""
    model, tokenizer = smol
    x, y = "After the dog", " struggled the vet removed the muzzle"
    (score,) = yx.score(model, tokenizer, [(x, y)], corrected_words=True)
    starts = list(word_starts(tokenizer))
    ids = tokenizer(x + y)["input_ids"]
    with torch.no_grad():
        ends = model(torch.tensor([ids])).logits[0].log_softmax(-1)[:, starts].logsumexp(-1)
    before, after = (float(ends[len(tokenizer(text)["input_ids"]) - 1]) for text in (x, x + y))
    assert sum(score.word_log_p_corrected) == pytest.approx(score.log_p_y_given_x + after - before, abs=1e-3)
    shift = np.subtract(score.word_log_p_corrected, score.word_log_p)
    np.testing.assert_allclose(shift, np.diff(ends[-7:].tolist()), atol=1e-3)  # each word is one token


def test_a_vocabulary_without_white_space_has_no_ends_of_words():
    with pytest.raises(ConfigError, match="begins with white space"):
        word_starts(reference.word_tokenizer("a b c"))


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
    everything = [
        "--tokens",
        "--corrected-words",
        "--segments",
        "--entropy",
        "--top-k",
        "2",
        "--unconditional",
        "So",
    ]
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

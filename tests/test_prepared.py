"""The audit of prepared sets: every fault named by its rule, with the rows and without; nothing said of sound ones."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, disable_progress_bars
from museum.harness import FORGETFUL
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ygivenx import cli
from ygivenx.encoder.encode import Encoder
from ygivenx.errors import DataError
from ygivenx.proof.auditing import audit, audit_prepared
from ygivenx.proof.evidence import Evidence
from ygivenx.proof.prepared import Prepared, observed
from ygivenx.proof.rules import SEVERITIES
from ygivenx.proof.structure import Structure
from ygivenx.proof.tally import HitCounts

IGNORED = -100


@pytest.fixture(scope="module")
def rows(setup):
    """Twelve conversations of two turns with a system prompt, of GSM8K."""
    system = {"role": "system", "content": "Answer with the steps and the number, one step a line."}
    return [{"messages": [system, *r["messages"]]} for r in setup.dialogues(12)]


@pytest.fixture(scope="module")
def encoder(setup):
    return Encoder(setup.tokenizer)


@pytest.fixture(scope="module")
def good(rows, encoder):
    """input_ids and labels as our encoder makes them."""
    examples, rejected = encoder.batch(rows)
    assert not rejected
    return [{"input_ids": e.ids.tolist(), "labels": e.only.labels.tolist()} for e in examples]


# -- sets, sound and broken ---------------------------------------------------------------------------------


def each(change):
    """A fault of every row by itself: (ids, labels, tokenizer) → changed ids and labels."""

    def build(good, tokenizer):
        made = []
        for row in good:
            ids, labels = change(np.array(row["input_ids"]), np.array(row["labels"]), tokenizer)
            made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        return made

    return build


def packed(size, **columns):
    def build(good, tokenizer):
        blocks = [good[i : i + size] for i in range(0, len(good), size)]
        made = []
        for block in blocks:
            row = {k: [t for r in block for t in r[k]] for k in ("input_ids", "labels")}
            lengths = [len(r["labels"]) for r in block]
            made.append(row | {name: of(lengths) for name, of in columns.items()})
        return made

    return build


def reply_starts(labels):
    return np.flatnonzero((labels != IGNORED) & (np.append(IGNORED, labels[:-1]) == IGNORED))


def without_end(ids, labels, tokenizer):
    return ids, np.where(ids == tokenizer.eos_token_id, IGNORED, labels)


def last_turn(ids, labels, tokenizer):
    labels[: reply_starts(labels)[-1]] = IGNORED
    return ids, labels


def header_too(ids, labels, tokenizer):
    for start in reply_starts(labels):
        labels[start - 3 : start] = ids[start - 3 : start]
    return ids, labels


def no_system_prompt(ids, labels, tokenizer):
    second = np.flatnonzero(ids == ids[0])[1]
    return ids[second:], labels[second:]


def other_system_prompt(ids, labels, tokenizer):
    more = tokenizer.encode(" Detailed thinking: off.", add_special_tokens=False)
    at = int(np.flatnonzero(ids == tokenizer.eos_token_id)[0])
    return np.insert(ids, at, more), np.insert(labels, at, [IGNORED] * len(more))


def newline_too(ids, labels, tokenizer):
    after = np.append(False, labels[:-1] == tokenizer.eos_token_id)
    return ids, np.where(after, ids, labels)


def first_words_lost(ids, labels, tokenizer):
    for start in reply_starts(labels):
        labels[start : start + 4] = IGNORED
    return ids, labels


def slipped(ids, labels, tokenizer):
    trained = np.append([False] * 8, labels[:-8] != IGNORED)
    return ids, np.where(trained, ids, IGNORED)


def system_too(ids, labels, tokenizer):
    end = int(np.flatnonzero(ids == tokenizer.eos_token_id)[0])
    labels[: end + 1] = ids[: end + 1]
    return ids, labels


def first_turn(ids, labels, tokenizer):
    labels[reply_starts(labels)[1] :] = IGNORED
    return ids, labels


def ends_alone(ids, labels, tokenizer):
    return ids, np.where(ids == tokenizer.eos_token_id, labels, IGNORED)


def cut_into_blocks(good, tokenizer, size=200):
    row = {k: [t for r in good for t in r[k]] for k in ("input_ids", "labels")}
    starts = range(0, len(row["labels"]), size)
    return [{k: v[i : i + size] for k, v in row.items()} for i in starts]


def half_without_labels(good, tokenizer):
    return [r | ({"labels": [IGNORED] * len(r["labels"])} if i % 2 else {}) for i, r in enumerate(good)]


def with_bos(ids, labels, tokenizer):
    return np.insert(ids, 0, tokenizer.bos_token_id), np.insert(labels, 0, IGNORED)


def positions(lengths):
    return [i for n in lengths for i in range(n)]


def numbers(lengths):
    return [k for k, n in enumerate(lengths, 1) for _ in range(n)]


def padded(good, tokenizer):
    width = max(len(r["labels"]) for r in good)
    pad = [width - len(r["labels"]) for r in good]
    return [
        {
            "input_ids": r["input_ids"] + [tokenizer.pad_token_id] * n,
            "labels": r["labels"] + [IGNORED] * n,
            "attention_mask": [1] * len(r["labels"]) + [0] * n,
        }
        for r, n in zip(good, pad, strict=True)
    ]


def padding_trained(good, tokenizer):
    made = padded(good, tokenizer)
    for row in made:
        end = sum(row["attention_mask"])
        row["labels"][end:] = row["input_ids"][end:]
    return made


def masks(name, trained=True):
    return lambda good, _: [
        {"input_ids": r["input_ids"], name: [int((x != IGNORED) == trained) for x in r["labels"]]}
        for r in good
    ]


# Made for torchtune, whose mask is true where nothing is trained.
def torchtune(good, _):
    return [{"tokens": r["input_ids"], "mask": [x == IGNORED for x in r["labels"]]} for r in good]


BROKEN = {
    "everything is trained": ("loss-on-x", each(lambda ids, labels, t: (ids, ids.copy()))),
    "no labels at all": ("loss-on-x", lambda good, _: [{"input_ids": r["input_ids"]} for r in good]),
    "ends are masked": ("end-untrained", each(without_end)),
    "headers are trained": ("prompt-header-trained", each(header_too)),
    "labels are shifted by hand": ("shifted-labels", each(lambda i, x, t: (i, np.append(x[1:], IGNORED)))),
    "nothing is trained": ("nothing-trained", each(lambda i, x, t: (i, np.full_like(x, IGNORED)))),
    "the last turn alone": ("only-last-turn", each(last_turn)),
    "beginnings of replies are lost": ("y-untrained", each(first_words_lost)),
    "two BOS": ("doubled-bos", each(with_bos)),
    "no system prompt": ("context-differs", each(no_system_prompt)),
    "another system prompt": ("context-differs", each(other_system_prompt)),
    "cut at the end": ("y-truncated", each(lambda i, x, t: (i[:-9], x[:-9]))),
    "cut at the beginning": ("document-cut", each(lambda i, x, t: (i[50:], x[50:]))),
    "padding is trained": ("padding-trained", padding_trained),
    "everything is trained, packed": (
        "loss-on-x",
        lambda good, t: packed(3, position_ids=positions)(each(lambda i, x, t: (i, i.copy()))(good, t), t),
    ),
    "spans slip to the right": ("loss-on-x", each(slipped)),
    "system prompts are trained": ("loss-on-x", each(system_too)),
    "the first turn alone": ("y-untrained", each(first_turn)),
    "ends alone": ("y-untrained", each(ends_alone)),
    "half of the rows have no label": ("nothing-trained", half_without_labels),
    "cut into blocks": ("document-cut", cut_into_blocks),
    "ends are masked, packed": (
        "end-untrained", lambda good, t: packed(3, position_ids=positions)(each(without_end)(good, t), t),
    ),
    "headers are trained, as a mask": (
        "prompt-header-trained", lambda good, t: masks("loss_mask")(each(header_too)(good, t), t),
    ),
    "a mask inverted": ("loss-on-x", masks("loss_mask", trained=False)),
}  # fmt: skip
SOUND = {
    "labels": lambda good, _: good,
    "padded": padded,
    "packed with positions": packed(4, position_ids=positions),
    "packed with lengths": packed(4, seq_lengths=list),
    "packed with numbered masks": packed(4, attention_mask=numbers),
    "packed without a word": packed(4),
    "loss_mask": masks("loss_mask"),
    "completion_mask": masks("completion_mask"),
    "assistant_masks": masks("assistant_masks"),
    "weights": masks("weights"),
    "torchtune's mask": torchtune,
}
# What needs the rows: of ids alone it can't be known.
WITH_ROWS_ALONE = {
    "the last turn alone", "no system prompt", "another system prompt", "cut at the end", "cut at the beginning",
    "the first turn alone", "cut into blocks",
}  # fmt: skip


def prepare(tmp_path, records):
    disable_progress_bars()
    Dataset.from_list(records).save_to_disk(tmp_path / "prepared")
    return Prepared(tmp_path / "prepared")


def above_info(report):
    return {f.rule for f in report.findings if f.severity != SEVERITIES[-1]}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_set_is_named_by_its_rule(name, rows, good, encoder, tmp_path):
    rule, build = BROKEN[name]
    prepared = prepare(tmp_path, build(good, encoder.tokenizer))
    report = audit_prepared(prepared, rows, encoder)
    assert rule in above_info(report), str(report)
    worst = {f.rule for f in report.findings if f.severity == report.findings[0].severity}
    assert all(name in report.summary["verdict"] for name in worst)
    assert report.summary["rows recognised"].split(" of ")[0] != "0"
    alone = audit_prepared(prepared, tokenizer=encoder.tokenizer)
    assert (rule in above_info(alone)) == (name not in WITH_ROWS_ALONE), str(alone)


@pytest.mark.parametrize("name", SOUND)
def test_of_a_sound_set_nothing_is_said(name, rows, good, encoder, tmp_path):
    prepared = prepare(tmp_path, SOUND[name](good, encoder.tokenizer))
    for report in (
        audit_prepared(prepared, rows, encoder),
        audit_prepared(prepared, tokenizer=encoder.tokenizer),
    ):
        assert not above_info(report), str(report)
        assert report.summary["verdict"] == "sound: nothing above info"
    if name == "labels":
        assert not audit_prepared(prepared, rows, encoder).findings


def test_parts_add_up_to_the_whole(rows, good, encoder, tmp_path, monkeypatch):
    """Read in parts of two rows, the findings are those of all rows at once."""
    records = each(without_end)(good[:7], encoder.tokenizer) + each(header_too)(good[7:], encoder.tokenizer)
    prepared = prepare(tmp_path, records)
    whole = audit_prepared(prepared, rows, encoder)
    monkeypatch.setattr("ygivenx.proof.prepared_audit.CHUNK", 2)
    parts = audit_prepared(prepared, rows, encoder)
    assert [(f.rule, f.count, f.share) for f in parts.findings] == [
        (f.rule, f.count, f.share) for f in whole.findings
    ]
    assert parts.summary == whole.summary


def test_the_slow_way_says_the_same(rows, good, encoder, tmp_path):
    """Rows as a batch go through the audit that compares every token with every example."""
    records = each(without_end)(good, encoder.tokenizer)
    fast = audit_prepared(prepare(tmp_path, records), rows, encoder)
    slow = audit(rows, encoder, batch=[{k: np.array([v]) for k, v in r.items()} for r in records])
    told = [(f.rule, f.count, f.share) for f in fast.findings]
    assert told == [(f.rule, f.count, f.share) for f in slow.findings]


def test_it_is_one_argument_of_the_audit(rows, good, encoder, tmp_path):
    prepared = prepare(tmp_path, each(without_end)(good, encoder.tokenizer))
    for given in (rows, None):
        report = audit(given, encoder, labels=prepared.name)
        assert above_info(report) == {"end-untrained"}, str(report)


def test_rows_that_are_alike_are_found_once_each(rows, good, encoder, tmp_path):
    report = audit_prepared(prepare(tmp_path, [good[0], *good]), [rows[0], *rows], encoder)
    assert "rows-missing" not in {f.rule for f in report.findings}


def test_rows_that_no_prepared_row_holds_are_counted(rows, good, encoder, tmp_path):
    report = audit_prepared(prepare(tmp_path, good[:9]), rows, encoder)
    (finding,) = report.findings
    assert (finding.rule, finding.severity, finding.count, finding.share) == ("rows-missing", "info", 3, 0.25)


def test_rows_that_repeat_or_contradict_one_another_are_named(rows, good, encoder, tmp_path):
    """By the set itself, with the rows and without."""
    turn = [{"messages": r["messages"][:3]} for r in rows]
    other = {"messages": [*turn[3]["messages"][:2], {"role": "assistant", "content": "I don't know."}]}
    given = [*turn, turn[0], other]
    examples, _ = encoder.batch(given)
    records = [{"input_ids": e.ids.tolist(), "labels": e.only.labels.tolist()} for e in examples]
    prepared = prepare(tmp_path, records)
    for report in (
        audit_prepared(prepared, given, encoder),
        audit_prepared(prepared, tokenizer=encoder.tokenizer),
    ):
        found = {f.rule: f for f in report.findings}
        assert above_info(report) == {"conflicting-answers"}, str(report)
        assert found["duplicates"].examples[0]["where"] == "prepared rows 0, 12"
        assert found["conflicting-answers"].count == 2
        assert found["conflicting-answers"].examples[0]["where"] == "prepared rows 3, 13"
        assert "I don't know." in found["conflicting-answers"].examples[0]["text"]


# -- causes -------------------------------------------------------------------------------------------------


def test_a_message_of_weight_0_that_is_trained_is_a_weight_ignored(rows, good, encoder, tmp_path):
    weighted = [{"messages": [dict(m) for m in r["messages"]]} for r in rows]
    for row in weighted:
        row["messages"][2]["weight"] = 0
    report = audit_prepared(prepare(tmp_path, good), weighted, encoder)
    assert above_info(report) == {"weights-ignored"}, str(report)


OFF = "{% if enable_thinking is defined and not enable_thinking %}[no thought]\n{% endif %}"
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}" + OFF
    + "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + OFF + "{% endif %}"
)  # fmt: skip


def test_rows_that_are_right_in_another_mode_are_named_so(setup, tmp_path):
    """Prepared with thinking switched off, while inference by default doesn't."""
    tokenizer, rows = setup.tok(THINKING), setup.chats(6)
    examples, rejected = Encoder(tokenizer, template_kwargs={"enable_thinking": False}).batch(rows)
    assert not rejected
    records = [{"input_ids": e.ids.tolist(), "labels": e.only.labels.tolist()} for e in examples]
    report = audit_prepared(prepare(tmp_path, records), rows, Encoder(tokenizer))
    assert not above_info(report), str(report)
    assert "enable_thinking=False" in next(f.message for f in report.findings if f.rule == "another-mode")


def test_history_in_another_context_is_a_context_that_differs(setup, tmp_path):
    """The template forgets earlier reasoning; the set is one rendering with all replies trained."""
    tokenizer, rows = setup.tok(FORGETFUL), setup.dialogues(6)
    for row in rows:
        for message in row["messages"][1::2]:
            message["content"] = "<think>\nStep by step, then.\n</think>\n" + message["content"]
    whole = Encoder(tokenizer, context="rendered", dropped="warn").batch(rows)[0]
    records = []
    for example in whole:
        labels = example.only.labels.copy()
        history = np.zeros(len(labels), bool)
        for g in example.only.segments:
            history[g.start : g.stop] = g.kind == "answer"
        records.append(
            {"input_ids": example.ids.tolist(), "labels": np.where(history, example.ids, labels).tolist()}
        )
    report = audit_prepared(prepare(tmp_path, records), rows, Encoder(tokenizer))
    assert "context-differs" in above_info(report), str(report)
    assert "prompt-header-trained" not in above_info(report), str(report)


def test_refused_rows_are_audited_for_loss_on_x(setup, tmp_path):
    """The template drops calls, so that nothing is proven of y; the questions are x all the same."""
    tokenizer, rows = setup.tok(), setup.tool_chats(6)
    texts = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in rows]
    records = [{"input_ids": tokenizer.encode(t, add_special_tokens=False)} for t in texts]
    report = audit_prepared(prepare(tmp_path, records), rows, Encoder(tokenizer))
    assert {"field-dropped", "loss-on-x"} <= above_info(report), str(report)
    assert "audited-for-x-alone" in {f.rule for f in report.findings}
    assert not {"y-untrained", "end-untrained", "context-differs"} & above_info(report)


# -- files --------------------------------------------------------------------------------------------------


def test_what_holds_nothing_is_no_sound_set(good, encoder, tmp_path):
    """Rows that are none, and a set of which none are read."""
    prepared = prepare(tmp_path, good)
    assert above_info(audit_prepared(prepared, [], encoder)) >= {"nothing-read"}
    prepared.limit = 0
    report = audit_prepared(prepared, tokenizer=encoder.tokenizer)
    assert report.summary["verdict"] == "1 error: nothing-read"
    assert above_info(audit([], encoder)) == {"nothing-read"}
    (tmp_path / "p.jsonl").touch()
    with pytest.raises(DataError, match="it holds no row"):
        Prepared(tmp_path / "p.jsonl")


def test_a_file_without_ids_is_refused_by_its_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="its columns are text"):
        Prepared(tmp_path / "a.jsonl")


def test_rows_that_do_not_fit_are_counted_and_the_rest_is_audited(good, encoder, tmp_path):
    broken = [{"input_ids": [1, 2], "labels": [1]}, {"input_ids": "abc"}, {"input_ids": []}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*good, *broken])))
    report = audit_prepared(Prepared(tmp_path / "p.jsonl"), tokenizer=encoder.tokenizer)
    assert report.summary["prepared rows"] == 15
    assert report.summary["unreadable"] == 3
    assert above_info(report) == {"rows-quarantined"}


def test_parquet_says_the_same_as_json_lines(good, encoder, tmp_path):
    pq.write_table(pa.Table.from_pylist(good), tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, good)))
    one, other = (list(Prepared(tmp_path / name)) for name in ("p.parquet", "p.jsonl"))
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.weight, b.weight)


def test_a_first_token_is_never_a_target():
    seen = observed({"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]})
    assert seen.trained.tolist() == [False, True, False, True]
    assert seen.documents.tolist() == [0, 0, 1, 1]


def test_a_reply_that_is_context_is_no_fault_of_ids_alone(setup, good):
    """A reply of which nothing is trained may be meant so."""
    labels = np.array(good[0]["labels"])
    labels[: reply_starts(labels)[-1]] = IGNORED
    seen = observed({"input_ids": good[0]["input_ids"], "labels": labels.tolist()})
    assert Structure(setup.tokenizer).mark(seen)
    assert np.isnan(seen.expected[seen.output]).any()
    assert (seen.expected[seen.trained] == 1).all()


def test_an_empty_thought_before_a_reply_is_no_header():
    """Qwen3's template writes it where the model would: ids alone can't tell whose it is."""
    folder = Path(__file__).parents[1] / ".tokenizers" / "qwen3"
    if not folder.is_dir():
        pytest.skip("make tokenizers")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    asked = len(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False))
    for start, rule in ((asked, None), (asked + 4, None), (asked - 3, "prompt-header-trained")):
        labels = [IGNORED] * start + ids[start:-1] + [IGNORED]
        seen = observed({"input_ids": ids, "labels": labels})
        assert Structure(tokenizer).mark(seen)
        tally = HitCounts()
        tally.add(Evidence(labels=[seen], tokenizer=tokenizer), leave_out=["rows-unrecognised"])
        assert [f.rule for f in tally.findings()] == [rule] * (rule is not None), start


# -- the command --------------------------------------------------------------------------------------------


def test_the_command_and_its_files(rows, good, setup, tmp_path):
    model = tmp_path / "tokenizer"
    setup.tokenizer.save_pretrained(model)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(tmp_path, each(without_end)(good, setup.tokenizer))
    common = [
        "--labels",
        str(tmp_path / "prepared"),
        "--model",
        str(model),
        "--junit",
        str(tmp_path / "j" / "a.xml"),
    ]
    result = CliRunner().invoke(cli.app, ["audit", str(tmp_path / "rows.jsonl"), *common])
    assert result.exit_code == 1, result.output
    assert result.output.index("verdict: 1 error: end-untrained") < result.output.index(
        "error [end-untrained]"
    )
    suite = ElementTree.parse(tmp_path / "j" / "a.xml").getroot()
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    assert failed == ["end-untrained"]
    assert suite.get("failures") == "1"
    alone = CliRunner().invoke(cli.app, ["audit", *common, "--json"])
    assert alone.exit_code == 1
    assert json.loads(alone.stdout)["summary"]["x and y by"] == "the template's headers"
    nothing = CliRunner().invoke(cli.app, ["audit", "--model", str(model)])
    assert "nothing to audit" in str(nothing.exception)

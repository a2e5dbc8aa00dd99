"""Files for other trainers, read back by our own reader, plain torch, datasets and TRL's own preparation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from templates.conversations import reply, user
from test_chats import CHATML, encoder
from test_token_rows import Counting
from typer.testing import CliRunner

from ygivenx import PreferenceEncoder
from ygivenx.cli import app
from ygivenx.encoded import tables
from ygivenx.errors import ConfigError
from ygivenx.rows.data import read
from ygivenx.rows.export import FORMS, RATED, unfit, write_examples, write_tables
from ygivenx.rows.formats import normalise
from ygivenx.rows.nouns import Rated

LOGGED = {
    "prompt_token_ids": [5, 6, 7], "token_ids": [8, 9, 10, 11], "loss_mask": [1, 0, 1, 1],
    "logprobs": [-0.5, None, -0.25, -1.0], "reward": 2.0,
}  # fmt: skip
CHATS = [{"messages": [user(), reply()]}, {"messages": [user(), reply("one"), user(), reply("two")]}]
PAIRS = [
    {"prompt": [user("2+2?")], "chosen": [reply("4")], "rejected": [reply("five")]},
    {"prompt": [user("1+1?")], "responses": ["2", "3", "4"], "scores": [2, 0, 1]},
]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("form", sorted(set(FORMS) - {*RATED}))
def test_a_form_is_read_back_to_the_same_ids_and_weights(tmp_path, form, suffix):
    examples, _ = encoder(CHATML).batch([*CHATS, LOGGED])
    path = tmp_path / f"out{suffix}"
    assert write_examples(examples, path, form) == (3, 0)
    for row, example in zip(read(path), examples, strict=True):
        np.testing.assert_array_equal(row.value.ids, example.ids)
        np.testing.assert_array_equal(row.value.weights, example.weights)
    if form in ("skyrl", "verl"):
        logged = normalise(LOGGED)
        trained = logged.weights > 0
        np.testing.assert_array_equal(row.value.log_probs[trained], logged.log_probs[trained])
        assert row.value.log_probs[4] == 0  # of a token that the model didn't produce
        assert row.value.reward == logged.reward == 2.0


def test_ids_are_handed_over_without_a_tokenizer(tmp_path, monkeypatch):
    encode, texts, kind = encoder(CHATML), [], type(encoder(CHATML).tokens)
    whole = kind.encode_cut

    def counted(self, given):
        texts.extend(given := list(given))
        return whole(self, given)

    monkeypatch.setattr(kind, "encode_cut", counted)
    counting = Counting(encode.tokenizer)
    monkeypatch.setattr(encode.tokens, "tokenizer", counting)
    for n, form in enumerate(f for f in FORMS if f not in RATED):
        write_examples([encode(LOGGED)], tmp_path / f"{n}.jsonl", form)
        (row,) = read(tmp_path / f"{n}.jsonl")
        assert encode(row).ids.tolist() == [*LOGGED["prompt_token_ids"], *LOGGED["token_ids"]]
    assert (texts, counting.calls) == ([], 0)
    encode(CHATS[0])
    assert texts, "the count can rise"


def test_our_own_columns_keep_what_was_logged(tmp_path):
    row = LOGGED | {"advantages": [1.5, 0, -0.5, 2]}
    examples, _ = encoder(CHATML).batch([*CHATS, row])
    write_tables(tables(examples), tmp_path / "out.parquet")
    *chats, again = (r.value for r in read(tmp_path / "out.parquet"))
    logged = normalise(row)
    np.testing.assert_array_equal(again.ids, logged.ids)
    np.testing.assert_array_equal(again.log_probs, logged.log_probs)
    np.testing.assert_array_equal(again.advantages, logged.advantages)
    assert again.reward == logged.reward
    assert all(c.log_probs is c.advantages is c.reward is None for c in chats)


@pytest.mark.parametrize("form", RATED)
def test_rated_replies_are_read_back_as_rated(tmp_path, form):
    examples, _ = PreferenceEncoder(encoder(CHATML)).batch(PAIRS)
    path = tmp_path / "out.jsonl"
    write_examples(examples, path, form)
    again = [row.value if isinstance(row.value, Rated) else row.value.rated for row in read(path)]
    if form == "trl-pairs":
        expected = [(e.replies[a], e.replies[b]) for e in examples for a, b in e.pairs]
        assert [r.rewards for r in again] == [(1, -1)] * (1 + 3)
    else:
        expected = [(r,) for e in examples for r in e.replies]
        assert [r.rewards for r in again] == [(1,), (-1,), (1,), (-1,), (1,)]
    for rated, replies in zip(again, expected, strict=True):
        for noun, done in zip(rated.replies, replies, strict=True):
            stop = int(np.flatnonzero(done.weights)[-1]) + 1  # after the end of turn: left out
            np.testing.assert_array_equal(noun.ids, done.ids[:stop])
            np.testing.assert_array_equal(noun.weights, done.weights[:stop])


def test_trls_collators_build_the_same_batches(tmp_path):
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    examples, _ = PreferenceEncoder(encoder(CHATML)).batch(PAIRS[:1])
    sides = examples[0].replies
    for form, collator in (
        ("trl-pairs", DataCollatorForPreference),
        ("trl-kto", DataCollatorForUnpairedPreference),
    ):
        write_examples(examples, tmp_path / form, form)
        batch = collator(pad_token_id=0)(pq.read_table(tmp_path / form).to_pylist())
        for ids, mask, side in zip(batch["input_ids"], batch["completion_mask"], sides, strict=True):
            stop = int(np.flatnonzero(side.weights)[-1]) + 1
            assert ids[:stop].tolist() == side.ids[:stop].tolist()
            assert mask[:stop].tolist() == (side.weights[:stop] > 0).tolist()
            assert mask[stop:].sum() == 0


@pytest.mark.filterwarnings("ignore")
def test_trls_trainer_takes_the_labels_without_a_tokenizer(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tiny import llama

    encode = encoder(CHATML)
    examples, _ = encode.batch([*CHATS, LOGGED])
    write_examples(examples, tmp_path / "out.parquet", "trl")
    data = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path))
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=3)
    trainer = trl.SFTTrainer(
        llama(vocab_size=len(encode.tokenizer)), args, train_dataset=data, processing_class=encode.tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    rows = sorted(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))
    ours = sorted((e.ids.tolist(), e.only.labels.tolist()) for e in examples)
    for (ids, labels), (our_ids, our_labels) in zip(rows, ours, strict=True):
        assert (ids[: len(our_ids)], labels[: len(our_ids)]) == (our_ids, our_labels)
        assert set(labels[len(our_ids) :]) <= {-100}


def loaded(tmp_path, form: str) -> tuple[list[dict], list[Any]]:
    """Rows that were written in a form, as JSON, and what they were written from."""
    examples, _ = encoder(CHATML).batch(
        [LOGGED, LOGGED | {"token_ids": [8], "loss_mask": [1], "logprobs": [-2]}]
    )
    write_examples(examples, tmp_path / "out.jsonl", form)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], examples


def test_torchtunes_collator_takes_the_rows(tmp_path):
    data = pytest.importorskip("torchtune.data", exc_type=ImportError)
    rows, examples = loaded(tmp_path, "torchtune")
    batch = data.padded_collate_sft(rows, padding_idx=0)
    for ids, labels, example in zip(batch["tokens"], batch["labels"], examples, strict=True):
        assert ids[: len(example.ids)].tolist() == example.ids.tolist()
        assert labels[: len(example.ids)].tolist() == example.only.labels.tolist()
        assert set(labels[len(example.ids) :].tolist()) <= {-100}


def test_skyrls_validation_takes_the_rows(tmp_path):
    utils = pytest.importorskip("skyrl.train.utils.trainer_utils", exc_type=ImportError)
    rows, _ = loaded(tmp_path, "skyrl")
    utils.validate_generator_output(len(rows), {c: [row[c] for row in rows] for c in rows[0]})


def test_verls_output_takes_the_rows(tmp_path):
    module = pytest.importorskip("verl.experimental.agent_loop.agent_loop", exc_type=ImportError)
    rows, examples = loaded(tmp_path, "verl")
    for row, example in zip(rows, examples, strict=True):
        given = module.AgentLoopOutput(**row, metrics={}).as_dict()
        trained = example.weights > 0
        assert torch.cat((given["prompts"], given["responses"])).tolist() == example.ids.tolist()
        assert given["response_mask"].tolist() == trained[len(given["prompts"]) :].tolist()
        np.testing.assert_array_equal(
            given["rollout_log_probs"][given["response_mask"] > 0], example.only.logged.log_probs[trained]
        )


def test_what_a_form_cannot_hold_is_said(tmp_path):
    heavy = encoder(CHATML)({"messages": [user(), reply("4", weight=0.5)]})
    assert write_examples([heavy], tmp_path / "out.jsonl", "trl").reweighted == 1
    tool = {"prompt_ids": [1], "completion_ids": [2, 3, 4], "completion_mask": [1, 0, 1], "label": True}
    rated = PreferenceEncoder(encoder(CHATML))(tool)
    assert unfit(rated, "trl-kto").reason == "unfit_form"
    unlogged = encoder(CHATML)(LOGGED | {"logprobs": [-0.5, None, None, -1.0]})
    assert [unfit(unlogged, form).reason for form in ("skyrl", "verl")] == ["unfit_form"] * 2
    assert unfit(unlogged, "trl") is unlogged
    with pytest.raises(ConfigError, match="did you mean 'skyrl'"):
        write_examples([], tmp_path / "out.jsonl", "skyrll")


def test_every_form_has_a_line_in_the_documentation_that_is_read():
    text = (Path(__file__).parents[1] / "docs/handover.md").read_text()
    lines = dict(re.findall(r"^\| (\S+) \| `(\{.*?\})` \|", text, re.M))
    assert lines.keys() == FORMS.keys()
    for form, line in lines.items():
        row = json.loads(line)
        assert row.keys() == FORMS[form].keys()
        noun = normalise(row)
        noun = getattr(noun, "rated", noun)
        assert (noun.replies[0] if form in RATED else noun).ids.tolist() == [1, 2, 3, 4]


def test_the_command_writes_a_form(tmp_path):
    from test_finetune import model_in

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in PAIRS[:1] + CHATS[:1]))
    settings = [
        "encode",
        str(rows),
        "--model",
        model_in(tmp_path / "model"),
        "-o",
        str(tmp_path / "out.jsonl"),
    ]
    done = CliRunner().invoke(app, [*settings, "--to", "trl-pairs", "--json"])
    assert done.exit_code == 0, done.output
    account = json.loads(done.stdout)
    assert (account["sequences"], account["quarantined"]) == (1, 1)
    assert json.loads((tmp_path / "out.jsonl").read_text()).keys() == {
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
    }

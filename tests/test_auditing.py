"""The audit's plumbing: reports, suppressions, exit codes, alignment, and a rehearsal that leaves no trace."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from museum.harness import MARKED
from templates.conversations import call, calls, reply, user
from test_chats import CHATML, HEADER_WITH_THE_REPLY
from test_chats import encoder as chats_encoder
from tiny import VOCAB, llama, sequences
from transformers import DataCollatorForSeq2Seq, Trainer

from ygivenx.encoder.encode import Encoder
from ygivenx.errors import ConfigError, LossError
from ygivenx.forest import Forest
from ygivenx.objective import loss
from ygivenx.proof.alignment import Library
from ygivenx.proof.auditing import Finding, Report, _rows_of, audit
from ygivenx.proof.evidence import (
    Evaluation,
    Evidence,
    ObservedRow,
    mark_padding,
    seen_in_batch,
    seen_in_forest,
)
from ygivenx.proof.probing import probe
from ygivenx.proof.rehearsal import rehearse, untouched
from ygivenx.proof.rules import RULES, SEVERITIES
from ygivenx.rows.data import read
from ygivenx.sequence import Example

# Trainers of other libraries warn of their own plans; warnings of ours are tested where they are made.
pytestmark = pytest.mark.filterwarnings("ignore")
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def report(setup):
    """TRL's default on chats: loss on x, headers and what follows the end."""
    rows = setup.chats(6)
    return setup.audit(setup.sft(rows), rows)


def batch_of(sequences, labels=None):
    """A padded batch as collators make it."""
    width = max(map(len, sequences))
    pad = lambda values, fill: [*values, *[fill] * (width - len(values))]  # noqa: E731
    labels = [s.labels for s in sequences] if labels is None else labels
    return {
        "input_ids": torch.tensor([pad(s.ids, 0) for s in sequences]),
        "attention_mask": torch.tensor([pad([1] * len(s), 0) for s in sequences]),
        "labels": torch.tensor([pad(lab, -100) for lab in labels]),
    }


# -- the report ---------------------------------------------------------------------------------------------


def test_findings_are_located_and_explained(report):
    finding = report.findings[0]
    assert finding.rule == "loss-on-x"
    assert finding.severity == "error"
    assert len(finding.examples) == 2  # one for each row
    assert "⟦" in finding.examples[0]["text"]
    assert "micro-batch 0, row 0" in finding.examples[0]["where"]
    assert finding.why
    assert finding.fix
    ranks = [SEVERITIES.index(f.severity) for f in report.findings]
    assert ranks == sorted(ranks)
    assert report.summary["trained tokens by"] == "the gradient of a step"
    assert report.summary["accepted"] + report.summary["quarantined"] == report.summary["rows"]


def test_exit_codes(report, setup):
    assert [report.exit_code(level) for level in SEVERITIES] == [1, 1, 1]
    rows = setup.chats(3)
    clean = setup.audit(rows=rows)
    assert [clean.exit_code(level) for level in SEVERITIES] == [0, 0, 0]
    with pytest.raises(ConfigError, match="did you mean 'warning'"):
        report.exit_code("warn")


def test_json_and_sarif_say_the_same(report):
    told = json.loads(report.to_json())
    assert [f["rule"] for f in told["findings"]] == [f.rule for f in report.findings]
    sarif = json.loads(report.to_sarif())
    (run,) = sarif["runs"]
    assert sarif["version"] == "2.1.0"
    assert {r["id"] for r in run["tool"]["driver"]["rules"]} == set(RULES)
    assert [r["ruleId"] for r in run["results"]] == [f.rule for f in report.findings]
    assert {r["level"] for r in run["results"]} <= {"error", "warning", "note"}


def test_the_page(report, tmp_path):
    path = report.to_html(tmp_path / "sub" / "audit.html")
    text = path.read_text()
    assert "loss-on-x" in text
    assert "default-src 'none'" in text


def test_suppressions_need_a_rule_and_a_reason(setup):
    rows = setup.chats(3)
    batch = batch_of(sequences(2))
    again = [*rows, rows[0]]
    found = setup.audit(rows=again)
    assert [f.rule for f in found.findings] == ["duplicates"]
    quiet_one = setup.audit(rows=again, suppress={"duplicates": "one row is meant twice"})
    assert quiet_one.findings == ()
    assert quiet_one.suppressed[0][1] == "one row is meant twice"
    assert quiet_one.exit_code("info") == 0
    (result,) = json.loads(quiet_one.to_sarif())["runs"][0]["results"]
    assert result["suppressions"][0]["justification"] == "one row is meant twice"
    with pytest.raises(ConfigError, match="did you mean 'duplicates'"):
        audit(batch=batch, suppress={"duplicate": "x"})
    with pytest.raises(ConfigError, match="has no reason"):
        audit(batch=batch, suppress={"duplicates": " "})


TWICE = "+ m['content'] + ('<|im_end|>\n<|im_start|>assistant\n' + m.again if m.again else '') +"
CALLED = "m['content'] ~ (m.tool_calls[0].function.arguments if m.tool_calls else '')"


@pytest.mark.parametrize(
    ("rule", "template", "messages", "fix"),
    [
        (
            "stop-inside-reply",
            CHATML.replace("+ m['content'] +", TWICE),
            [user(), reply("A.", again="B.")],
            "Split",
        ),
        ("reply-unasked", HEADER_WITH_THE_REPLY, [user(), reply("First."), reply("Second.")], "weight 0"),
        (
            "arguments-not-json",
            CHATML.replace("m['content']", CALLED),
            [user(), calls(call(arguments='{"rain": true}'))],
            "arguments_as_text",
        ),
    ],
)
def test_a_refusal_of_the_contract_has_a_rule_with_its_fix(rule, template, messages, fix):
    report = audit([{"messages": messages}], chats_encoder(template, repair="none"))
    (finding,) = report.findings
    assert finding.rule == rule
    assert fix in finding.fix
    assert "messages[" in finding.examples[0]["where"]


def test_an_unnamed_refusal_says_what_to_do():
    (finding,) = audit([{"messages": [user(), reply()]}, {"nonsense": 1}], chats_encoder()).findings
    assert finding.rule == "rows-quarantined"
    assert "(fix: " in finding.examples[0]["text"]


def test_an_empty_reply_is_named():
    """The encoder takes it: its end alone is y."""
    rows = [{"messages": [user(), reply("")]}, {"messages": [user("Hi"), reply()]}]
    (finding,) = audit(rows, chats_encoder()).findings
    assert (finding.rule, finding.count, finding.examples[0]["where"]) == ("y-empty", 1, "row 0")


def test_places_are_rows_of_the_file(tmp_path):
    """Not of those that were accepted."""
    row = {"messages": [user(), reply()]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ({"messages": []}, row, {"messages": []}, row)))
    (again,) = [f for f in audit(read(path), chats_encoder()).findings if f.rule == "duplicates"]
    assert again.examples == ({"where": "rows 1, 3"},)


def test_scores_of_a_file_are_held_against_each_other(tmp_path):
    """As `ygx audit scores.jsonl` reads them; a score that is no number is null there."""
    row = {"x": "a", "y": "b", "log_p_x": -5.0}
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row | {"log_p_xy": v}) + "\n" for v in (None, -9.0, -3.0)))
    found = {f.rule: f for f in audit(read(path), chats_encoder()).findings}
    assert found["joint-above-marginal"].count == 1
    assert found["joint-above-marginal"].examples[0]["where"] == "row 2"


def test_an_evaluation_loss_of_nothing():
    (rule,) = (r for name, r in RULES.items() if name == "evaluation-divides-differently")
    assert list(rule.check(Evidence(evaluation=Evaluation(0.0, 0.0)))) == []
    (hit,) = rule.check(Evidence(evaluation=Evaluation(0.5, 0.0)))
    assert hit.share is None


def test_targets_that_are_one_token_are_named(setup):
    """A mask of zeros, where the loss ignores −100."""
    rows = setup.chats(2)
    features = [{**f, "labels": [0 if t == -100 else t for t in f["labels"]]} for f in setup.encoded(rows)]
    report = setup.audit(setup.hf(features), rows)
    (shifted,) = [f for f in report.findings if f.rule == "shifted-labels"]
    assert shifted.examples[0]["where"] == "100% of them"
    assert "the one token" in shifted.examples[0]["text"]
    assert "−100" in shifted.fix


def test_every_rule_is_documented():
    text = (DOCS / "audit.md").read_text()
    assert [name for name in RULES if f"`{name}`" not in text] == []


# -- evidence ---------------------------------------------------------------------------------------------


def test_a_batch_is_judged_by_its_labels():
    data = sequences(3)
    batch = batch_of(data, [s.ids for s in data])
    batch["labels"][batch["attention_mask"] == 0] = 0  # trained padding
    without_rows = {"rows-unrecognised": "there are none"}
    assert {f.rule for f in audit(batch=batch, suppress=without_rows).findings} == {"padding-trained"}
    assert audit(batch=batch_of(data), suppress=without_rows).findings == ()
    empty = batch_of(data, [np.full(len(s), -100) for s in data])
    assert [f.rule for f in audit(batch=empty, suppress=without_rows).findings] == ["nothing-trained"]


def test_a_batch_of_unknown_rows_is_no_clean_bill(setup):
    """Token ids alone: what the headers tell is a finding, and that it is no more than that is said."""
    rows = setup.chats(4)
    encoder = Encoder(setup.tokenizer)
    features = [{"input_ids": f["input_ids"], "labels": f["input_ids"]} for f in setup.encoded(rows)]
    blind = audit(trainer=setup.hf(features))
    told = {(f.rule, f.severity) for f in blind.findings}
    assert told >= {
        ("rows-unrecognised", "warning"),
        ("loss-on-x", "error"),
        ("prompt-header-trained", "warning"),
    }
    assert blind.summary["rows recognised"] == "0 of 2"
    assert blind.exit_code() == 1
    told = audit(rows, encoder, trainer=setup.hf(features))
    assert told.summary["rows recognised"] == "2 of 2"
    assert "loss-on-x" in {f.rule for f in told.findings}
    with pytest.raises(ConfigError, match="no encoder"):
        audit(rows)


def test_control_characters_of_a_row_stay_in_the_report():
    finding = Finding(
        "x", "error", "m", examples=({"where": "row 0", "text": "a\x1b[2Jb"},), why="w", fix="f"
    )
    report = Report((finding,), (), {}, Evidence())
    assert "\x1b" not in str(report)
    assert "a␛[2Jb" in str(report)


def seen_row(ids):
    ids = np.asarray(ids)
    return ObservedRow(
        0, 0, ids, np.ones(len(ids), bool), np.zeros(len(ids), np.int64), ids, np.ones(len(ids))
    )


def test_a_document_is_found_wherever_it_lies():
    data = sequences(6, low=14)
    seen = seen_row(np.concatenate([data[4].ids, data[1].ids, data[2].ids[:10]]))
    Library([Example((s,)) for s in data], [seen]).align(seen)
    assert [p.sequence for p in seen.pieces] == [data[4], data[1], data[2]]
    expected = np.concatenate([data[4].weights, data[1].weights, data[2].weights[:10]])
    assert np.array_equal(seen.expected, expected)
    assert seen.pieces[2].missing_tail.tolist() == list(range(10, len(data[2])))


def test_inserted_and_lost_tokens_leave_the_rest_aligned():
    (s,) = sequences(1, low=20)
    ids = np.concatenate([s.ids[:5], [VOCAB, VOCAB + 1], s.ids[5:9], s.ids[11:]])
    seen = seen_row(ids)
    Library([Example((s,))], [seen]).align(seen)
    assert seen.kinds[5:7].tolist() == ["?", "?"]
    assert np.array_equal(seen.expected[11:], s.weights[11:])
    assert (~seen.pieces[0].matched).sum() == 2


def test_rows_that_occur_many_times_are_aligned():
    """In rows of their own, and packed one after the other."""
    data = sequences(3, low=20)
    examples = [Example((s,)) for s in [*data, *[data[0]] * 6]]
    packed = seen_row(np.concatenate([data[0].ids, data[0].ids, data[1].ids, data[0].ids]))
    Library(examples, [packed]).align(packed)
    assert [p.sequence for p in packed.pieces] == [data[0], data[0], data[1], data[0]]
    assert all(p.matched.all() for p in packed.pieces)


def test_a_shared_phrase_does_not_make_a_stranger_a_known_document():
    known, stranger = sequences(2, low=22)
    ids = np.array(stranger.ids)
    ids[4:12] = known.ids[9:17]  # eight tokens in common
    alone, after = seen_row(ids), seen_row(np.concatenate([known.ids, ids]))
    library = Library([Example((known,))], [alone, after])
    library.align(alone)
    assert alone.pieces == []
    assert set(alone.kinds) == {""}
    library.align(after)
    assert [p.sequence for p in after.pieces] == [known]
    assert set(after.kinds[len(known) :]) == {""}


def test_only_what_was_seen_is_indexed():
    data = sequences(40, low=20)
    seen = seen_row(data[7].ids)
    library = Library([Example((s,)) for s in data], [seen])
    assert {p.example for places in library._places.values() for p in places} == {7}


def test_rows_that_the_audit_was_not_given_are_left_alone(setup):
    """Half of the rows are known; the others are GSM8K too, with the same system prompt and phrases."""
    rows = setup.chats(12)
    encoder = Encoder(setup.tokenizer)
    trainer = setup.hf(setup.encoded(rows), per_device_train_batch_size=6)
    report = audit(rows[:6], encoder, trainer=trainer)
    assert [f.rule for f in report.findings] == ["rows-unrecognised"], str(report)
    assert report.exit_code() == 0
    known = {tuple(s.ids.tolist()) for e in encoder.batch(rows[:6])[0] for s in e}
    for seen in report.evidence.steps:
        assert bool(seen.pieces) == (tuple(seen.ids[seen.attended].tolist()) in known)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_found(side):
    (s,) = sequences(1)
    pad = np.full(4, VOCAB)
    ids = np.concatenate([pad, s.ids] if side == "left" else [s.ids, pad])
    batch = {"input_ids": ids[None], "labels": ids[None]}
    (seen,) = seen_in_batch(batch)
    Library([Example((s,))], [seen]).align(seen)
    mark_padding(seen, VOCAB)
    assert seen.padding.sum() == 4
    assert seen.padding[0] == (side == "left")


def test_weights_of_a_forest_go_back_to_its_sequences():
    data = sequences(3)
    data.append(data[0])  # merged: its edges weigh twice
    model, forest = llama().train(), Forest.of(data)
    with probe(model) as step:
        loss(model, forest).value.backward()
    total = sum(float(s.weights.sum()) for s in data)
    for seen, s in zip(seen_in_forest(0, step.micro_batches[0], forest, data), data, strict=True):
        assert seen.weight * total == pytest.approx(s.weights, rel=1e-4)


def test_a_rule_without_evidence_is_silent():
    assert [
        name for name, rule in RULES.items() if any(hit.count != 0 for hit in rule.check(Evidence()))
    ] == []


# -- the rehearsal ------------------------------------------------------------------------------------------


def held(owner):
    """Each attribute of an object by identity, and what its lists and mappings (hooks, parameters) hold."""
    told = {}
    for name, value in vars(owner).items():
        content = list(value.items()) if isinstance(value, dict) else value if isinstance(value, list) else []
        told[name] = (
            id(value),
            [(k, id(v)) for k, v in content] if isinstance(value, dict) else list(map(id, content)),
        )
    return told


def state_of(trainer):
    scaler = trainer.accelerator.scaler
    return {
        "weights": [p.detach().clone() for p in trainer.model.parameters()],
        "dtypes": [p.dtype for p in trainer.model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in trainer.model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
        "log": copy.deepcopy(trainer.state.log_history),
        "metrics": copy.deepcopy(getattr(trainer, "_metrics", None)),
        "callbacks": list(trainer.callback_handler.callbacks),
        "modules": [held(m) for m in trainer.model.modules()],
        "accelerator": held(trainer.accelerator),
        "scaler": None if scaler is None else (scaler._scale, scaler.state_dict()),
        "config": trainer.model.config.to_dict(),
        "generation_config": trainer.model.generation_config.to_dict(),
        "keys": set(trainer.__dict__),
    }


def assert_same(a, b):
    for key, value in a.items():
        if key in ("weights", "grads"):
            for x, y in zip(value, b[key], strict=True):
                assert (x is None and y is None) or torch.equal(x, y)
        elif key in ("torch", "numpy"):
            assert np.array_equal(np.asarray(value), np.asarray(b[key])), key
        else:
            assert value == b[key], key


def trainer_of(kind, setup):
    """Set-ups each of which leaves something behind where nobody puts it back."""
    rows = setup.chats(6)
    if kind == "sft":
        return setup.sft(rows, gradient_accumulation_steps=2)
    if kind == "dropout":  # padded rows, so that leaks are looked for
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(target_modules=["q_proj"], r=2, lora_dropout=0.5, task_type="CAUSAL_LM")
        return setup.sft(rows, peft_config=adapter, gradient_accumulation_steps=2)
    features, options = setup.encoded(rows), {"gradient_accumulation_steps": 2}
    if kind == "mixed":
        options |= {"bf16": True, "bf16_full_eval": True, "gradient_checkpointing": True}
        options["eval_dataset"] = Dataset.from_list(features[:2])
    trainer = setup.hf(features, **options)
    if kind == "scaler":
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    return trainer


@pytest.mark.parametrize("kind", ["sft", "hf", "mixed", "dropout", "scaler"])
def test_an_audit_leaves_no_trace(setup, kind):
    trainer = trainer_of(kind, setup)
    before = state_of(trainer)
    report = audit(setup.chats(6), Encoder(setup.tokenizer), trainer=trainer)
    assert len(report.evidence.probe.micro_batches) == 2
    assert report.evidence.probe.weight_sum == pytest.approx(1, rel=2e-2 if kind == "mixed" else 1e-3)
    assert_same(before, state_of(trainer))


class Recorded(Trainer):
    """Says what its steps see of the model."""

    def compute_loss(self, model, inputs, **kwargs):
        layer = model.model.layers[0]
        self.args.seen = {"checkpointing": layer.gradient_checkpointing, "training": self.is_in_train}
        loss = super().compute_loss(model, inputs, **kwargs)
        with torch.no_grad():
            hidden = model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[1]
            self.args.seen["dtype"] = model.lm_head(hidden).dtype
            self.args.seen["wrapped"] = hasattr(model, "_original_forward")
        return loss


def test_the_rehearsed_step_is_the_one_of_train(setup):
    """Checkpointing, autocast and the flag that keeps an evaluation from casting: the same in either."""
    features = setup.encoded(setup.chats(4))
    seen = []
    for act in (rehearse, lambda trainer: trainer.train()):
        options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 1, "save_strategy": "no"}
        trainer = setup.hf(features, kind=Recorded, **options)
        act(trainer)
        seen.append(trainer.args.seen)
    assert seen[0] == seen[1]
    assert seen[0]["checkpointing"]
    assert seen[0]["wrapped"]


class Guarded(Trainer):
    """No forward pass for a batch without labels, and two for others: its halves."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if (inputs["labels"] == -100).all():
            return torch.zeros((), requires_grad=True)
        halves = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(len(inputs["labels"]))]
        return sum(model(**h, num_items_in_batch=num_items_in_batch).loss for h in halves)


def test_micro_batches_keep_their_numbers_whatever_passes_they_make(setup):
    rows = setup.chats(6)
    features = setup.encoded(rows)
    for f in features[2:4]:
        f["labels"] = [-100] * len(f["labels"])
    options = {"gradient_accumulation_steps": 3, "train_sampling_strategy": "sequential"}
    trainer = setup.hf(features, kind=Guarded, **options)
    report = audit(rows, Encoder(setup.tokenizer), trainer=trainer)
    assert [len(b.ids) for b in report.evidence.probe.micro_batches] == [2, 0, 2]
    assert [s.where for s in report.evidence.steps] == [
        f"micro-batch {i}, row {j}" for i in (0, 2) for j in (0, 1)
    ]
    assert report.findings == (), str(report)


class OnDevice(torch.Tensor):
    """A tensor that NumPy can't read, as those on a GPU are."""

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert device type tensor to numpy")

    numpy = __array__

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_batches_on_a_device_are_read():
    data = sequences(3)
    batch = batch_of(data)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).repeat(3, 1)
    with pytest.raises(TypeError):
        np.asarray(batch["labels"].as_subclass(OnDevice))
    here, there = (seen_in_batch(b) for b in (batch, {k: v.as_subclass(OnDevice) for k, v in batch.items()}))
    for a, b in zip(here, there, strict=True):
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.weight, b.weight)
        assert np.array_equal(a.attended, b.attended)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}])
def test_an_audit_on_a_gpu(setup, options):
    rows = setup.chats(6)
    trainer = setup.hf(setup.encoded(rows), use_cpu=False, gradient_accumulation_steps=2, **options)
    report = audit(rows, Encoder(setup.tokenizer), trainer=trainer)
    assert report.findings == (), str(report)
    assert report.evidence.probe.weight_sum == pytest.approx(1, rel=2e-2)


def test_one_rank_may_audit_a_probe_alone():
    """In a process group, but without a trainer: no collective that the other ranks would have to enter."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    data, model = sequences(3), llama().train()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with probe(model) as step:
            model(**batch_of(data)).loss.backward()
        report = audit(probe=step)
    finally:
        torch.distributed.destroy_process_group()
    assert [d.rank for d in report.evidence.denominators] == [0]


def test_a_run_after_an_audit_is_the_run_without_one(setup):
    """Bitwise: the same weights after training, audited first or not."""
    rows = setup.chats(6)
    results = []
    for audited in (False, True):
        torch.manual_seed(3)
        trainer = setup.hf(setup.encoded(rows), max_steps=2, save_strategy="no")
        if audited:
            audit(trainer=trainer)
        trainer.train()
        results.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_breaks_inside_is_put_back(setup):
    trainer = setup.hf(setup.encoded(setup.chats(3)))
    before = state_of(trainer)

    def breaks():
        with untouched(trainer):
            torch.rand(3)
            trainer.model.train(not trainer.model.training)
            trainer.passing = 1
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        breaks()
    assert_same(before, state_of(trainer))


def test_a_model_in_which_nothing_is_trained_is_no_clean_bill(setup):
    """A PEFT model loaded without is_trainable=True: train() fails, and the rehearsal says so."""
    rows = setup.chats(2)
    with pytest.raises(LossError, match="nothing that is trained"):
        setup.audit(setup.hf(setup.encoded(rows), model=setup.model().requires_grad_(False)), rows)


def test_the_tokenizer_of_the_collator_reads_the_rows(setup):
    """`Trainer` asks for no processing_class."""
    rows = setup.chats(2)
    trainer = setup.hf(setup.encoded(rows))
    trainer.processing_class = None
    report = audit(rows, trainer=trainer)
    assert report.summary["rows recognised"] == "2 of 2"


def test_the_arguments_of_a_rows_template_are_kept(setup):
    """TRL renders each row with its own chat_template_kwargs."""
    loud = "{%- if shout -%}{{- 'LOUD\n' -}}{%- endif -%}"
    header = "{{- '<|im_start|>assistant\\n' -}}"
    template = MARKED.replace(header, header + loud)
    assert template.count("LOUD") == 2
    rows = [{**row, "chat_template_kwargs": {"shout": True}} for row in setup.chats(4)]
    trainer = setup.sft(rows, tokenizer=setup.tok(template), assistant_only_loss=True)
    assert setup.audit(trainer).findings == ()


def test_a_stream_without_end_is_read_so_far(setup, monkeypatch):
    monkeypatch.setattr("ygivenx.proof.auditing.STREAMED", 12)

    trainer = setup.sft(setup.pairs(2))
    trainer.train_dataset = Dataset.from_list(setup.pairs()).to_iterable_dataset().repeat(None)
    assert _rows_of(trainer) == setup.pairs()


def test_what_is_not_rehearsed_is_said(setup):
    rows = setup.chats(2)
    report = setup.audit(setup.hf(setup.encoded(rows), neftune_noise_alpha=5.0), rows)
    assert report.summary["not rehearsed"] == "NEFTune's noise"
    assert "not rehearsed" not in setup.audit(setup.hf(setup.encoded(rows)), rows).summary


def test_a_batch_of_a_loop_is_looked_at_for_leaks(setup):
    """Rows concatenated under a plain causal mask, in a loop of one's own."""
    rows, model = setup.chats(3), setup.model()
    features = setup.encoded(rows)
    packed = {k: torch.tensor([[t for f in features for t in f[k]]]) for k in ("input_ids", "labels")}
    with probe(model) as step:
        model(**packed).loss.backward()
    report = setup.audit(rows=rows, probe=step, batch=packed, model=model)
    assert [f.rule for f in report.findings] == ["packing-leak"]
    padded = dict(DataCollatorForSeq2Seq(setup.tok())(features))
    assert setup.audit(rows=rows, batch=padded, model=model).findings == ()


def test_a_trainer_that_generates_is_read_at_its_temperature(setup):
    """GRPO collates a list of prompts, and divides its logits."""
    trl = pytest.importorskip("trl")
    options = {"num_generations": 2, "max_completion_length": 12, "temperature": 0.5}
    trainer = trl.GRPOTrainer(
        model=setup.model(),
        args=setup.arguments(trl.GRPOConfig, **options),
        train_dataset=Dataset.from_list([{"prompt": r["messages"][:1]} for r in setup.chats(4)]),
        processing_class=setup.tok(),
        reward_funcs=lambda completions, **_: [float(i) for i, _ in enumerate(completions)],
    )
    logs = copy.deepcopy(trainer._logs)
    report = setup.audit(trainer)
    assert [f.rule for f in report.findings] == ["rows-unrecognised"]
    (batch,) = report.evidence.probe.micro_batches
    assert len(batch.found) == 24
    assert max(f.residual for f in batch.found) < 1e-2
    assert trainer._logs == logs


def test_a_learned_prompt_is_no_text(setup):
    """PEFT puts virtual tokens before the row, at inference too."""
    peft = pytest.importorskip("peft")
    rows = setup.chats(2)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(setup.model(), prompt)
    batch = dict(DataCollatorForSeq2Seq(setup.tok())(setup.encoded(rows)))
    with probe(model) as step:
        model(**batch).loss.backward()
    assert setup.audit(rows=rows, probe=step).findings == ()


def test_a_trainer_without_data_is_refused(setup):
    trainer = setup.hf(setup.encoded(setup.chats(3)))
    trainer.train_dataset = None
    with pytest.raises(ConfigError, match="no train_dataset"):
        rehearse(trainer)


def test_labels_and_gradient_agree_on_a_sound_batch(setup):
    """Both ways of seeing what is trained, on the same batch of two."""
    rows = setup.chats(2)
    encoder = Encoder(setup.tokenizer)
    trainer = setup.hf(setup.encoded(rows))
    live = audit(rows, encoder, trainer=trainer)
    static = audit(rows, encoder, batch=trainer.data_collator(setup.encoded(rows)))
    assert live.findings == static.findings == ()
    assert live.summary["trained"] == static.summary["trained"]

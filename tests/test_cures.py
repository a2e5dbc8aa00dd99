"""The fix that a finding names for the trainer that was seen ends it."""

from __future__ import annotations

import pytest
from museum.harness import MARKED, quiet
from transformers import DataCollatorForLanguageModeling, Trainer

from ygivenx.compare.trainers import TRAINERS
from ygivenx.proof.cures import _HAND_OVER, _OF_ROWS, _SETTINGS, cure, trainer_name
from ygivenx.proof.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore")


def trl(setup, rows, **options):
    return setup.sft(rows, tokenizer=setup.tok(MARKED), **options)


def collated(setup, rows):
    tokenizer = setup.tok()
    ids = [{"input_ids": f["input_ids"]} for f in setup.encoded(rows)]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return setup.hf(ids, data_collator=collator, tokenizer=tokenizer)


def prompts(rows):
    return [
        {"prompt": f"Q: {r['messages'][0]['content']} A: ", "completion": r["messages"][1]["content"]}
        for r in rows
    ]


# (trainer, rule): what the fix has to say, the set-up, the set-up with the fix
CASES = {
    ("trl", "loss-on-x"): (
        "assistant_only_loss=True", lambda s, rows: trl(s, rows), lambda s, rows: trl(s, rows, assistant_only_loss=True)
    ),
    ("trl", "y-truncated"): (
        "max_length=None",
        lambda s, rows: trl(s, rows, assistant_only_loss=True, max_length=96),
        lambda s, rows: trl(s, rows, assistant_only_loss=True, max_length=None),
    ),
    ("trl", "document-cut"): (
        "packing_strategy='bfd'",
        lambda s, rows: trl(s, rows, assistant_only_loss=True, packing=True, packing_strategy="wrapped", max_length=99),
        lambda s, rows: trl(s, rows, assistant_only_loss=True, packing=True, packing_strategy="bfd", max_length=512),
    ),
    ("trl", "context-differs"): (
        "--to trl -o rows.parquet", lambda s, rows: s.sft(prompts(rows)), lambda s, rows: s.sft(s.encoded(rows))
    ),
    ("transformers", "end-untrained"): (
        "data_collator=DataCollatorForSeq2Seq(tokenizer)", collated, lambda s, rows: s.hf(s.encoded(rows))
    ),
    ("transformers", "loss-on-x"): (
        "data_collator=DataCollatorForSeq2Seq(tokenizer)", collated, lambda s, rows: s.hf(s.encoded(rows))
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("trainer", "rule"), CASES)
def test_the_named_fix_ends_the_finding(trainer, rule, setup):
    said, broken, mended = CASES[trainer, rule]
    rows, tokenizer = (
        setup.chats(6),
        setup.tok(MARKED if trainer == "trl" and rule != "context-differs" else None),
    )
    with quiet():
        before, after = (
            setup.audit(build(setup, rows), rows, tokenizer=tokenizer) for build in (broken, mended)
        )
    (finding,) = (f for f in before.findings if f.rule == rule and f.severity != "info")
    assert said in finding.fix
    assert rule not in {f.rule for f in after.findings}, str(after)


def test_cures_are_of_trainers_and_rules_that_exist():
    assert {*_SETTINGS, *_HAND_OVER} <= {*TRAINERS}
    assert {*_OF_ROWS, *(rule for rules in _SETTINGS.values() for rule in rules)} <= RULES.keys()
    assert cure("transformers", "loss-on-x", "Mask x.").startswith("Mask x; or `ygx encode ROWS")
    assert cure("trl", "loss-on-x", "Mask x.").startswith("SFTConfig(assistant_only_loss=True); or")
    assert cure("renderers", "loss-on-x", "Mask x.") == cure("trl", "length-outliers", "Mask x.") == "Mask x."


def test_a_trainer_is_known_by_what_it_derives_from():
    import trl

    from ygivenx import Trainer as OurTrainer

    class Own(trl.SFTTrainer):
        pass

    kinds = (Own, trl.SFTTrainer, Trainer, OurTrainer)
    assert [trainer_name(kind.__new__(kind)) for kind in kinds] == ["trl", "trl", "transformers", ""]

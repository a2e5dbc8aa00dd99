"""Other trainers' preprocessing in processes of their own, judged by the audit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import ygivenx.compare
from ygivenx import cli
from ygivenx.compare.comparing import compare, judge
from ygivenx.compare.running import FAMILIES, Preprocessed, family_of, run
from ygivenx.compare.trainers import TRAINERS
from ygivenx.encoder.encode import Encoder
from ygivenx.errors import ConfigError
from ygivenx.proof.modes import numbered

ADAPTERS = Path(ygivenx.compare.__file__).parent / "adapters"
ROWS = [
    {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]},
    {
        "messages": [
            {"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "Again"}, {"role": "assistant", "content": "hi!"},
        ]
    },
]  # fmt: skip


def test_each_trainer_has_an_adapter_and_each_adapter_a_trainer():
    files = {p.stem: p for p in ADAPTERS.glob("*.py")}
    assert files.keys() == {name.replace("-", "_") for name in TRAINERS}
    assert [name for name, p in files.items() if len(p.read_text().splitlines()) > 40] == []


def test_transformers_collator_is_judged_by_our_proof(smol_tokenizer):
    """Where pad and end are one token, the collator masks the ends, and all of x is trained."""
    cells = list(compare(ROWS, Encoder(smol_tokenizer), {"transformers": ""}, ["collator"]))
    ours, theirs = cells[:2], cells[2:]
    assert [c.outcome for c in ours] == ["exact", "exact"]
    for mine, cell in zip(ours, theirs, strict=True):
        assert cell.result.ids[: len(mine.result.ids)].tolist() == mine.result.ids.tolist()
        assert "loss-on-x" in cell.outcome
        assert "end-untrained" in cell.outcome


def test_a_trainer_that_is_right_is_exact(smol_tokenizer):
    """What follows the generation prompt, as several trainers mask one turn; with the newline behind its end."""
    encoder = Encoder(smol_tokenizer)
    (row,) = numbered(ROWS[:1])
    ids = smol_tokenizer.apply_chat_template(ROWS[0]["messages"], return_dict=False)
    offset = len(
        smol_tokenizer.apply_chat_template(
            ROWS[0]["messages"][:1], add_generation_prompt=True, return_dict=False
        )
    )
    weights = (np.arange(len(ids)) >= offset).astype(float)
    cell = judge(Preprocessed("by hand", "", 0, np.array(ids), weights), row, encoder)
    assert cell.outcome == "after-end-trained"
    weights[-1] = 0
    assert judge(Preprocessed("by hand", "", 0, np.array(ids), weights), row, encoder).outcome == "exact"


def judged(encoder: Encoder, row, ids, weights):
    return judge(Preprocessed("by hand", "", 0, np.array(ids), np.array(weights, float)), row, encoder)


def test_one_bos_too_many_is_another_context(smol_tokenizer):
    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.bos_token = "<|endoftext|>"  # one that the template doesn't write
    encoder = Encoder(tokenizer)
    (row,) = numbered(ROWS[1:])
    ours = encoder(ROWS[1]).only
    assert judged(encoder, row, ours.ids, ours.weights).outcome == "exact"
    cell = judged(encoder, row, [tokenizer.bos_token_id, *ours.ids], [0, *ours.weights])
    assert cell.outcome == "context-differs"
    (finding,) = [f for f in cell.findings if f.severity == "error"]
    assert finding.message == "rows differ from what the chat template shows at inference"
    assert finding.examples[0]["where"] == "by hand (), row 0, token 0"
    assert finding.examples[0]["text"].startswith("⟦<|endoftext|>⟧<|im_start|>")


def test_replies_that_take_a_sequence_of_their_own_are_missed_where_the_last_alone_is_trained(smol_tokenizer):
    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.chat_template = (  # a history without the thought that each last reply begins with
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = Encoder(tokenizer)
    (row,) = numbered(ROWS[1:])
    first, last = encoder(ROWS[1]).sequences
    assert judged(encoder, row, last.ids, last.weights).outcome == "only-last-turn"
    cell = judged(encoder, row, first.ids, first.weights)
    assert cell.outcome == "y-untrained", "the last reply isn't there at all"


def test_a_trainer_that_is_not_there_says_where_it_was_looked_for(smol_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="axolotl can't be run") as told:
        run("axolotl", ["default"], [smol_tokenizer], ROWS[:1], str(tmp_path))
    assert "--with axolotl=PLACE" in str(told.value)
    with pytest.raises(ConfigError, match="no Python and no folder"):
        run("axolotl", ["default"], [smol_tokenizer], ROWS[:1], str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="did you mean 'axolotl'"):
        list(compare(ROWS, Encoder(smol_tokenizer), {"axolotle": ""}))


def test_families_are_told_by_what_their_templates_write():
    assert [family_of(mark) for mark in FAMILIES] == list(FAMILIES.values())
    assert family_of(None) == "chatml"


def test_the_command(smol_tokenizer, tmp_path):
    smol_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    command = [
        "compare",
        str(tmp_path / "rows.jsonl"),
        "--with",
        "transformers",
        "--model",
        str(tmp_path / "model"),
    ]
    page = ["--html", str(tmp_path / "page.html"), "--setting", "collator", "--limit", "1"]
    result = CliRunner().invoke(cli.app, [*command, *page])
    assert result.exit_code == 0, result.output
    assert "row 0, ygivenx (default): exact" in result.stdout
    assert "row 0, transformers (collator): loss-on-x" in result.stdout
    assert "⟦It is 4.<|im_end|>⟧" in result.stdout
    assert "transformers (collator)" in (tmp_path / "page.html").read_text()


def test_the_example_of_an_action_uses_options_that_exist():
    action = yaml.safe_load((Path(__file__).parents[1] / "examples" / "audit.yml").read_text())
    (line,) = [s["run"] for s in action["jobs"]["audit"]["steps"] if "ygx audit" in s.get("run", "")]
    shown = CliRunner().invoke(cli.app, ["audit", "--help"], env={"COLUMNS": "200"}).output
    assert all(option in shown for option in line.split() if option.startswith("--"))

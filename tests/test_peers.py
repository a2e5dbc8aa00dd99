"""README's table of other tools: each cell is computed here, with the versions that are installed."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

import ygivenx as yx
from ygivenx.compare.comparing import OURS, compare

README = (Path(__file__).parents[1] / "README.md").read_text()
TABLE = re.search(r"^\| SmolLM2's own template.*?(?=\n\n)", README, re.M | re.S).group().split("\n")
TOOLS, *ROWS = [
    [c.strip() for c in line.strip("|").split("|")] for line in TABLE if not line.startswith("|--")
]
CELLS = [(row[0], tool, cell) for row in ROWS for tool, cell in zip(TOOLS[1:], row[1:], strict=True)]
CHAT = {
    "messages": [
        {"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "It is 6."},
    ]
}  # fmt: skip
LONG = {"messages": [{"role": "user", "content": "word " * 1500}, {"role": "assistant", "content": "Yes."}]}
PROMPT = [{"role": "user", "content": "Tell me one of these: " + ", ".join(map(str, range(60)))}]
EIGHT = [{"messages": [*PROMPT, {"role": "assistant", "content": f"{n}"}]} for n in range(8)]
SETTINGS = {"ygivenx": OURS, "TRL's SFTTrainer": "trl", "transformers' collator": "transformers"}

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def outcome(smol_tokenizer):
    """What a tool makes of the chat, in its default setting (0) or in the one that masks replies (1)."""

    @cache
    def of(tool: str, number: int) -> str:
        name = SETTINGS[tool]
        places = {} if name == OURS else {name: ""}
        cells = [c for c in compare([CHAT], yx.Encoder(smol_tokenizer), places) if c.result.trainer == name]
        rules = cells[number if name != OURS else 0].outcome.split(", ")
        return ", ".join(r if r in ("exact", "refused") else f"`{r}`" for r in rules)

    return of


@pytest.fixture(scope="module")
def batch(smol_tokenizer, tmp_path_factory):
    """The ids that TRL's trainer, or transformers' collator, makes of rows."""
    pytest.importorskip("trl")

    @cache
    def of(tool: str, rows: str):
        rows = {"long": [LONG], "eight": EIGHT}[rows]
        if tool == "transformers' collator":
            from transformers import DataCollatorForLanguageModeling

            ids = [smol_tokenizer.apply_chat_template(r["messages"], return_dict=False) for r in rows]
            return DataCollatorForLanguageModeling(smol_tokenizer, mlm=False)([{"input_ids": i} for i in ids])
        from datasets import Dataset
        from tiny import llama
        from trl import SFTConfig, SFTTrainer

        folder = str(tmp_path_factory.mktemp("trl"))
        config = SFTConfig(folder, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
        model, data = llama(vocab_size=len(smol_tokenizer)), Dataset.from_list(rows)
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=smol_tokenizer)
        return next(iter(trainer.get_train_dataloader()))

    return of


def too_long(tool, outcome, batch, tokenizer) -> str:
    whole = len(yx.Encoder(tokenizer)(LONG).only)
    if tool == "ygivenx":
        with pytest.raises(yx.RowError, match="more than max_length=1024") as refused:
            yx.Encoder(tokenizer, max_length=1024)(LONG)
        return f"refused: `{refused.value.reason}`"
    length = batch(tool, "long")["input_ids"].shape[1]
    return "no limit" if length >= whole else f"cut to {length:,}, without a word"


def shared(tool, outcome, batch, tokenizer) -> str:
    rows = [yx.Encoder(tokenizer)(row).only for row in EIGHT]
    prompt = min(int((s.weights > 0).argmax()) for s in rows)
    if tool == "ygivenx":
        times = (len(yx.Forest.of(rows)) - sum(len(s) - prompt for s in rows)) / prompt
    else:
        times = batch(tool, "eight")["input_ids"].numel() // prompt
    return {1: "once", 8: "8 times"}[round(times)]


CHECKS = {
    "a chat of two turns, by default": lambda tool, outcome, *_: outcome(tool, 0),
    "with the tool's own mask of replies": lambda tool, outcome, *_: outcome(tool, 1),
    "a chat beyond 1,024 tokens": too_long,
    "a prompt with eight replies is computed": shared,
}


@pytest.mark.parametrize(("row", "tool", "cell"), CELLS, ids=[f"{tool}: {row}" for row, tool, _ in CELLS])
def test_a_cell(row, tool, cell, outcome, batch, smol_tokenizer):
    assert CHECKS[row](tool, outcome, batch, smol_tokenizer) == cell


def test_each_row_has_a_check():
    assert {row[0] for row in ROWS} == CHECKS.keys()

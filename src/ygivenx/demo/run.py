"""The demo's run: ledger and exact match before, training on y only, the same after, and a page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed

from ..commands.config import ModelOptions, TrainConfig
from ..commands.finetune import arguments_of, build
from ..commands.inputs import open_model
from ..commands.progress import shown
from ..commands.quiet import quiet
from ..encoder.encode import Encoder
from ..scores.ledger import ledger
from ..sequence import Example
from ..training.evaluation import evaluate, rates
from .measured import Arm, MeasuredState, comparison
from .page import write_page
from .task import splits

TRAIN_ROWS, HELD_OUT_ROWS, WATCHED_ROWS = 240, 40, 12
STEPS = 16  # of 512 tokens: the task is learned by then
MAX_NEW_TOKENS, BATCH = 80, 10
# What each arm trains. Measured with the same held-out tokens of y and x in both.
ARMS = {"y": "assistant", "all": "all"}


def run(output_dir: Path, *, control: bool, seed: int, console: Console) -> dict[str, Any]:
    """Everything that the demo prints and writes; returns the content of result.json."""
    with quiet():
        return _run(output_dir, control, seed, console)


def _run(output_dir: Path, control: bool, seed: int, console: Console) -> dict[str, Any]:
    started = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    y = run_arm("y", None, output_dir, seed, console)
    arms = {"y": y} | ({"all": run_arm("all", y.before, output_dir, seed, console)} if control else {})
    result: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "seed": seed, "train_rows": TRAIN_ROWS}
    result |= {"held_out_rows": HELD_OUT_ROWS, **y.numbers()}
    if control:
        result["control"] = arms["all"].numbers()
        names, *rows = comparison(arms)
        table = Table(*names)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    result["wall_seconds"] = round(time.perf_counter() - started, 1)
    (output_dir / "result.json").write_text(json.dumps(result, indent=1))
    write_page(output_dir / "report.html", arms, result)
    console.print(
        f"wrote {output_dir / 'result.json'} and {output_dir / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
    return result


def run_arm(arm: str, before: MeasuredState | None, output_dir: Path, seed: int, console: Console) -> Arm:
    """Load the base model, measure it (unless `before` is known), train it, and measure it again."""
    set_seed(seed)
    started = time.perf_counter()
    train_rows, held_out = splits(TRAIN_ROWS, HELD_OUT_ROWS, seed)
    model, tokenizer = open_model(ModelOptions("sample"))
    encoder = Encoder(tokenizer, train=ARMS[arm])
    examples, rejected = encoder.batch(train_rows)
    console.print(
        f"\n[bold]loss on {arm}[/bold]: "
        f"{len(examples)} accepted + {len(rejected)} quarantined = {len(train_rows)} rows read"
    )
    # The ruler is the same for both arms: y is the answer and its end of turn, x the rest.
    ruler, _ = Encoder(tokenizer).batch(held_out)
    before = before or measure(model, tokenizer, ruler, held_out, console, "before")
    history = fit(model, tokenizer, examples, ruler, output_dir / arm, seed, console)
    after = measure(model, tokenizer, ruler, held_out, console, "after")
    ledgers = [ledger(model, example) for example in ruler[:10]]
    return Arm(before, after, history, ruler, ledgers, round(time.perf_counter() - started, 1))


def fit(
    model: Any, tokenizer: Any, examples: list[Example], ruler: list[Example], output_dir: Path, seed: int,
    console: Console,
) -> list[dict[str, float]]:  # fmt: skip
    """Train in place; the log has nats per token of y and of x on some held-out rows."""
    settings = {
        "data": "the demo's own", "model": "sample", "output_dir": str(output_dir), "seed": seed,
        "eval_data": "the demo's own", "max_tokens": 512, "learning_rate": 3e-4, "warmup_steps": 4,
        "max_steps": STEPS, "eval_steps": 8, "logging_steps": 4,
    }  # fmt: skip
    config = TrainConfig.of(None, settings)
    args = arguments_of(config)
    trainer = build(config, args, model, tokenizer, examples, ruler[:WATCHED_ROWS], console)
    console.print(str(trainer.train_dataset), highlight=False, soft_wrap=True)
    start = {"step": 0.0, **trainer.evaluate()}  # train() begins a new log
    trainer.train()
    return [start, *trainer.state.log_history]


def measure(
    model: Any, tokenizer: Any, ruler: list[Example], rows: list[dict[str, Any]], console: Console, when: str
) -> MeasuredState:
    """Ledger, nats per token and exact match (generated, greedy) on the held-out rows; printed."""
    model.eval()
    book = ledger(model, ruler[0])
    console.print(f"\nledger of a held-out row, {when} training")
    console.print(str(book), highlight=False, markup=False, soft_wrap=True)
    nats = rates(evaluate(model, ruler, max_tokens=1024))
    generated = answers(model, tokenizer, rows, console)
    expected = [row["messages"][-1]["content"] for row in rows]
    exact = sum(g == w for g, w in zip(generated, expected, strict=True)) / len(rows)
    state = MeasuredState(exact, nats["conditional_nats"], nats["marginal_nats"], generated, book)
    console.print(f"{when}: {state}", highlight=False, soft_wrap=True)
    return state


@torch.no_grad()
def answers(model: Any, tokenizer: Any, rows: list[dict[str, Any]], console: Console) -> list[str]:
    """What the model writes after each prompt, greedy, up to its end of turn."""
    texts = []
    starts = range(0, len(rows), BATCH)
    for start in shown(console, starts, lambda: "replies", lambda start: start + BATCH, len(rows)):
        prompts = [row["messages"][:-1] for row in rows[start : start + BATCH]]
        batch = tokenizer.apply_chat_template(
            # On the left: a reply goes on from the last place of its prompt.
            prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True,
            tokenizer_kwargs={"padding_side": "left"},
        )  # fmt: skip
        ids = model.generate(
            **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts

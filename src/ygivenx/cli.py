"""The command `ygx`: rows in, ledgers, scores and fine-tuned models out."""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .commands.inputs import (
    Accepted,
    encoded,
    encoder_options,
    open_encoder,
    open_model,
    open_rows,
    say,
    the_row,
)
from .commands.inputs import console as err
from .errors import ConfigError, YgivenxError, nearest
from .models.resolve import located
from .report.parts import finite
from .show import visible, visible_json

OK, FINDINGS, USAGE = 0, 1, 2

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="log Pr(y|x), exact, proven and cheap. Exit codes: 0 ok, 1 findings, 2 usage or input error.",
)

Data = Annotated[str, typer.Argument(help="JSONL, JSON, CSV, Parquet, Arrow, or a saved dataset's directory")]
Model = Annotated[str, typer.Option("--model", "-m", help="a model's directory or name; `sample` is SmolLM2")]
Gguf = Annotated[str | None, typer.Option("--gguf-file", help="the GGUF file inside the model's directory")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
Format = Annotated[
    str | None, typer.Option("--format", help="name the row format where columns are ambiguous")
]
ColX = Annotated[str | None, typer.Option("--x", help="the column of the input")]
ColY = Annotated[str | None, typer.Option("--y", help="the column of the output")]
Plain = Annotated[
    bool, typer.Option("--plain", help="x and y are text as the model reads it: no chat template")
]
Split = Annotated[str | None, typer.Option("--split", help="which of a dataset's splits")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="read at most so many rows")]
RowNumber = Annotated[int, typer.Option("--row", min=0, help="which row, from 0")]
Control = Annotated[
    str, typer.Option("--control", help="control tokens in a row's text: refuse, text or parse")
]
Policy = Annotated[str, typer.Option("--train", help="what is trained: assistant, last, all, or a role")]
Encoding = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder", "-e", help="name=value of a further option of Encoder, such as repair=append_end"
    ),
]
Suppress = Annotated[list[str] | None, typer.Option("--suppress", help="rule=reason; may be repeated")]


def _severity(name: str) -> str:
    """Raise ConfigError for what is no severity before any work is done."""
    from .proof.rules import SEVERITIES

    if name not in SEVERITIES:
        raise ConfigError(f"unknown severity {name!r}{nearest(name, SEVERITIES)}", where="--fail-on")
    return name


FailOn = Annotated[
    str,
    typer.Option(
        "--fail-on", callback=_severity, help="exit with 1 from this severity: error, warning or info"
    ),
]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="write the page there")]
SarifFile = Annotated[Path | None, typer.Option("--sarif", help="write SARIF 2.1.0 there")]
RayWorkers = Annotated[
    int, typer.Option("--ray", min=0, help="workers of a Ray cluster (extra: ray); 0: none")
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16")]


# -- commands ----------------------------------------------------------------------------------------------


def emit(document: Any) -> None:
    """One JSON document on standard output; non-finite numbers become null."""
    text = json.dumps(finite(document), ensure_ascii=False, indent=1, default=str, allow_nan=False)
    print(visible_json(text))


@app.command()
def show(
    data: Data,
    model: Model,
    row: RowNumber = 0,
    gguf_file: Gguf = None,
    fmt: Format = None,
    x: ColX = None,
    y: ColY = None,
    plain: Plain = False,
    split: Split = None,
    train: Policy = "assistant",
    control: Control = "refuse",
    encoder: Encoding = None,
    as_json: AsJson = False,
) -> None:
    """Print one row as the model reads it, its trained tokens coloured.

    Example: `ygx show data.jsonl --model sample --row 3`
    """
    reader = open_rows(data, fmt, x, y, plain, row + 1, split)
    options = encoder_options(encoder, train=train, control=control)
    example = the_row(reader, open_encoder(model, gguf_file, **options), row)
    if as_json:
        return emit({"format": reader.format, "sequences": [_sequence_json(s) for s in example.sequences]})
    say(f"format: {reader.format}")
    print(example)


def _sequence_json(s: Any) -> dict[str, Any]:
    segments = [{f.name: getattr(g, f.name) for f in fields(g)} for g in s.segments]
    return {
        "ids": s.ids.tolist(),
        "weights": s.weights.tolist(),
        "tokens": list(s.tokens),
        "segments": segments,
        "notes": list(s.notes),
    }


@app.command()
def encode(
    data: Data,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="a Parquet file")],
    gguf_file: Gguf = None,
    fmt: Format = None,
    x: ColX = None,
    y: ColY = None,
    plain: Plain = False,
    split: Split = None,
    limit: Limit = None,
    train: Policy = "assistant",
    control: Control = "refuse",
    encoder: Encoding = None,
    ray: RayWorkers = 0,
    as_json: AsJson = False,
) -> None:
    """Ids, weights, labels, positions and segments of every row as Parquet, for TRL, axolotl or a plain loop.

    Example: `ygx encode data.jsonl --model sample -o encoded.parquet`
    """
    from .encoder.handover import write_parquet

    reader = open_rows(data, fmt, x, y, plain, limit, split)
    options = encoder_options(encoder, train=train, control=control)
    if ray:
        from .scores.clusters import encoded_on_ray

        items = encoded_on_ray(*located(model, gguf_file), iter(reader), workers=ray, **options)
    else:
        items = encoded(reader, open_encoder(model, gguf_file, **options))
    accepted = Accepted(reader, items)
    with err.status("encoding"):
        sequences = write_parquet(accepted, output)
    account = accepted.account() | {"sequences": sequences, "output": str(output)}
    if as_json:
        emit(account)


@app.command()
def ledger(
    data: Data,
    model: Model,
    row: RowNumber = 0,
    gguf_file: Gguf = None,
    fmt: Format = None,
    x: ColX = None,
    y: ColY = None,
    plain: Plain = False,
    split: Split = None,
    train: Policy = "assistant",
    control: Control = "refuse",
    encoder: Encoding = None,
    dtype: Dtype = "float32",
    html: HtmlFile = None,
    as_json: AsJson = False,
) -> None:
    """Where the log-probability of one row goes, by segment; marginal + conditional = joint.

    Example: `ygx ledger data.jsonl --model sample --row 3`
    """
    from .scores.ledger import ledger as account_for

    options = encoder_options(encoder, train=train, control=control)
    reader = open_rows(data, fmt, x, y, plain, row + 1, split)
    loaded, _ = open_model(model, gguf_file, dtype)
    book = account_for(loaded, the_row(reader, open_encoder(model, gguf_file, **options), row))
    if html is not None:
        _ledger_page(book, row).write(html)
    if as_json:
        emit(book.to_dict())
    else:
        print(visible(str(book)))
    if not book.balanced:
        raise typer.Exit(FINDINGS)


def _ledger_page(book: Any, row: int) -> Any:
    from .report import LedgerTable, Page, TokenStrip

    strips = [
        TokenStrip.of(s, log_p, title=f"row {row}, sequence {i}")
        for i, (s, log_p) in enumerate(zip(book.sequences, book.log_p, strict=True))
    ]
    return Page(title=f"Ledger of row {row}", ledgers=[LedgerTable.of(book, f"row {row}")], rows=strips)


@app.command()
def score(
    data: Data,
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".jsonl or .parquet; standard output if left out")
    ] = None,
    gguf_file: Gguf = None,
    fmt: Format = None,
    x: ColX = None,
    y: ColY = None,
    plain: Plain = False,
    split: Split = None,
    limit: Limit = None,
    control: Control = "refuse",
    dtype: Dtype = "float32",
    border: Annotated[
        str, typer.Option(help="joint: one text, a straddling token is y; split: tokenised apart")
    ] = "joint",
    bos: Annotated[str, typer.Option(help="auto (as the tokenizer does), always or never")] = "auto",
    overflow: Annotated[
        str, typer.Option(help="more than the model reads: refuse, left (cut x) or roll (a window)")
    ] = "refuse",
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens read at once")] = None,
    unconditional: Annotated[
        str | None, typer.Option(help="a prompt in the place of x, for log Pr(y) and PMI")
    ] = None,
    marginal: Annotated[bool, typer.Option(help="log Pr(x) too; without it scoring is cheaper")] = True,
    tokens: Annotated[bool, typer.Option("--tokens", help="add value, rank and text of each token")] = False,
    ray: RayWorkers = 0,
    as_json: AsJson = False,
) -> None:
    """log Pr(x), log Pr(y|x) and log Pr([x,y]) of every row, in nats. Run it again to go on where it ended.

    Example: `ygx score pairs.jsonl --model sample -o scores.jsonl`
    """
    flags = {k: v for k, v in locals().items() if k not in ("model", "gguf_file", "output", "as_json")}
    from .commands.scorerun import score_file

    reader = open_rows(data, fmt, x, y, plain, limit, split)
    account = score_file(reader, located(model, gguf_file), output, flags, console=err, silent=as_json)
    if as_json:
        emit(account)


@app.command()
def audit(
    data: Data,
    model: Model,
    gguf_file: Gguf = None,
    fmt: Format = None,
    x: ColX = None,
    y: ColY = None,
    plain: Plain = False,
    split: Split = None,
    limit: Limit = None,
    train: Policy = "assistant",
    control: Control = "refuse",
    encoder: Encoding = None,
    suppress: Suppress = None,
    fail_on: FailOn = "warning",
    html: HtmlFile = None,
    sarif: SarifFile = None,
    as_json: AsJson = False,
) -> None:
    """What is wrong with rows and a tokenizer, before a run: findings with places, reasons and fixes.

    Example: `ygx audit data.jsonl --model sample --fail-on error --html audit.html`
    """
    from .proof.auditing import audit as examine_rows
    from .proof.limits import read_limits

    reader = open_rows(data, fmt, x, y, plain, limit, split)
    say(f"format: {reader.format}")
    made = open_encoder(model, gguf_file, **encoder_options(encoder, train=train, control=control))
    limits = read_limits(model, gguf_file)
    report = examine_rows(rows=list(reader), encoder=made, model=limits, suppress=reasons(suppress))
    finish(report, fail_on, html, sarif, as_json)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,  # what follows the script is the script's, --json and --data too
    }
)
def probe(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="a training script; its own arguments follow it")],
    data: Annotated[
        str | None, typer.Option(help="the rows that it trains on, where its dataset holds token ids alone")
    ] = None,
    fmt: Format = None,
    x: ColX = None,
    y: ColY = None,
    plain: Plain = False,
    split: Split = None,
    suppress: Suppress = None,
    fail_on: FailOn = "warning",
    html: HtmlFile = None,
    sarif: SarifFile = None,
    as_json: AsJson = False,
) -> None:
    """Run a training script up to train(), and read from the gradient of one step what it really trains.

    For transformers and TRL trainers; options of ours come before the script. Nothing of the run changes.

    Example: `ygx probe --data rows.jsonl --html probe.html train.py --epochs 3`
    """
    from .commands.probe_script import at_train, output_aside
    from .proof.auditing import audit as examine_trainer

    reader = None if data is None else open_rows(data, fmt, x, y, plain, None, split)
    if reader is not None:
        say(f"format: {reader.format}")
    rows = None if reader is None else list(reader)
    why = reasons(suppress)
    with output_aside() if as_json else nullcontext():
        report = at_train(
            script, context.args, lambda trainer: examine_trainer(rows, trainer=trainer, suppress=why)
        )
    finish(report, fail_on, html, sarif, as_json)


def reasons(suppress: list[str] | None) -> dict[str, str]:
    """`rule=reason` options as a mapping."""
    pairs = [s.partition("=") for s in suppress or []]
    return {rule.strip(): reason for rule, _, reason in pairs}


def finish(report: Any, fail_on: str, html: Path | None, sarif: Path | None, as_json: bool) -> None:
    """Write and print an audit's report; the exit code says whether a finding is severe enough."""
    if html is not None:
        report.to_html(html)
    if sarif is not None:
        sarif.parent.mkdir(parents=True, exist_ok=True)
        sarif.write_text(report.to_sarif(), encoding="utf-8")
    print(visible_json(report.to_json()) if as_json else report)
    raise typer.Exit(report.exit_code(fail_on))


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="a YAML file with the keys below; flags override it")
    ] = None,
    data: Annotated[str | None, typer.Option(help="the rows to train on")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="directory or name; `sample` is SmolLM2")
    ] = None,
    gguf_file: Gguf = None,
    output_dir: Annotated[str | None, typer.Option(help="checkpoints and the final model")] = None,
    fmt: Format = None,
    x: ColX = None,
    y: ColY = None,
    plain: Annotated[
        bool | None, typer.Option("--plain", help="x and y are text as the model reads it")
    ] = None,
    split: Split = None,
    limit: Limit = None,
    eval_data: Annotated[str | None, typer.Option(help="held-out rows of the same format")] = None,
    eval_split: Annotated[str | None, typer.Option(help="which of its splits")] = None,
    eval_limit: Annotated[int | None, typer.Option(min=1)] = None,
    eval_steps: Annotated[int | None, typer.Option(min=1, help="evaluate every so many steps")] = None,
    policy: Annotated[str | None, typer.Option("--train", help="assistant, last, all, or a role")] = None,
    control: Annotated[str | None, typer.Option(help="control tokens in text: refuse, text or parse")] = None,
    max_length: Annotated[int | None, typer.Option(min=2)] = None,
    overflow: Annotated[str | None, typer.Option(help="refuse, drop_turns or truncate")] = None,
    encoder: Encoding = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="distinct tokens in one micro-batch")] = None,
    denominator: Annotated[str | None, typer.Option(help="tokens or sequence")] = None,
    epochs: Annotated[float | None, typer.Option()] = None,
    max_steps: Annotated[int | None, typer.Option(min=1)] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    lr_scheduler: Annotated[str | None, typer.Option()] = None,
    warmup_steps: Annotated[int | None, typer.Option(min=0)] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    max_grad_norm: Annotated[float | None, typer.Option()] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option("--gradient-checkpointing")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="the rank of LoRA adapters (extra: lora)")] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    logging_steps: Annotated[int | None, typer.Option(min=1)] = None,
    save_steps: Annotated[int | None, typer.Option(min=1)] = None,
    save_total_limit: Annotated[int | None, typer.Option(min=1)] = None,
    resume: Annotated[str | None, typer.Option(help="auto, or a checkpoint's directory")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune on log Pr(y|x): loss on the tokens of y alone.

    Example: `ygx train --data train.jsonl --x question --y answer --model sample --output-dir runs/a`
    """
    told = {"format": fmt, "train": policy, "encoder": encoder_options(encoder) or None}
    flags = {k: v for k, v in locals().items() if k not in ("config", "as_json", "fmt", "policy", "told")}
    from .commands.config import TrainConfig
    from .commands.finetune import finetune

    result = finetune(TrainConfig.of(config, flags | told), err)
    if as_json:
        emit(result)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="where result.json and report.html go")] = Path(
        "runs/demo"
    ),
    control: Annotated[bool, typer.Option("--control", help="also train on all tokens, and compare")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a real model on y only and show what that did, in a few minutes on a CPU.

    Example: `ygx demo --control`
    """
    from .demo.run import run

    result = run(output_dir, control=control, seed=seed, console=err if as_json else Console())
    if as_json:
        emit(result)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option("--model", "-m")] = None,
    gguf_file: Gguf = None,
    as_json: AsJson = False,
) -> None:
    """What is installed, which routes and dtype will run, and what is missing for what.

    Example: `ygx doctor --model sample`
    """
    from .commands.doctor import examine, told

    found = examine((model, gguf_file) if model else None)
    if as_json:
        emit(found)
    else:
        print(told(found))


def main() -> None:
    """Entry point: errors of ours are told in full on standard error, with exit code 2."""
    try:
        app(standalone_mode=True)
    except YgivenxError as error:
        err.print(f"error: {error}", style="bold red", highlight=False, markup=False)
        sys.exit(USAGE)
    except BrokenPipeError:
        sys.exit(OK)
    except Exception:
        # One that nobody foresaw, or a probed script's own: an exit with 1 would say that there are findings.
        traceback.print_exc()
        sys.exit(USAGE)

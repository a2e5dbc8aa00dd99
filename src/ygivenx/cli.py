"""The command `ygx`: rows in, ledgers, scores and fine-tuned models out."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import __version__
from .commands.config import (
    ColumnOptions,
    DataSection,
    EncodedRowOptions,
    EncoderSection,
    LimitedRowOptions,
    LoraSection,
    ModelOptions,
    ModelSection,
    ObjectiveSection,
    OutputSection,
    ReportOutputs,
    RowOptions,
    Sampling,
    Scoring,
    TrainConfig,
    TrainingSection,
    Weights,
    template,
)
from .commands.inputs import (
    Account,
    in_flags,
    open_encoder,
    open_model,
    open_rows,
    options_of,
    row_of,
    say,
    the_row,
)
from .commands.inputs import console as err
from .commands.options import with_sections
from .errors import ConfigError, YgivenxError, refuse_unknown
from .forest import MAX_TOKENS
from .models.resolve import located
from .report.parts import plain
from .show import visible, visible_json
from .versions import refuse_unsupported

# As linters have it: 1 is news about the rows, 2 about the call, so that a script can tell them apart.
OK, FINDINGS, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    # They print local variables: rows, and perhaps tokens of a hub, would stand in logs.
    pretty_exceptions_enable=False,
    help="log Pr(y|x), exact, proven and cheap. Exit codes: 0 ok, 1 findings, 2 usage or input error.",
)


def _version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"ygivenx {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None: ...


# Commands import what they need when they run: `ygx --help` loads no torch.
Data = Annotated[str, typer.Argument(help="JSONL, JSON, CSV, Parquet, Arrow, or a saved dataset's directory")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
RowNumber = Annotated[int, typer.Option("--row", min=0, help="which row, from 0")]
Suppress = Annotated[
    list[str] | None, typer.Option("--suppress", help="rule=reason: findings that are meant; may be repeated")
]


def _severity(name: str) -> str:
    """Raise ConfigError for what is no severity before any work is done."""
    from .proof.rules import SEVERITIES

    refuse_unknown("severity", [name], SEVERITIES, "--fail-on")
    return name


FailOn = Annotated[
    str,
    typer.Option(
        "--fail-on", callback=_severity, help="exit with 1 from this severity: error, warning or info"
    ),
]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="write the page there")]
RayWorkers = Annotated[
    int, typer.Option("--ray", min=0, help="workers of a Ray cluster (extra: ray); 0: none")
]


def command(**settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of `ygx` whose parameters may be sections of options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        unset = settings.pop("unset", False)
        app.command(**settings)(with_sections(function, unset))
        return function

    return register


# -- commands ----------------------------------------------------------------------------------------------


def emit(document: Any) -> None:
    """One JSON document on standard output; non-finite numbers become null."""
    text = json.dumps(plain(document), ensure_ascii=False, indent=1, allow_nan=False)
    print(visible_json(text))


@command()
def show(
    data: Data, source: ModelOptions, columns: ColumnOptions, encoder: EncoderSection, row: RowNumber = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="first what inference shows, what the row renders to, and where they part")
    ] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Print one row as the model reads it, its trained tokens coloured.

    Example: `ygx show data.jsonl --model sample --row 3`
    """
    from .commands.explain import explained
    from .encoder.rated import PreferenceEncoder
    from .rows.nouns import Preference, Rated

    reader = open_rows(data, columns, row + 1)
    encode_row, item = open_encoder(source, encoder), row_of(reader, row)
    if explain:
        for line in explained(encode_row.tokenizer, item.value):
            say(line)
    is_rated = isinstance(item.value, Preference | Rated)
    example: Any = (PreferenceEncoder(encode_row) if is_rated else encode_row)(item)
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


@command()
def encode(
    data: Data, source: ModelOptions, rows: EncodedRowOptions, encoder: EncoderSection,
    output: Annotated[Path, typer.Option("--output", "-o", help="a Parquet file; with --to also .jsonl")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file of that name")] = False,
    to: Annotated[
        str | None,
        typer.Option(
            help="the columns of one trainer: trl, axolotl, torchtune, skyrl, verl; of rated rows trl-pairs, trl-kto",
            show_default="all of ours",
        ),
    ] = None,
    ray: RayWorkers = 0, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Ids, weights, labels, positions and segments of every row as Parquet, for a plain loop or another trainer.

    Example: `ygx encode data.jsonl --model sample -o encoded.parquet --to trl`
    """
    from .commands.encoding import Cores, accepted, chunks, hand_over, part_of
    from .commands.progress import shown
    from .rows.export import write_tables
    from .rows.files import count_of_rows

    if output.exists() and not overwrite:
        raise ConfigError("the file exists", where=f"--output {output}", fix="--overwrite replaces it")
    if to is None and output.suffix != ".parquet":
        fix = "name a .parquet file, or give --to for JSON Lines"
        raise ConfigError("what is written is Parquet", where=f"--output {output}", fix=fix)
    reader = open_rows(data, rows)
    account = Account(reader.format, rows.quarantine)
    if to is not None:
        if ray:
            raise ConfigError(f"--to {to} beside --ray", fix="leave --ray out")
        sequences = hand_over(reader, open_encoder(source, encoder), to, output, account, rows.processes)
    elif ray:
        from .scores.clusters import encoded_on_ray

        place = located(str(source.path), source.gguf_file)
        items = encoded_on_ray(*place, iter(reader), workers=ray, **options_of(encoder))
        sequences = write_tables(accepted(map(part_of, chunks(items, 512)), account), output)
    else:
        with Cores(open_encoder(source, encoder), rows.processes) as cores:
            tables = accepted(cores.parts(reader), account)
            total = count_of_rows(data, rows.limit)
            sequences = write_tables(
                shown(err, tables, lambda: "encoding", lambda _: account.read, total), output
            )
    document = account.close() | {"sequences": sequences, "output": str(output)}
    if as_json:
        emit(document)


@command()
def pack(
    data: Data, source: ModelOptions, rows: EncodedRowOptions, encoder: EncoderSection,
    max_tokens: Annotated[int, typer.Option(min=2, help="distinct tokens of a pack")] = MAX_TOKENS,
    rated: Annotated[
        bool, typer.Option("--rated", help="rows of rated replies, as `ygx train --objective` takes them")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what packs would bring; write nothing")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """How much faster sharing can make a run over these rows: the limit, and what packs of a size reach of it.

    Example: `ygx pack --dry-run data.jsonl --model sample`
    """
    from .commands.encoding import accepted_of, items_of
    from .commands.packing import sharing_of
    from .encoder.rated import PreferenceEncoder

    if not dry_run:
        fix = "add --dry-run; `ygx train` makes packs by itself, and in Python `yx.pack`"
        raise ConfigError("packs aren't written", fix=fix)
    reader = open_rows(data, rows)
    encode_row: Any = open_encoder(source, encoder)
    account = Account(reader.format, rows.quarantine)
    items = items_of(reader, PreferenceEncoder(encode_row) if rated else encode_row, rows.processes)
    examples = list(accepted_of(items, account))
    document, sharing = account.close(), sharing_of(examples, max_tokens)
    if as_json:
        emit(document | sharing.to_dict())
    else:
        print(sharing)


@command()
def ledger(
    data: Data, weights: Weights, columns: ColumnOptions, encoder: EncoderSection, row: RowNumber = 0,
    html: HtmlFile = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Where the log-probability of one row goes, by segment; marginal + conditional = joint.

    Example: `ygx ledger data.jsonl --model sample --row 3`
    """
    from .scores.ledger import ledger as account_for

    reader = open_rows(data, columns, row + 1)
    loaded, _ = open_model(weights, weights.dtype)
    book = account_for(loaded, the_row(reader, open_encoder(weights, encoder), row))
    if html is not None:
        _ledger_page(book, row).write(html)
    if as_json:
        emit(book.to_dict())
    else:
        print(visible(str(book)))
    if not book.balanced:
        raise typer.Exit(FINDINGS)


def _ledger_page(book: Any, row: int) -> Any:
    from .report import LedgerTable, Page, TokenStrip, made_by
    from .report.parts import verdict_of

    strips = [
        TokenStrip.of(s, log_p, title=f"row {row}, sequence {i}")
        for i, (s, log_p) in enumerate(zip(book.sequences, book.log_p, strict=True))
    ]
    return Page(
        title=f"Ledger of row {row}",
        verdict=f"marginal + conditional = joint: {verdict_of(book)}",
        ledgers=[LedgerTable.of(book, f"row {row}")],
        rows=strips,
        about=made_by(),
    )


@command()
def score(
    data: Data, weights: Weights, rows: RowOptions, scoring: Scoring,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=".jsonl or .parquet; standard output if left out")
    ] = None,
    ray: RayWorkers = 0, as_json: AsJson = False,
) -> None:  # fmt: skip
    """log Pr(x), log Pr(y|x) and log Pr([x,y]) of every row, in nats. Run it again to go on where it ended.

    Example: `ygx score pairs.jsonl --model sample -o scores.jsonl`
    """
    from .commands.scorerun import score_file

    account = score_file(data, weights, rows, scoring, output, ray=ray, console=err, silent=as_json)
    if as_json:
        emit(account)


@command()
def audit(
    source: ModelOptions, rows: LimitedRowOptions, encoder: EncoderSection, outputs: ReportOutputs,
    data: Annotated[
        str | None,
        typer.Argument(help="rows in JSONL, JSON, CSV, Parquet, Arrow, or a saved dataset's directory"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="token ids with labels or masks that a trainer made of the rows: a saved dataset, a file"),
    ] = None,
    suppress: Suppress = None, fail_on: FailOn = "warning", as_json: AsJson = False,
) -> None:  # fmt: skip
    """What is wrong with rows and a tokenizer, or with what a trainer made of them, before a run.

    Example: `ygx audit data.jsonl --model sample --fail-on error --html audit.html`

    Example: `ygx audit data.jsonl --labels last_run_prepared/1a2b3c --model sample`
    """
    from .commands.auditing import audited

    report = audited(data, labels, source, rows, encoder, reasons(suppress))
    finish(report, fail_on, outputs, as_json)


@command()
def compare(
    data: Data, source: ModelOptions, columns: ColumnOptions, encoder: EncoderSection,
    with_: Annotated[
        str,
        typer.Option("--with", help="trainers, separated by commas, each perhaps with the place where it is installed: "
                     "trl,axolotl=/venvs/axolotl"),
    ],
    limit: Annotated[int, typer.Option(min=1, help="how many rows")] = 3,
    setting: Annotated[list[str] | None, typer.Option(help="of a trainer's settings, only these")] = None,
    html: HtmlFile = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Who trains what: installed trainers' own preprocessing of your rows, token by token, beside ours.

    Example: `ygx compare chats.jsonl --with trl,transformers --model sample --html compare.html`
    """
    from .commands.comparing import compared

    compared(data, source, columns, encoder, with_, limit, setting, html, as_json)


@command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,  # what follows the script is the script's, --json and --data too
    }
)
def probe(
    context: typer.Context,
    script: Annotated[
        str, typer.Argument(help="a training script or command (trl, axolotl, …); its own arguments follow it")
    ],
    columns: ColumnOptions,
    outputs: ReportOutputs,
    data: Annotated[
        str | None, typer.Option(help="the rows that it trains on, where its dataset holds token ids alone")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="a model's directory, where the one that is trained names no tokenizer")
    ] = None,
    suppress: Suppress = None, fail_on: FailOn = "warning", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run a training up to its first step, and read from the gradient of one step what it really trains.

    A script or a console command, with a trainer of transformers or TRL or with a loop of its own; options of ours come
    before it. Nothing of the run changes.

    Example: `ygx probe --data rows.jsonl --html probe.html train.py --epochs 3`
    """
    from .commands.probe_script import at_train, examined, in_command, output_aside

    options: dict[str, Any] = {"data": data, "columns": asdict(columns), "tokenizer": tokenizer}
    options["suppress"] = reasons(suppress)
    with output_aside() if as_json else nullcontext():
        if Path(script).suffix == ".py" or shutil.which(script) is None:
            report = at_train(Path(script), context.args, lambda found: examined(found, **options))
        else:
            report = in_command([script, *context.args], options, outputs.html)
            outputs = replace(outputs, html=None)  # written there, where the rows are
    finish(report, fail_on, outputs, as_json)


def reasons(suppress: list[str] | None) -> dict[str, str]:
    """`rule=reason` options as a mapping."""
    pairs = [s.partition("=") for s in suppress or []]
    return {rule.strip(): reason for rule, _, reason in pairs}


def finish(report: Any, fail_on: str, outputs: ReportOutputs, as_json: bool) -> None:
    """Write and print an audit's report; the exit code says whether a finding is severe enough."""
    if outputs.html is not None:
        report.to_html(outputs.html)
    written = {outputs.sarif: report.to_sarif, outputs.junit: lambda: report.to_junit(fail_on)}
    for name, make in written.items():
        if name is not None:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(make(), encoding="utf-8")
    print(visible_json(report.to_json()) if as_json else in_flags(str(report)))
    raise typer.Exit(report.exit_code(fail_on))


@command(unset=True)
def train(
    data: DataSection, model: ModelSection, output: OutputSection, encoder: EncoderSection, lora: LoraSection,
    objective: ObjectiveSection, training: TrainingSection,
    config: Annotated[
        Path | None, typer.Argument(help="a YAML file, see --init; flags override it", show_default=False)
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="write a commented YAML file of all options there, and do nothing else")
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Fine-tune on log Pr(y|x): loss on the tokens of y alone.

    Example: `ygx train --data train.jsonl --x question --y answer --model sample --output-dir runs/a`
    """
    if init is not None:
        return _write_template(init)
    flags = {"data": data, "model": model, "output": output, "encoder": encoder, "lora": lora}
    checked = TrainConfig.of(config, flags | {"objective": objective, "training": training})
    from .commands.finetune import finetune

    result = finetune(checked, err)
    if as_json and not err.quiet:  # of several ranks one speaks
        emit(result)


def _write_template(path: Path) -> None:
    if path.exists():
        raise ConfigError("the file exists", where=f"--init {path}", fix="name another one")
    path.write_text(template(), encoding="utf-8")
    say(f"wrote {path}: edit it, then `ygx train {path}`")


@command()
def generate(
    weights: Weights, sampling: Sampling,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="a user's message; may be repeated", show_default="a chat"),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """What the model writes, as it writes it: after the template's own prompt, up to its stop tokens.

    Without --prompt, each line of standard input is the next message of one chat.

    Example: `ygx generate --model runs/a/final --prompt "What is 2+2?"`
    """
    from .commands.generate import replies

    found = replies(weights, sampling, prompt, silent=as_json)
    if as_json:
        emit(found)


@command()
def merge(
    adapter: Annotated[str, typer.Argument(help="a folder with an adapter, such as a run's `final`")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the plain model's folder")],
    dtype: Annotated[
        str, typer.Option(help="of the merged weights: float32, bfloat16 or float16")
    ] = "float32",
    verbose: Annotated[bool, typer.Option("--verbose", help="show what other libraries say")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a LoRA adapter into its base: a plain model that every program loads.

    Example: `ygx merge runs/a/final -o runs/a/merged`
    """
    import torch

    from .commands import adapters
    from .commands.quiet import quiet

    refuse_unknown("dtype", [dtype], ("float32", "bfloat16", "float16"))
    with quiet(verbose):
        adapters.merge(adapter, output, getattr(torch, dtype))
    say(f"merged: {output}")
    if as_json:
        emit({"model": str(output), "dtype": dtype})


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="where result.json and report.html go")] = Path(
        "runs/demo"
    ),
    control: Annotated[bool, typer.Option("--control", help="also train on all tokens, and compare")] = False,
    seed: Annotated[int, typer.Option(help="of the task and of the training")] = 0,
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
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="what would run for this model, too")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="the GGUF file inside the model's directory")] = None,
    as_json: AsJson = False,
) -> None:
    """What is installed, which routes and dtype will run, and what is missing for what.

    Example: `ygx doctor --model sample`
    """
    from .commands.doctor import as_text, examine

    found = examine((model, gguf_file) if model else None)
    if as_json:
        emit(found)
    else:
        print(as_text(found))


def main() -> None:
    """Entry point: errors of ours are printed in full on standard error, with exit code 2."""
    if sys.argv[1:2] != ["probe"] and "--verbose" not in sys.argv:  # a probed script has its own bars
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    try:
        refuse_unsupported()
        app(standalone_mode=True)
    except YgivenxError as error:
        err.print(
            f"error: {in_flags(str(error))}", style="bold red", highlight=False, markup=False, soft_wrap=True
        )
        sys.exit(USAGE)
    # `ygx score ... | head`: whoever reads has had enough, and nothing went wrong.
    except BrokenPipeError:
        sys.exit(OK)
    except Exception:
        # One that nobody foresaw, or a probed script's own: an exit with 1 would say that there are findings.
        traceback.print_exc()
        sys.exit(USAGE)

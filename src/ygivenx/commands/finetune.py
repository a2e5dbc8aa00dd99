"""One fine-tune from a config: rows → examples → packs → Trainer → a model on disk."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..disk import locked
from ..encoded import EncodedRows
from ..encoder.rated import PreferenceEncoder
from ..errors import ConfigError
from ..models.sharing import describe_routes
from ..proof.limits import Limits
from ..sequence import Sequence
from ..show import plural
from ..training import checkpoint, runs
from ..training.interrupts import Interrupts
from ..training.precision import multiplies_bfloat16
from ..training.preference_trainer import PreferenceTrainer
from ..training.rated import rated_sequences
from ..training.trainer import Trainer, refuse_unused
from . import adapters
from .config import TrainConfig, TrainingSection, chosen
from .encoding import kept_rows, rated_rows
from .inputs import open_encoder, open_model, say
from .modelcard import write_card
from .progress import RichProgress, trained
from .quiet import quiet

SHOWN_ROWS = 20  # on the page
RATE, RATE_OF_ADAPTERS = 2e-5, 2e-4  # adapters start at 0 and have few weights: they bear ten times the rate
# What the page says first: the first of these that was logged.
FIGURES = {
    "eval_conditional_nats": "held-out replies: {} nats per token",
    "eval_loss": "held-out loss: {}",
    "loss": "loss: {}",
}
QUARANTINE = (
    "`ygx encode DATA --model MODEL -o FILE --quarantine REJECTED` writes each of them with its reason"
)
KEPT = "training"  # the lock of an output directory


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights, and the mixed precision that products run in."""

    weights: str
    bf16: bool = False
    fp16: bool = False


def finetune(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Run it, printing what is read and trained; returns the counts and the last metrics.

    What can be wrong with the config, the output directory and the rows is found before the model is loaded.
    """
    directory = Path(str(config.output.dir))
    _refuse_unwritable(directory)
    with quiet(config.model.verbose):
        args = arguments_of(config)
        console.quiet = console.quiet or args.process_index > 0
        with locked(directory / KEPT, "ygx train", args.process_index == 0):
            return _finetune(config, args, console)


def _finetune(config: TrainConfig, args: TrainingArguments, console: Console) -> dict[str, Any]:
    started = time.perf_counter()
    directory = Path(args.output_dir)
    start = checkpoint.start(directory, config.output.resume)
    encoder = encoder_of(config, start)
    examples, account = rows_of(config, args, encoder, console)
    held_out = rows_of(config, args, encoder, console, held_out=True)[0] if config.data.eval_path else None
    model, tokenizer = open_model(config.model, precision_of(config.model.dtype).weights)
    if config.lora.further and args.process_index == 0:
        adapters.write_base(model, config.model, directory)
    # Adapters' runs have a hash of their frozen base of themselves.
    base = {} if config.lora.further else {"base_weights": runs.hash_of(model.parameters())}
    runs.refuse_another_base(start, base)
    notes = {"now": getattr(encoder, "encoder", encoder).now.isoformat(), **base}
    trainer = build(
        config, args, adapters.adapted(model, config.lora), tokenizer, examples, held_out, console, notes
    )
    say(str(trainer.train_dataset), console)
    _say_too_long(examples, model, console)
    say(describe_routes(model), console)
    before = trainer.evaluate() if held_out else {}
    outcome = run(trainer, start, console)
    after = evaluation(trainer) if held_out else {}
    final = save(config, trainer, account, after)
    page = write_page(config, trainer, held_out or examples, account, before)
    say(f"saved: {final}, and what was trained: {page}", console)
    _say_what_next(config, final, console)
    trainer.end_ranks()  # a process that leaves this to the interpreter's exit may abort there
    return {
        **account,
        "steps": trainer.state.global_step,
        "loss": outcome.training_loss,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "before": before,
        "after": after,
        "model": str(final),
        "report": str(page),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _refuse_unwritable(directory: Path) -> None:
    """Raise ConfigError for an output directory that can't be made or written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        what = "the output directory can't be written to"
        raise ConfigError(what, where=str(directory), why=str(error.strerror)) from error


# -- arguments ---------------------------------------------------------------------------------------------


def precision_of(dtype: str) -> Precision:
    """What a dtype of `ygx train` means on this machine. Raises ConfigError for float16 without a GPU."""
    if dtype in ("bfloat16", "float32"):
        return Precision(dtype)
    if dtype in ("fp16", "float16"):
        if not torch.cuda.is_available():
            raise ConfigError(
                f"--dtype {dtype} needs a GPU",
                why="gradients in float16 have to be scaled, which torch does on GPUs alone",
                fix="--dtype auto takes what this machine is good at",
            )
        return Precision("float32", fp16=True)
    return Precision("float32", bf16=dtype == "bf16" or multiplies_bfloat16())


def arguments_of(config: TrainConfig) -> TrainingArguments:
    """transformers' arguments of a config; with torchrun the ranks find each other here.

    Raises ConfigError for values that transformers refuses, and for settings that forests have no place for.
    """
    own = {f.name for f in fields(TrainingArguments)}
    section = config.training
    named = {f.name: getattr(section, f.name) for f in fields(section) if f.name in own}
    precision = precision_of(config.model.dtype)
    settings: dict[str, Any] = {
        **{k: v for k, v in named.items() if v is not None and k != "gradient_checkpointing"},
        "output_dir": config.output.dir,
        "learning_rate": _rate(config),
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        **_checkpointing(section.gradient_checkpointing),
        "logging_first_step": True,
        **_when(section, config.data.eval_path is not None),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else accelerate sees no ranks without GPUs
        "disable_tqdm": True,
        **section.further,
    }
    try:
        args = TrainingArguments(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError("transformers refuses these settings", where="training", why=str(error)) from error
    refuse_unused(args)
    refuse_lone_ranks(args)
    return args


def _rate(config: TrainConfig) -> float:
    if config.training.learning_rate is not None:
        return config.training.learning_rate
    return RATE_OF_ADAPTERS if config.lora.further else RATE


def _when(section: TrainingSection, held_out: bool) -> dict[str, Any]:
    """When there are evaluations and checkpoints; the best of these needs both at the same steps."""
    save, evaluate = section.save_steps, section.eval_steps
    if section.load_best_model_at_end:
        save = evaluate = save or evaluate or 500
    return {
        "eval_strategy": "steps" if held_out and evaluate else "no",
        "eval_steps": evaluate,
        "save_strategy": "steps" if save else "no",
        "save_steps": save or 500,
        "max_steps": section.max_steps or -1,
    }


def _checkpointing(enabled: bool) -> dict[str, bool]:
    """transformers 5.23 renamed `gradient_checkpointing`, and warns about the old name."""
    new = "activation_checkpointing"
    return {new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing": enabled}


def refuse_lone_ranks(args: Any) -> None:
    """Raise ConfigError where a launcher started several processes that don't know of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != started:
        raise ConfigError(
            f"{started} processes were started, and accelerate found {args.world_size}",
            why="each would train alone and write into the same directory",
            fix="torchrun --nproc_per_node N -m ygivenx train ..., or one process",
        )


# -- rows and the trainer ----------------------------------------------------------------------------------


def encoder_of(config: TrainConfig, start: Path | None) -> Any:
    """The encoder of a config; its time is that of the run which is resumed from checkpoint `start`."""
    before = {} if start is None else runs.recalled(start)
    encoder = open_encoder(config.model, config.encoder, now=before.get("now"))
    return PreferenceEncoder(encoder) if config.objective.further else encoder


def rows_of(
    config: TrainConfig, args: TrainingArguments, encoder: Any, console: Console, *, held_out: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The encoded rows of a run, at least one, and their account. Of several ranks the first one encodes them."""
    data, paths = config.data, config.data.path
    if held_out:
        paths, data = data.eval_path, replace(
            data, split=data.eval_split, limit=data.eval_limit, quarantine=None, mix={}
        )  # fmt: skip
    with args.main_process_first(desc="encoding"):
        if config.objective.further:
            return rated_rows(paths or [], data, encoder)
        return kept_rows(paths or [], data, encoder, console, config.training.seed)


def _say_too_long(rows: Any, model: Any, console: Console) -> None:
    most = Limits.of(model.config, None).context_length
    lengths = (
        rows.length if isinstance(rows, EncodedRows) else np.array([len(s) for row in rows for s in row])
    )
    if most and lengths.max() > most:
        say(
            f"warning: {plural(int((lengths > most).sum()), 'sequence')} beyond the {most:,} tokens that the model was "
            f"made for, the longest of {lengths.max():,}: --max-length {most} quarantines what is longer",
            console,
        )


def build(
    config: TrainConfig, args: TrainingArguments, model: Any, tokenizer: Any, examples: Iterable[Any],
    held_out: Iterable[Any] | None, console: Console, notes: dict[str, Any] | None = None,
) -> Trainer:  # fmt: skip
    """The Trainer of a config, with one progress bar and no other output; `notes` go into its checkpoints."""
    for name in args.report_to:
        if name not in get_available_reporting_integrations():
            raise ConfigError(
                f"{name} can't be reported to: it isn't installed, or nothing that transformers knows",
                where="report_to",
                fix=f"pip install {name}, or one of {', '.join(get_available_reporting_integrations()) or 'none'}",
            )
    objective = config.objective.further
    kind: Any = partial(PreferenceTrainer, objective=objective) if objective else Trainer
    own = {} if objective else {"denominator": config.training.denominator}
    trainer: Trainer = kind(
        model=model,
        args=args,
        train_dataset=examples,
        eval_dataset=held_out,
        processing_class=tokenizer,
        max_tokens=config.training.max_tokens,
        **own,
        notes=notes,
        callbacks=[RichProgress(console)],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


# -- the run -----------------------------------------------------------------------------------------------


def run(trainer: Trainer, start: Path | None, console: Console) -> Any:
    """Train, from a checkpoint if there is one; an interrupted run says where it can be taken up, and exits."""
    if start is not None:
        say(f"going on from {start} (step {runs.steps_done(start)} of {trainer.steps})", console)
    interrupts = Interrupts(lambda text: say(text, console))
    trainer.add_callback(interrupts)
    interrupts.begin()
    try:
        outcome = trained(trainer, start)
    except KeyboardInterrupt:
        interrupts.received = interrupts.received or signal.SIGINT
    finally:
        interrupts.end()
    if not interrupts.received:
        return outcome
    last = checkpoint.newest(Path(trainer.args.output_dir))
    kept = f"this goes on from {last}:\n  {_resuming(sys.argv)}" if last else "no checkpoint was saved"
    say(f"interrupted at step {trainer.state.global_step} of {trainer.steps}: {kept}", console)
    trainer.end_ranks()
    raise SystemExit(128 + interrupts.received)  # what shells call a program that a signal ended


def _resuming(argv: list[str]) -> str:
    """The command line that goes on with a run which was started by `argv`."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    start = "ygx" if ranks == "1" else f"torchrun --nproc_per_node {ranks} -m ygivenx"
    given = [a for a, before in zip(argv[1:], ["", *argv[1:]], strict=False) if "--resume" not in (a, before)]
    return " ".join([start, *map(quote, given), "--resume auto"])


def evaluation(trainer: Trainer) -> dict[str, float]:
    """What evaluation gives, or gave if nothing was trained since."""
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if logged and logged[-1]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {k: v for k, v in logged[-1].items() if k.startswith("eval_")}
    return dict(trainer.evaluate())


# -- what is left ------------------------------------------------------------------------------------------


def save(config: TrainConfig, trainer: Trainer, account: dict[str, Any], after: dict[str, float]) -> Path:
    """`final` in the output directory: a model, or an adapter with its base, and a card."""
    directory = Path(trainer.args.output_dir)
    final = directory / "final"
    with checkpoint.writing(final):
        trainer.save_model(str(final))
        if trainer.is_world_process_zero():
            (final / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine
            if (final / adapters.CONFIG).is_file():
                adapters.embed_base(final, config.model, directory)
            write_card(final, config, trainer, account, after)
    return final


def write_page(
    config: TrainConfig, trainer: Trainer, rows: EncodedRows, account: dict[str, Any],
    before: dict[str, float],
) -> Path:  # fmt: skip
    """`report.html` in the output directory: the curves of the run, and some rows token by token after it.

    before: what evaluation gave before the first step, if there was one.
    """
    from ..forest import Forest
    from ..report import Table, TokenStrip, made_by, run_page
    from ..scores.node_log_probs import node_log_probs

    sequences, names, columns = _shown(rows, trainer.processing_class)
    forest = Forest.of(sequences)
    log_p = node_log_probs(trainer.model.eval(), forest)
    strips = [
        TokenStrip.of(s, log_p[path], title=title)
        for s, title, path in zip(sequences, names, forest.paths, strict=True)
    ]
    left_out = list(account.get("reasons", {}).items())
    which = "held-out rows" if config.data.eval_path else "rows"
    history = [{**before, "step": 0}, *trainer.state.log_history]
    page = run_page(
        history,
        title=f"Training on {', '.join(Path(p).name for p in config.data.path or [])}",
        subtitle=f"{trainer.train_dataset}. Below: {which} after training, as the model reads them.",
        verdict=_verdict(history, account),
        summary={
            "model": Path(str(config.model.path)).name,
            "steps": trainer.state.global_step,
            "rows read": account["read"],
            "quarantined": account["quarantined"],
        },
        tables=[Table("Rows left out, by reason", ["reason", "rows"], left_out, (QUARANTINE,))]
        if left_out
        else [],
        rows=strips,
        columns=columns,
        about=made_by(**chosen(config)),
    )
    target = Path(trainer.args.output_dir) / "report.html"
    return page.write(target) if trainer.is_world_process_zero() else target


def _verdict(history: list[dict[str, Any]], account: dict[str, Any]) -> str:
    """The first and the last figure of held-out replies, else of the loss, and how many rows were left out."""
    for key, what in FIGURES.items():
        values = [entry[key] for entry in history if key in entry]
        if values:
            found = what.format(f"{values[0]:.3f} → {values[-1]:.3f}")
            break
    else:
        found = "nothing was logged"
    left = account["quarantined"]
    return f"{found}; {left:,} of {account['read']:,} rows left out" if left else found


def _shown(rows: Any, tokenizer: Any) -> tuple[list[Sequence], list[str], int]:
    """The sequences of the first rows, with the text of each token, their names, and how many stand side by side."""
    if not isinstance(rows, EncodedRows):
        rated = rows[:SHOWN_ROWS]
        return *rated_sequences(rated), 2 if all(len(row.sequences) == 2 for row in rated) else 1
    shown = [rows[n] for n in range(min(SHOWN_ROWS, len(rows)))]
    with_texts = [replace(s, tokens=tuple(tokenizer.decode([i]) for i in s.ids)) for s in shown]
    return with_texts, [rows.name(n) for n in range(len(shown))], 1


def _say_what_next(config: TrainConfig, final: Path, console: Console) -> None:
    say("what to do next:", console)
    say(f"  ygx generate --model {final} --prompt '...'     # look at what it writes", console)
    say(f"  ygx score ROWS --model {final} -o scores.jsonl  # log Pr(y|x) of rows", console)
    if config.lora.further:
        say(
            f"  ygx merge {final} -o {final.parent / 'merged'}  # a plain model, for vLLM or llama.cpp",
            console,
        )
    say(f'  AutoModelForCausalLM.from_pretrained("{final}")  # in Python, with transformers', console)

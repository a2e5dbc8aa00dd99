"""One fine-tune from a config: rows → examples → packs → Trainer → a model on disk."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console

from ..errors import ConfigError, MissingExtra
from ..models.families import routes_told
from ..proof.limits import Limits
from ..training import checkpoint, runs
from .config import TrainConfig
from .inputs import open_encoder, open_model, open_rows, say, take
from .progress import RichProgress, trained

SHOWN_ROWS = 20  # on the page
INTERRUPTED = 130  # what shells call a program that Ctrl-C ended


def finetune(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Run it, saying aloud what is read and trained; returns the counts and the last metrics.

    What can be wrong with the config, the output directory and the rows is found before the model is loaded.
    """
    started = time.perf_counter()
    _refuse_unwritable(Path(config.output_dir))
    start = checkpoint.start(Path(config.output_dir), config.resume)
    encoder = encoder_of(config, start)
    examples, account = examples_of(config, encoder, config.data, config.split, config.limit)
    held_out = None
    if config.eval_data:
        told = config.eval_data, config.eval_split, config.eval_limit
        held_out, _ = examples_of(config, encoder, *told)
    model, tokenizer = open_model(config.model, config.gguf_file, config.dtype)
    notes = {"now": encoder.now.isoformat()}
    trainer = build(config, adapted(model, config), tokenizer, examples, held_out, console, notes)
    say(str(trainer.train_dataset), console)
    _say_too_long(examples, model, console)
    say(routes_told(model), console)
    before = trainer.evaluate() if held_out else {}
    outcome = run(trainer, start, console)
    after = evaluation(trainer) if held_out else {}
    final = Path(config.output_dir) / "final"
    with checkpoint.writing(final):
        trainer.save_model(str(final))
    page = write_page(config, trainer, held_out or examples, account, before)
    say(f"saved: {final}, and what was trained: {page}", console)
    # The ranks' threads end here: a process that leaves them to the interpreter's exit may abort there.
    trainer.accelerator.end_training()
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


def encoder_of(config: TrainConfig, start: Path | None) -> Any:
    """The encoder of a config; its time is that of the run which is resumed from checkpoint `start`."""
    told = {} if start is None else runs.recalled(start)
    options = {"max_length": config.max_length, "overflow": config.overflow, "now": told.get("now")}
    options |= {"train": config.train, "control": config.control, **(config.encoder or {})}
    return open_encoder(config.model, config.gguf_file, **options)


def examples_of(
    config: TrainConfig, encoder: Any, data: str, split: str | None, limit: int | None
) -> tuple[list[Any], dict[str, Any]]:
    """The examples of some data, at least one, and the account of its rows."""
    reader = open_rows(data, config.format, config.x, config.y, config.plain, limit, split)
    examples, account = take(reader, encoder)
    if not examples:
        raise ConfigError("no row was accepted", where=data, fix="the reasons are above; try `ygx show`")
    return examples, account


def _say_too_long(examples: list[Any], model: Any, console: Console) -> None:
    most = Limits.of(model.config, None).context_length
    lengths = [len(s) for example in examples for s in example]
    if most and max(lengths) > most:
        say(
            f"warning: {sum(n > most for n in lengths):,} sequences are longer than the {most:,} tokens that the model "
            f"was made for, the longest {max(lengths):,}: --max-length {most} quarantines them",
            console,
        )


def run(trainer: Any, start: Path | None, console: Console) -> Any:
    """Train, from a checkpoint if there is one; an interrupted run says where it can be taken up, and exits."""
    if start is not None:
        say(f"resumed from {start} (step {runs.steps_done(start)} of {trainer.steps})", console)
    try:
        return trained(trainer, start)
    except KeyboardInterrupt:
        last = checkpoint.newest(Path(trainer.args.output_dir))
        kept = f"--resume auto goes on from {last}" if last else "no checkpoint was saved (--save-steps)"
        say(f"interrupted at step {trainer.state.global_step} of {trainer.steps}: {kept}", console)
        raise SystemExit(INTERRUPTED) from None


def evaluation(trainer: Any) -> dict[str, float]:
    """What evaluation gives, or gave if nothing was trained since."""
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if logged and logged[-1]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {k: v for k, v in logged[-1].items() if k.startswith("eval_")}
    return dict(trainer.evaluate())


def write_page(
    config: TrainConfig, trainer: Any, examples: list[Any], account: dict[str, Any], before: dict[str, float]
) -> Path:
    """`report.html` in the output directory: the curves of the run, and some rows token by token after it.

    before: what evaluation gave before the first step, if there was one.
    """
    from ..forest import Forest
    from ..report import TokenStrip, run_page
    from ..scores.node_log_probs import node_log_probs
    from ..training.packs import flatten

    sequences, names = flatten(examples[:SHOWN_ROWS])
    forest = Forest.of(sequences)
    log_p = node_log_probs(trainer.model.eval(), forest)
    strips = [
        TokenStrip.of(s, log_p[path], title=title)
        for s, title, path in zip(sequences, names, forest.paths, strict=True)
    ]
    which = "held-out rows" if config.eval_data else "rows"
    page = run_page(
        [{**before, "step": 0}, *trainer.state.log_history],
        title=f"Training on {Path(config.data).name}",
        subtitle=f"{trainer.train_dataset}. Below: {which} after training, as the model reads them.",
        summary={
            "model": config.model,
            "steps": trainer.state.global_step,
            "rows read": account["read"],
            "quarantined": account["quarantined"],
        },
        rows=strips,
    )
    target = Path(config.output_dir) / "report.html"
    return page.write(target) if trainer.is_world_process_zero() else target


def adapted(model: Any, config: TrainConfig) -> Any:
    """The model with LoRA adapters on every linear layer, if the config asks for them."""
    if config.lora is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("peft", "lora", needed_for="lora") from error
    wanted = LoraConfig(
        r=config.lora, lora_alpha=2 * config.lora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, wanted)


def build(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    examples: list[Any],
    held_out: list[Any] | None,
    console: Console,
    notes: dict[str, Any] | None = None,
) -> Any:
    """The Trainer of a config, with one progress bar and no other output; `notes` go into its checkpoints."""
    import torch
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments

    from ..training.trainer import Trainer

    args = TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        **_checkpointing(TrainingArguments, config.gradient_checkpointing),
        logging_steps=config.logging_steps,
        eval_strategy="steps" if held_out and config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=config.save_total_limit,
        seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=examples,
        eval_dataset=held_out,
        processing_class=tokenizer,
        max_tokens=config.max_tokens,
        denominator=config.denominator,
        notes=notes,
        callbacks=[RichProgress(console)],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def _checkpointing(arguments: Any, wanted: bool) -> dict[str, bool]:
    """transformers 5.23 renamed `gradient_checkpointing`, and warns about the old name."""
    new = "activation_checkpointing"
    return {new if new in arguments.__dataclass_fields__ else "gradient_checkpointing": wanted}

"""One fine-tune from a config: rows → examples → packs → Trainer → a model on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError, MissingExtra
from .config import TrainConfig
from .intake import open_encoder, open_model, open_rows, say, take

SHOWN_ROWS = 20  # on the page


def finetune(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Run it, saying aloud what is read and trained; returns the counts and the last metrics."""
    started = time.perf_counter()
    model, tokenizer = open_model(config.model, config.gguf_file, config.dtype)
    further = {"max_length": config.max_length, "overflow": config.overflow, **(config.encoder or {})}
    encoder = open_encoder(
        config.model, config.gguf_file, train=config.train, control=config.control, **further
    )

    def examples_of(path: str, limit: int | None) -> tuple[list[Any], dict[str, Any]]:
        return take(open_rows(path, config.format, config.x, config.y, config.plain, limit), encoder)

    examples, account = examples_of(config.data, config.limit)
    if not examples:
        raise ConfigError(
            "no row was accepted", where=config.data, fix="the reasons are above; try `ygx show`"
        )
    held_out = examples_of(config.eval_data, config.eval_limit)[0] if config.eval_data else None
    trainer = build(config, adapted(model, config), tokenizer, examples, held_out, console)
    say(str(trainer.train_dataset), console)
    before = trainer.evaluate() if held_out else {}
    outcome = trainer.train(resume_from_checkpoint=config.resume)
    after = evaluation(trainer) if held_out else {}
    final = Path(config.output_dir) / "final"
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
    from ..scores.values import node_log_probs

    shown = [(s, f"row {i}") for i, e in enumerate(examples[:SHOWN_ROWS]) for s in e]
    forest = Forest.of([s for s, _ in shown])
    log_p = node_log_probs(trainer.model.eval(), forest)
    strips = [
        TokenStrip.of(s, log_p[path], title=title)
        for (s, title), path in zip(shown, forest.paths, strict=True)
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
) -> Any:
    """The Trainer of a config, with one progress bar and no other output."""
    import torch
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments

    from ..training.trainer import Trainer
    from .progress import RichProgress

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
        callbacks=[RichProgress(console)],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def _checkpointing(arguments: Any, wanted: bool) -> dict[str, bool]:
    """transformers 5.23 renamed `gradient_checkpointing`, and warns about the old name."""
    new = "activation_checkpointing"
    return {new if new in arguments.__dataclass_fields__ else "gradient_checkpointing": wanted}

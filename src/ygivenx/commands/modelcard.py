"""The card of a trained model: data, masks, versions and log-probabilities; no path of the machine."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from .config import TrainConfig

CARD = """---
library_name: transformers
tags: [ygivenx{lora}]
---

# {model}, fine-tuned on log Pr(y|x)

| | |
|---|---|
| base model | {model} |
| rows | {data}: {accepted:,} accepted, {quarantined:,} quarantined of {read:,} |
| trained tokens | policy `{train}`; the loss on all other tokens is exactly 0 |
| objective | {objective} |
| steps | {steps} of at most {max_tokens:,} distinct tokens × {accumulation} |
| learning rate | {rate:g}, {schedule} |
| precision | {dtype} |
| seed | {seed} |
{measured}
Made with ygivenx {ygivenx}, transformers {transformers}, torch {torch}, Python {python}.
"""


def write_card(
    folder: Path, config: TrainConfig, trainer: Any, account: dict[str, Any], after: dict[str, float]
) -> None:
    """Write README.md into a model's folder."""
    section, args = config.training, trainer.args
    (folder / "README.md").write_text(
        CARD.format(
            lora=", lora" if config.lora.further else "",
            model=_name(str(config.model.path)),
            data=", ".join(map(_name, config.data.path or [])),
            train=config.encoder.train,
            objective=_objective(config),
            steps=trainer.state.global_step,
            max_tokens=section.max_tokens,
            accumulation=args.gradient_accumulation_steps,
            rate=args.learning_rate,
            schedule=section.lr_scheduler_type,
            dtype=config.model.dtype,
            seed=section.seed,
            measured=_measured(after),
            ygivenx=__version__,
            python=platform.python_version(),
            **{k: account[k] for k in ("accepted", "quarantined", "read")},
            **{k: version(k) for k in ("transformers", "torch")},
        ),
        encoding="utf-8",
    )


def _objective(config: TrainConfig) -> str:
    options = dict(config.objective.further)
    if not options:
        return f"−log Pr(y\\|x), divided by {config.training.denominator}"
    return ", ".join([str(options.pop("name")), *(f"{k} = {v}" for k, v in options.items())])


def _name(path: str) -> str:
    """A name of the hub as it is; of a path its last part."""
    return Path(path).name if Path(path).exists() else path


def _measured(after: dict[str, float]) -> str:
    pairs = {
        # A bar would end the cell of the table.
        "log Pr(y\\|x)": "conditional_nats", "log Pr(x)": "marginal_nats", "log Pr(good reply)": "chosen_nats",
        "log Pr(bad reply)": "rejected_nats",
    }  # fmt: skip
    found = [
        f"| {label} per held-out token | {-after[f'eval_{key}']:.4f} nats |\n"
        for label, key in pairs.items()
        if f"eval_{key}" in after
    ]
    if "eval_accuracy" in after:
        found.append(f"| held-out pairs in order | {after['eval_accuracy']:.1%} |\n")
    return "".join(found)

"""log Pr(y|x), exact, proven and cheap.

A batch is a forest of tokens with weights on its edges: scoring reads sums of log-probabilities along
paths, training is their weighted sum, and an ordinary padded batch is the case in which nothing is shared.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# One line per public name. Modules load on first use: `import ygivenx` costs nothing, torch included.
_HOME = {
    "Encoder": "encoder.encode",
    "Example": "sequence",
    "Sequence": "sequence",
    "Rejected": "sequence",
    "Forest": "forest",
    "pack": "forest",
    "load": "models.model",
    "keep_freed_memory": "models.memory",
    "loss": "objective",
    "log_probs": "targets",
    "LogProbs": "targets",
    "Targets": "targets",
    "selective_cross_entropy": "head.selective",
    "score": "scores.scoring",
    "ledger": "scores.ledger",
    "check": "scores.ledger",
    "probe": "proof.probing",
    "audit": "proof.auditing",
    "Trainer": "training.trainer",
    "Watch": "proof.callback",
    "YgivenxError": "errors",
    "RowError": "errors",
    "reference": "",  # a module: the definitions
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module(f"{__name__}.reference")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

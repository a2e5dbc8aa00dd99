"""log Pr(y|x), exact, proven and cheap.

A batch is a forest of tokens with weights on its edges: scoring reads sums of log-probabilities along
paths, training is their weighted sum, and an ordinary padded batch is the case in which nothing is shared.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The public names by module. Modules load on first use: `import ygivenx` costs nothing, torch included.
_PUBLIC = {
    "encoder.encode": "Encoder",
    "encoder.rated": "PreferenceEncoder",
    "sequence": "Example Logged RatedExample Rejected Segment Sequence",
    "forest": "Edges Forest pack",
    "models.model": "load",
    "models.memory": "keep_freed_memory",
    "objective": "Loss loss",
    "targets": "LogProbs Targets log_probs",
    "head.selective": "selective_cross_entropy",
    "scores.choices": "best_choice",
    "scores.scoring": "Score ScoreOptions score score_choices score_each",
    "scores.ledger": "Check Ledger check ledger",
    "report.parts": "Finding LedgerRow",
    "proof.probing": "Probe ProbedToken probe",
    "proof.auditing": "Report audit",
    "proof.callback": "Measurement Watch",
    "training.preference_trainer": "PreferenceTrainer",
    "training.trainer": "Trainer",
    "types": "Tokenizer",
    "errors": "CheckpointError ConfigError DataError LossError MissingExtra ModelError RowError YgivenxError",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = [*_HOME, "reference"]

if TYPE_CHECKING:  # the same names for editors and type checkers; tests/test_public.py compares the two
    from . import reference as reference
    from .encoder.encode import Encoder as Encoder
    from .encoder.rated import PreferenceEncoder as PreferenceEncoder
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import DataError as DataError
    from .errors import LossError as LossError
    from .errors import MissingExtra as MissingExtra
    from .errors import ModelError as ModelError
    from .errors import RowError as RowError
    from .errors import YgivenxError as YgivenxError
    from .forest import Edges as Edges
    from .forest import Forest as Forest
    from .forest import pack as pack
    from .head.selective import selective_cross_entropy as selective_cross_entropy
    from .models.memory import keep_freed_memory as keep_freed_memory
    from .models.model import load as load
    from .objective import Loss as Loss
    from .objective import loss as loss
    from .proof.auditing import Report as Report
    from .proof.auditing import audit as audit
    from .proof.callback import Measurement as Measurement
    from .proof.callback import Watch as Watch
    from .proof.probing import Probe as Probe
    from .proof.probing import ProbedToken as ProbedToken
    from .proof.probing import probe as probe
    from .report.parts import Finding as Finding
    from .report.parts import LedgerRow as LedgerRow
    from .scores.choices import best_choice as best_choice
    from .scores.ledger import Check as Check
    from .scores.ledger import Ledger as Ledger
    from .scores.ledger import check as check
    from .scores.ledger import ledger as ledger
    from .scores.scoring import Score as Score
    from .scores.scoring import ScoreOptions as ScoreOptions
    from .scores.scoring import score as score
    from .scores.scoring import score_choices as score_choices
    from .scores.scoring import score_each as score_each
    from .sequence import Example as Example
    from .sequence import Logged as Logged
    from .sequence import RatedExample as RatedExample
    from .sequence import Rejected as Rejected
    from .sequence import Segment as Segment
    from .sequence import Sequence as Sequence
    from .targets import LogProbs as LogProbs
    from .targets import Targets as Targets
    from .targets import log_probs as log_probs
    from .training.preference_trainer import PreferenceTrainer as PreferenceTrainer
    from .training.trainer import Trainer as Trainer
    from .types import Tokenizer as Tokenizer
else:

    def __getattr__(name: str):
        if name == "reference":
            return import_module(f"{__name__}.reference")
        if name in _HOME:
            if _HOME[name] != "errors":
                import_module(f"{__name__}.versions").refuse_unsupported()
            return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Scores: log Pr(x), log Pr(y|x) and log Pr([x, y]) as sums along the paths of a forest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .forest import Forest, pack
from .head import log_probs
from .model import head_of, hidden_states
from .sequence import Sequence

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Score:
    """Log-probabilities of one [x, y], in nats.

    log_p_x: Σ over the tokens of x that have a context; with `conditional_on_first` it leaves out the first
    token, which without a BOS has none. log_p_y_given_x: Σ over the tokens of y. log_p_xy: their joint.
    tokens, tokens_x: tokens of y, and of x (BOS apart). bytes: UTF-8 bytes of y.
    greedy: whether every token of y is the model's most probable one.
    token_log_p: float64 [T] per token of [x, y], NaN where there is no context.
    """

    log_p_x: float
    log_p_y_given_x: float
    log_p_xy: float
    tokens: int
    tokens_x: int
    bytes: int
    greedy: bool
    conditional_on_first: bool
    token_log_p: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def per_token(self) -> float:
        """log Pr(y|x) / tokens of y; NaN for an empty y."""
        return self.log_p_y_given_x / self.tokens if self.tokens else float("nan")

    @property
    def per_byte(self) -> float:
        """log Pr(y|x) / UTF-8 bytes of y; NaN for an empty y."""
        return self.log_p_y_given_x / self.bytes if self.bytes else float("nan")

    def to_dict(self, *, tokens: bool = False) -> dict[str, Any]:
        """Plain types, for JSON; `tokens` adds the value of each token."""
        told = asdict(self) | {"per_token": _json(self.per_token), "per_byte": _json(self.per_byte)}
        values = told.pop("token_log_p")
        told["notes"] = list(self.notes)
        return told | ({"token_log_p": [_json(v) for v in values.tolist()]} if tokens else {})


def score(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[tuple[str, str]],
    *,
    border: str = "joint",
    control: str = "refuse",
    max_tokens: int = 4096,
) -> list[Score]:
    """Score each (x, y) as plain text, in input order. Common prefixes are computed once.

    `border="joint"` tokenises x + y as one text; a token that straddles the border counts as y, with a note.
    `border="split"` tokenises them apart. BOS is added if and only if the tokenizer itself adds one.
    Raises RowError for a pair that can't be encoded (control tokens in the text, an empty x and y, ...).
    """
    from .encode import Encoder

    encoder = Encoder(tokenizer, control=control, eos=False, border="y" if border == "joint" else "split")
    pairs = list(pairs)
    sequences = [encoder({"x": x, "y": y}).only for x, y in pairs]
    return score_sequences(model, sequences, texts=[y for _, y in pairs], max_tokens=max_tokens)


@torch.no_grad()
def score_sequences(
    model: nn.Module, sequences: list[Sequence], *, texts: list[str] | None = None, max_tokens: int = 4096
) -> list[Score]:
    """Score sequences whose segments say what is y; in input order. `texts` are the y's, for their bytes."""
    scores: dict[int, Score] = {}
    for forest in pack(sequences, max_tokens=max_tokens):
        log_p, greedy = _node_values(model, forest)
        for member, path in zip(forest.members, forest.paths, strict=True):
            text = texts[member] if texts else None
            scores[member] = _score(sequences[member], log_p[path], greedy[path], text)
    return [scores[i] for i in range(len(sequences))]


def node_log_probs(model: nn.Module, forest: Forest, **options: Any) -> np.ndarray:
    """log Pr(token | path) of every node, float64 [N]; NaN at roots, which have no context. No gradients."""
    return _node_values(model, forest, **options)[0]


@torch.no_grad()
def _node_values(model: nn.Module, forest: Forest, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    edges = forest.edges(scored=True)
    log_p = np.full(len(forest.token), np.nan)
    greedy = np.ones(len(forest.token), bool)
    if not len(edges.rows):
        return log_p, greedy
    hidden = hidden_states(model, forest, **options)
    head = head_of(model)
    rows, targets = (torch.from_numpy(np.array(a)).to(hidden.device) for a in (edges.rows, edges.targets))
    values = log_probs(
        hidden, head.weight, rows, targets, bias=head.bias, softcap=head.softcap, scale=head.scale, ranks=True
    )
    log_p[edges.nodes] = values.log_p.double().cpu().numpy()
    greedy[edges.nodes] = (values.rank == 0).cpu().numpy()
    return log_p, greedy


def _score(s: Sequence, log_p: np.ndarray, greedy: np.ndarray, text: str | None) -> Score:
    y = s.output
    x = ~y
    known = ~np.isnan(log_p)
    bos = any(g.kind == "bos" for g in s.segments)
    log_p_x, log_p_y = float(log_p[x & known].sum()), float(log_p[y & known].sum())
    notes = s.notes if bos else (*s.notes, "no BOS: sums are conditional on the first token")
    return Score(
        log_p_x=log_p_x,
        log_p_y_given_x=log_p_y,
        log_p_xy=log_p_x + log_p_y,
        tokens=int(y.sum()),
        tokens_x=int(x.sum()) - bos,
        bytes=len(
            (
                text if text is not None else "".join(t for t, out in zip(s.tokens, y, strict=False) if out)
            ).encode()
        ),
        greedy=bool(greedy[y].all()),
        conditional_on_first=not bos,
        token_log_p=log_p,
        notes=notes,
    )


def _json(value: float) -> float | None:
    return None if np.isnan(value) else value

"""Scores: log Pr(x), log Pr(y|x) and log Pr([x, y]) as sums along the paths of a forest.

Equals `ygivenx.reference.score` of each pair by itself, up to the rounding of the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from ..choices import Border, Bos, Control, Route, ScoreBorder, ScoreOverflow, require_choice
from ..errors import RowError, refuse_unknown
from ..forest import Forest, Ints
from ..models.families import config_of, decoder_of, vocabulary
from ..models.position_limits import PositionLimits
from ..report.parts import finite
from ..rows.data import Row
from ..rows.formats import Conversation, Pair
from ..sequence import Example, Sequence
from ..types import Tokenizer
from .node_log_probs import CHUNK_NODES, Float64s, node_values
from .requests import NO_CONTEXT, WINDOW, Request, RequestBuilder, windows

if TYPE_CHECKING:
    from torch import nn

Item = str | tuple[str, str] | Mapping[str, Any] | Sequence | Example | Conversation | Pair | Row
Choices = Item | tuple[str, list[str]] | list[Any]
# A straddling token counts as y where x + y is one text: what the encoder calls border="y".
_ENCODER_BORDER: dict[ScoreBorder, Border] = {"joint": "y", "split": "split"}


@dataclass(frozen=True)
class Score:
    """Log-probabilities of one [x, y], in nats.

    log_p_x: Σ over the tokens of x that have a context; NaN if it wasn't asked for. log_p_y_given_x: Σ over
    the tokens of y. log_p_xy: their joint. With `conditional_on_first` these are conditional on the first
    token, which without a BOS has no probability.
    tokens, tokens_x: tokens of y, and of x (BOS apart). scored: tokens of y that have a probability.
    bytes: UTF-8 bytes of y. truncated: tokens of x that were left out to fit the model's context window.
    greedy: whether every scored token of y is the model's most probable one.
    log_p_y: log Pr(y | the unconditional prompt); None without such a prompt, and where that is empty, there is no
    BOS, and y's first token counts after x alone.
    token_log_p float64 [T] and token_rank int64 [T], per token of [x, y] that was counted, if asked for: NaN
    and −1 where there is no value; rank 0 is the most probable token. token_text: their texts.
    """

    log_p_x: float
    log_p_y_given_x: float
    log_p_xy: float
    tokens: int
    tokens_x: int
    scored: int
    bytes: int
    greedy: bool
    conditional_on_first: bool
    truncated: int = 0
    log_p_y: float | None = None
    token_log_p: Float64s | None = None
    token_rank: Ints | None = None
    token_text: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def per_token(self) -> float:
        """log Pr(y|x) / scored tokens of y; NaN for none."""
        return self.log_p_y_given_x / self.scored if self.scored else math.nan

    @property
    def per_byte(self) -> float:
        """log Pr(y|x) / UTF-8 bytes of y; NaN for an empty y."""
        return self.log_p_y_given_x / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp(−per_token); infinite where that is beyond a float."""
        return math.inf if self.per_token < -709 else math.exp(-self.per_token)

    @property
    def pmi(self) -> float:
        """log Pr(y|x) − log Pr(y | unconditional prompt), nats; NaN without such a prompt."""
        return math.nan if self.log_p_y is None else self.log_p_y_given_x - self.log_p_y

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON: what has no value is None, what wasn't computed is left out."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record |= {n: getattr(self, n) for n in ("per_token", "per_byte", "perplexity")}
        record["pmi"] = None if self.log_p_y is None else self.pmi
        return {k: finite(v) for k, v in record.items() if v is not None}


@dataclass
class Tally:
    """What a run of scoring did so far. tokens: read, each as often as it occurs; distinct: in the forests."""

    scores: int = 0
    tokens: int = 0
    distinct: int = 0
    began: float = field(default_factory=perf_counter)

    @property
    def seconds(self) -> float:
        return perf_counter() - self.began

    @property
    def sharing(self) -> float:
        """Tokens per distinct token: what scoring them one by one would have cost."""
        return self.tokens / max(self.distinct, 1)

    def to_dict(self) -> dict[str, float]:
        """Counts, seconds and rates."""
        seconds = max(self.seconds, 1e-9)
        return {
            "scores": self.scores,
            "tokens": self.tokens,
            "distinct_tokens": self.distinct,
            "sharing": self.sharing,
            "seconds": self.seconds,
            "scores_per_second": self.scores / seconds,
            "distinct_tokens_per_second": self.distinct / seconds,
        }

    def __str__(self) -> str:
        if not self.scores:
            return "no new pairs"
        rates = self.to_dict()
        return (
            f"{rates['scores_per_second']:,.1f} pairs/s, {rates['distinct_tokens_per_second']:,.0f} distinct "
            f"tokens/s, {self.sharing:.2f}× shared"
        )


class ScoreOptions(TypedDict, total=False):
    """What `score` and `score_choices` take by name.

    border: `joint` (the default) tokenises x + y as one text, and a token that straddles the border counts as y, with
    a note; `split` tokenises them apart. bos: True, False, or `auto` (the default): one if and only if the tokenizer
    itself adds one. control: see `Encoder`. overflow: for more than `max_length` tokens (by default the model's context
    window) `refuse` (the default), cut x on the `left`, or `roll` a window over them.
    unconditional: a prompt in the place of x for `Score.pmi`.
    """

    border: ScoreBorder
    bos: Bos
    control: Control
    overflow: ScoreOverflow
    max_length: int | None
    unconditional: str | None


def score(
    model: nn.Module, tokenizer: Tokenizer, items: Iterable[Item], *, marginal: bool = True, tokens: bool = False,
    **options: Unpack[ScoreOptions],
) -> list[Score]:  # fmt: skip
    """The Score of each item, in input order; common prefixes are computed once. Options: see `ScoreOptions`.

    An item is (x, y), a text (all of it y, x empty), a row as `Encoder` takes it, or a Sequence or Example. For
    items with several y's or renderings see `score_choices`. marginal=False spares log Pr(x); tokens=True keeps the
    value and rank of each token.

    Raises RowError for an item that can't be encoded, doesn't fit, or has several scores.

        s, = yx.score(model, tokenizer, [("The capital of France is", " Paris")])
        s.log_p_y_given_x, s.per_token
    """
    built = _built(model, tokenizer, items, options, one_each=True)
    return [of_item[0] for of_item in _scored(model, built, marginal, tokens)]


def score_choices(
    model: nn.Module, tokenizer: Tokenizer, items: Iterable[Choices], *, marginal: bool = True, tokens: bool = False,
    **options: Unpack[ScoreOptions],
) -> list[list[Score]]:  # fmt: skip
    """The Scores of each item, in input order: one per y of (x, [y, ...]), or per rendering of a conversation.

    Items and options are those of `score`, and (x, [y, ...]). Common prefixes are computed once.

        (paris, rome), = yx.score_choices(model, tokenizer, [("The capital of France is", [" Paris", " Rome"])])
    """
    return _scored(model, _built(model, tokenizer, items, options, one_each=False), marginal, tokens)


def _built(
    model: nn.Module, tokenizer: Tokenizer, items: Iterable[Choices], options: ScoreOptions, *, one_each: bool
) -> list[list[Request]]:
    refuse_unknown("option of a score", options, ("marginal", "tokens", *ScoreOptions.__annotations__))
    builder = request_builder_for(model, tokenizer, **options)
    return [_requests_of(builder, number, item, one_each) for number, item in enumerate(items)]


def _scored(model: nn.Module, built: list[list[Request]], marginal: bool, tokens: bool) -> list[list[Score]]:
    results = scores(model, (r for requests in built for r in requests), marginal=marginal, tokens=tokens)
    return [[next(results) for _ in requests] for requests in built]


def _requests_of(builder: RequestBuilder, number: int, item: Choices, one_each: bool) -> list[Request]:
    """The requests of one item, or its RowError with its number."""
    try:
        requests = builder(item)
        if one_each and (len(requests) != 1 or _is_choices(item)):
            raise RowError(
                f"it has {len(requests)} scores",
                reason="several_scores",
                fix="yx.score_choices gives a list per item",
            )
        return requests
    except RowError as error:
        inside = error.where.removeprefix("row 0").removeprefix(
            ", "
        )  # an encoder counts what one call gives it
        error.where = ", ".join(part for part in (f"item {number}", inside) if part)
        raise


def request_builder_for(
    model: nn.Module, tokenizer: Tokenizer, *, border: ScoreBorder = "joint", bos: Bos = "auto",
    control: Control = "refuse", overflow: ScoreOverflow = "refuse", max_length: int | None = None,
    unconditional: str | None = None, now: datetime | str | None = None,
) -> RequestBuilder:  # fmt: skip
    """A RequestBuilder for a model and its tokenizer; options as in `score`, `now` as in `Encoder`."""
    from ..encoder.encode import Encoder

    require_choice("border", border, ScoreBorder)
    # Weights don't matter to scores; with all tokens weighed an empty y isn't refused.
    encoder = Encoder(
        tokenizer, "all", control=control, border=_ENCODER_BORDER[border], bos=bos, eos=False, now=now
    )
    if max_length is None:
        max_length = context_window(model)
    else:
        PositionLimits.of(model).refuse_max_length(max_length)
    return RequestBuilder(encoder, max_length, overflow, unconditional, vocabulary(decoder_of(model)))


def context_window(model: Any) -> int | None:
    """Tokens that a model reads at once, by its config and its tables of positions; None if nothing names a number.

    Where rotary frequencies depend on the length of a text, no more than those up to which they don't: longer
    texts can't be computed together.
    """
    named = getattr(config_of(model), "max_position_embeddings", None)
    return min((n for n in (PositionLimits.of(model).unchanged, named) if n), default=None)


def scores(
    model: nn.Module,
    requests: Iterable[Request],
    *,
    marginal: bool = True,
    tokens: bool = False,
    window: int = WINDOW,
    tally: Tally | None = None,
    chunk: int = CHUNK_NODES,
    route: Route = "auto",
) -> Iterator[Score]:
    """A Score per request, in order, as they come: memory holds one window of requests, however many there are.

    `window`: distinct tokens that are scored together; what is shared within one is computed once. `tally` is
    kept up to date. chunk, route: see `node_values`. Other arguments as in `score`.
    """
    tally = Tally() if tally is None else tally
    for requests_here, forest in windows(requests, window):
        scored = True if marginal else _outputs(requests_here, forest)
        log_p, rank = node_values(model, forest, scored, chunk=chunk, route=route)
        # Paths come in the order in which the requests' sequences were given.
        paths = iter(forest.paths)
        tally.tokens += forest.total
        tally.distinct += len(forest)
        for request in requests_here:
            values = [(log_p[p], rank[p]) for _, p in zip(request.sequences, paths, strict=False)]
            tally.scores += 1
            yield _score(request, values, marginal, tokens)


def _outputs(requests: list[Request], forest: Forest) -> npt.NDArray[np.bool_]:
    """bool [N]: the nodes that are y in some sequence."""
    outputs = np.zeros(len(forest), bool)
    sequences = (s for r in requests for s in r.sequences)
    for path, sequence in zip(forest.paths, sequences, strict=True):
        outputs[path[sequence.output]] = True
    return outputs


def _score(request: Request, values: list[tuple[Float64s, Ints]], marginal: bool, tokens: bool) -> Score:
    parts = [
        (p.sequence.output[p.since :], log_p[p.since :], rank[p.since :])
        for p, (log_p, rank) in zip(request.parts, values, strict=False)
    ]
    y, log_p, rank = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not marginal:  # what is x here may be y of another request, whose values are no part of this one's
        log_p, rank = np.where(y, log_p, np.nan), np.where(y, rank, -1)
    # Windows of one text after the first don't begin with its BOS.
    first = request.parts[0].sequence
    bos = bool(first.segments) and first.segments[0].kind == "bos"
    log_p_x = float(np.nansum(log_p[~y])) if marginal else math.nan
    log_p_y = float(np.nansum(log_p[y]))
    notes = request.notes if bos else (*request.notes, "no BOS: sums are conditional on the first token")
    alone = None if request.alone is None else values[-1][0][request.alone.output]
    if alone is not None and np.isnan(alone).any() and not np.isnan(log_p[y]).any():
        alone, notes = None, (*notes, NO_CONTEXT)  # of other tokens than log Pr(y|x)
    return Score(
        log_p_x=log_p_x,
        log_p_y_given_x=log_p_y,
        log_p_xy=log_p_x + log_p_y,
        tokens=int(y.sum()),
        tokens_x=int((~y).sum()) - bos,
        scored=int((~np.isnan(log_p[y])).sum()),
        bytes=request.bytes,
        greedy=bool((rank[y] <= 0).all()),
        conditional_on_first=not bos,
        truncated=request.truncated,
        log_p_y=None if alone is None else float(np.nansum(alone)),
        token_log_p=log_p if tokens else None,
        token_rank=rank if tokens else None,
        token_text=_texts(request) if tokens else None,
        notes=notes,
    )


def _texts(request: Request) -> tuple[str, ...]:
    return tuple(t for p in request.parts for t in p.sequence.tokens[p.since :])


def _is_choices(item: Choices) -> bool:
    """Whether an item is (x, [y, ...]), even with one y."""
    return isinstance(item, tuple | list) and isinstance(item[0], str) and not isinstance(item[1], str)

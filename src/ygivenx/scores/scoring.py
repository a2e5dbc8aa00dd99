"""Scores: log Pr(x), log Pr(y|x) and log Pr([x, y]) as sums along the paths of a forest.

Equals `ygivenx.reference.score` of each pair by itself, up to the rounding of the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from ..choices import Border, Bos, Control, Route, ScoreBorder, ScoreOverflow, require_choice
from ..errors import RowError, refuse_unknown
from ..forest import Forest, Ints
from ..models.families import config_of, decoder_of, vocabulary
from ..models.position_limits import PositionLimits
from ..report.parts import plain
from ..rows.data import Row
from ..rows.formats import Conversation, Pair
from ..sequence import Example, Sequence
from ..types import Tokenizer
from .counted import counted_tokens as _counted
from .counted import word_starts
from .node_log_probs import CHUNK_NODES, Float64s, NodeValues, node_values
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
    bytes, characters, words: of y: UTF-8 bytes, characters without white space before them, and words between white
    space. truncated: tokens of x that were left out to fit the model's context window.
    greedy: whether every scored token of y is the model's most probable one.
    log_p_y: log Pr(y | the unconditional prompt); None without such a prompt, and where that is empty, there is no
    BOS, and y's first token counts after x alone.
    token_log_p float64 [T] and token_rank int64 [T], per token of [x, y] that was counted, if asked for: NaN
    and −1 where there is no value; rank 0 is the most probable token. token_text: their texts. On request, of the same
    tokens, token_entropy float64 [T] in nats and the k most probable ones, token_top_ids int64 and token_top_log_p
    float64 [T, k], of the distributions that predict them.
    word_text, word_log_p: the words of y with the white space before them, and Σ log p of their tokens.
    word_log_p_corrected: the same of the word and its end, given that a word begins, see `Counted.corrected`.
    segments: for each run of tokens its kind, message and field, whether it is y, how many tokens and their Σ log p.
    """

    log_p_x: float
    log_p_y_given_x: float
    log_p_xy: float
    tokens: int
    tokens_x: int
    scored: int
    bytes: int
    characters: int
    words: int
    greedy: bool
    conditional_on_first: bool
    truncated: int = 0
    log_p_y: float | None = None
    token_log_p: Float64s | None = None
    token_rank: Ints | None = None
    token_text: tuple[str, ...] | None = None
    token_entropy: Float64s | None = None
    token_top_ids: Ints | None = None
    token_top_log_p: Float64s | None = None
    word_text: tuple[str, ...] | None = None
    word_log_p: tuple[float, ...] | None = None
    word_log_p_corrected: tuple[float, ...] | None = None
    segments: tuple[dict[str, Any], ...] | None = None
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
    def per_character(self) -> float:
        """log Pr(y|x) / characters of y, as lm-evaluation-harness's acc_norm divides; NaN for none."""
        return self.log_p_y_given_x / self.characters if self.characters else math.nan

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
        record |= {n: getattr(self, n) for n in ("per_token", "per_byte", "per_character", "perplexity")}
        record["pmi"] = None if self.log_p_y is None else self.pmi
        return {k: plain(v) for k, v in record.items() if v is not None}


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


class Details(NamedTuple):
    """What a Score holds beside its sums: see `ScoreOptions`."""

    tokens: bool = False
    words: bool = False
    segments: bool = False
    entropy: bool = False
    top_k: int = 0
    word_starts: tuple[int, ...] = ()

    def with_corrected_words(self, tokenizer: Tokenizer) -> Details:
        """Words, and their log p corrected for where the tokenizer keeps white space."""
        return self._replace(words=True, word_starts=word_starts(tokenizer))


SUMS = Details()  # and nothing else


class ScoreOptions(TypedDict, total=False):
    """What `score`, `score_choices` and `score_each` take by name.

    border: `joint` (the default) tokenises x + y as one text, and a token that straddles the border counts as y, with
    a note; `split` tokenises them apart. bos: True, False, or `auto` (the default): one if and only if the tokenizer
    itself adds one. control: see `Encoder`. overflow: for more than `max_length` tokens (by default the model's context
    window) `refuse` (the default), cut x on the `left`, `roll` a window over them that reads most of them once, or
    `stride` one that moves by `stride` tokens (half of max_length), so that contexts are longer. window_bos: a BOS
    before each window. unconditional: a prompt in the place of x for `Score.pmi`. marginal: False spares log Pr(x).

    tokens: keep the value and rank of each token; entropy, top_k: of the distribution that predicts each token its
    entropy and the most probable tokens, up to all of the vocabulary. words, segments: sums by word of y, and by
    segment and field of the row. corrected_words: also of each word with its end, given that a word begins.
    """

    border: ScoreBorder
    bos: Bos
    control: Control
    overflow: ScoreOverflow
    max_length: int | None
    stride: int | None
    window_bos: bool
    unconditional: str | None
    marginal: bool
    tokens: bool
    words: bool
    corrected_words: bool
    segments: bool
    entropy: bool
    top_k: int


def score(
    model: nn.Module, tokenizer: Tokenizer, items: Iterable[Item], **options: Unpack[ScoreOptions]
) -> list[Score]:
    """The Score of each item, in input order; common prefixes are computed once. Options: see `ScoreOptions`.

    An item is (x, y), a text (all of it y, x empty), a row as `Encoder` takes it, or a Sequence or Example. For
    items with several y's or renderings see `score_choices`.

    Raises RowError for an item that can't be encoded, doesn't fit, or has several scores; see `score_each`.

        s, = yx.score(model, tokenizer, [("The capital of France is", " Paris")])
        s.log_p_y_given_x, s.per_token
    """
    scored = _scored_items(model, tokenizer, items, options, one_each=True)
    return [found[0] for found in scored if isinstance(found, list)]


def score_choices(
    model: nn.Module, tokenizer: Tokenizer, items: Iterable[Choices], **options: Unpack[ScoreOptions]
) -> list[list[Score]]:
    """The Scores of each item, in input order: one per y of (x, [y, ...]), or per rendering of a conversation.

    Items and options are those of `score`, and (x, [y, ...]). Common prefixes are computed once.
    `best_choice` names the best one.

        (paris, rome), = yx.score_choices(model, tokenizer, [("The capital of France is", [" Paris", " Rome"])])
    """
    scored = _scored_items(model, tokenizer, items, options)
    return [found for found in scored if isinstance(found, list)]


def score_each(
    model: nn.Module, tokenizer: Tokenizer, items: Iterable[Choices], **options: Unpack[ScoreOptions]
) -> list[list[Score] | RowError]:
    """What `score_choices` gives for each item; for one that it would refuse, the error, which names the item."""
    return _scored_items(model, tokenizer, items, options, keep_errors=True)


def _scored_items(
    model: nn.Module, tokenizer: Tokenizer, items: Iterable[Choices], options: ScoreOptions,
    *, one_each: bool = False, keep_errors: bool = False,
) -> list[list[Score] | RowError]:  # fmt: skip
    refuse_unknown("option of a score", options, ScoreOptions.__annotations__)
    of_requests: dict[str, Any] = dict(options)
    details = Details(**{k: of_requests.pop(k) for k in Details._fields if k in options})
    if of_requests.pop("corrected_words", False):
        details = details.with_corrected_words(tokenizer)
    marginal = of_requests.pop("marginal", True)
    builder = request_builder_for(model, tokenizer, **of_requests)
    built: list[list[Request] | RowError] = []
    for number, item in enumerate(items):
        try:
            built.append(_requests_of(builder, number, item, one_each))
        except RowError as error:
            if not keep_errors:
                raise
            built.append(error)
    requests = (r for found in built if isinstance(found, list) for r in found)
    results = scores(model, requests, marginal=marginal, details=details)
    return [found if isinstance(found, RowError) else [next(results) for _ in found] for found in built]


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
    unconditional: str | None = None, stride: int | None = None, window_bos: bool = False,
    now: datetime | str | None = None,
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
    known = vocabulary(decoder_of(model))
    return RequestBuilder(encoder, max_length, overflow, unconditional, known, stride, window_bos)


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
    details: Details = SUMS,
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
    if details.word_starts:
        limit, token = context_window(model), details.word_starts[0]
        requests = (r.closed(token, limit) for r in requests)
    for requests_here, forest in windows(requests, window):
        scored = True if marginal else _outputs(requests_here, forest)
        values = node_values(
            model, forest, scored, chunk=chunk, route=route, entropy=details.entropy, top_k=details.top_k,
            mass_of=details.word_starts,
        )  # fmt: skip
        # Paths come in the order in which the requests' sequences were given.
        paths = iter(forest.paths)
        tally.tokens += forest.total
        tally.distinct += len(forest)
        for request in requests_here:
            by_sequence = [values.of(p) for _, p in zip(request.sequences, paths, strict=False)]
            tally.scores += 1
            yield _scored(request, by_sequence, marginal, details)


def _outputs(requests: list[Request], forest: Forest) -> npt.NDArray[np.bool_]:
    """bool [N]: the nodes that are y in some sequence."""
    outputs = np.zeros(len(forest), bool)
    sequences = (s for r in requests for s in r.sequences)
    for path, sequence in zip(forest.paths, sequences, strict=True):
        outputs[path[sequence.output]] = True
    return outputs


def _scored(request: Request, values: list[NodeValues], marginal: bool, details: Details) -> Score:
    counted = _counted(request, values, marginal)
    y, log_p, rank = counted.y, counted.values.log_p, counted.values.rank
    # Windows of one text after the first don't begin with its BOS.
    first = request.parts[0].sequence
    bos = bool(first.segments) and first.segments[0].kind == "bos"
    log_p_x = float(np.nansum(log_p[~y])) if marginal else math.nan
    log_p_y = float(np.nansum(log_p[y]))
    notes = request.notes if bos else (*request.notes, "no BOS: sums are conditional on the first token")
    alone = None if request.alone is None else values[-1].log_p[request.alone.output]
    if alone is not None and np.isnan(alone).any() and not np.isnan(log_p[y]).any():
        alone, notes = None, (*notes, NO_CONTEXT)  # of other tokens than log Pr(y|x)
    return Score(
        log_p_x=log_p_x,
        log_p_y_given_x=log_p_y,
        log_p_xy=log_p_x + log_p_y,
        tokens=int(y.sum()),
        tokens_x=int((~y).sum()) - bos,
        scored=int((~np.isnan(log_p[y])).sum()),
        bytes=len(request.text.encode()),
        characters=len(request.text.lstrip()),
        words=len(request.text.split()),
        greedy=bool((rank[y] <= 0).all()),
        conditional_on_first=not bos,
        truncated=request.truncated,
        log_p_y=None if alone is None else float(np.nansum(alone)),
        notes=notes,
        **counted.details(details, _after(request, values)),
    )


def _after(request: Request, values: list[NodeValues]) -> float:
    """log Pr of the end of a word after the last token; NaN where it wasn't asked for, or can't be read."""
    mass = None if request.closing is None else values[len(request.parts)].log_mass
    return math.nan if mass is None else float(mass[-1])


def _is_choices(item: Choices) -> bool:
    """Whether an item is (x, [y, ...]), even with one y."""
    return isinstance(item, tuple | list) and isinstance(item[0], str) and not isinstance(item[1], str)

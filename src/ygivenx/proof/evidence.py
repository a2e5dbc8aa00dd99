"""What the audit's rules look at: batches and steps, aligned with what the encoder says of the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..encoded import EncodedRows
from ..sequence import Example, Rejected, Sequence
from .arrays import as_array, documents_of

if TYPE_CHECKING:
    from ..forest import Forest
    from .probing import MicroBatch, Probe
    from .repeats import Repeats

UNKNOWN = "?"  # kind of a token that no known document explains
UNPROVEN = "unproven"  # note of a sequence of a refused row: its x is known, of its y nothing is demanded
MODE = "mode: "  # begins the note of a sequence in another mode of inference than the encoder's
HISTORY, SILENT = 1, 2
_COLUMNS = (
    "ids", "attended", "documents", "target", "weight", "foreign", "codes", "output", "role", "expected", "padding",
)  # fmt: skip
_KINDS = ["", UNKNOWN]  # by code; a role of a row's own is added when it is met


def kinds_among(codes: np.ndarray, kinds: Iterable[str]) -> np.ndarray:
    """bool: which codes are of one of these kinds."""
    numbers = [kind_code(k) for k in kinds]
    table = np.zeros(len(_KINDS), bool)
    table[numbers] = True
    return np.asarray(table[codes], bool)


def kind_code(kind: str) -> int:
    """The number that stands for a segment kind in `ObservedRow.codes`: numbers compare quickly."""
    if kind not in _KINDS:
        _KINDS.append(kind)
    return _KINDS.index(kind)


@dataclass
class ObservedRow:
    """One row of one batch: what was fed, and which of its tokens are trained.

    ids, documents int64 [T]; attended bool [T] by the attention mask; target int64 [T] the token trained at
    each position (−1: none); weight float64 [T]. foreign bool [T]: what predicts the token has a gradient that
    isn't a cross-entropy of any target. padding bool [T]: not attended, or pad tokens at an end that no
    document explains. place: where the row stands, if it is of no batch.
    Alignment with the encoder's sequences fills in codes int16 [T] (of a segment kind, "?" inside a document that
    differs there, "" outside any), output bool [T], role int8 [T] (HISTORY: a reply that another turn's sequence
    trains; SILENT: one that no sequence does; else 0), expected float64 [T] (weight by the encoder, NaN where
    unknown) and the `pieces` found.
    """

    micro_batch: int
    row: int
    ids: np.ndarray
    attended: np.ndarray
    documents: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    foreign: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    place: str = ""
    codes: np.ndarray = field(init=False)
    output: np.ndarray = field(init=False)
    role: np.ndarray = field(init=False)
    expected: np.ndarray = field(init=False)
    padding: np.ndarray = field(init=False)
    pieces: list[MatchedStretch] = field(default_factory=list)
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64), repr=False)  # of joined rows

    def __post_init__(self) -> None:
        size = len(self.ids)
        if not len(self.foreign):
            self.foreign = np.zeros(size, bool)
        self.codes = np.zeros(size, np.int16)
        self.output, self.role = np.zeros(size, bool), np.zeros(size, np.int8)
        self.expected = np.full(size, np.nan)
        self.padding = ~self.attended

    @property
    def trained(self) -> np.ndarray:
        """bool [T]."""
        return np.asarray((self.weight != 0) & np.isfinite(self.weight), bool)

    @property
    def kinds(self) -> np.ndarray:
        """object [T]: the segment kind of each token, in words."""
        kinds: np.ndarray = np.array(_KINDS, object)[self.codes]
        return kinds

    @property
    def where(self) -> str:
        return self.place or f"micro-batch {self.micro_batch}, row {self.row}"


class JoinedRows(ObservedRow):
    """Several rows as one, in which masks are computed at once. starts int64 [rows]: where each begins."""

    def __init__(self, rows: list[ObservedRow]) -> None:
        self.rows = rows
        self.starts = np.cumsum([0, *(len(r.ids) for r in rows)])[:-1]
        for name in _COLUMNS:
            columns = [getattr(r, name) for r in rows]
            setattr(self, name, np.concatenate(columns) if rows else np.zeros(0, np.int64))

    @cached_property
    def trained(self) -> np.ndarray:
        """bool [T]."""
        return np.asarray((self.weight != 0) & np.isfinite(self.weight), bool)

    def row_of(self, at: np.ndarray) -> np.ndarray:
        """Which row each token is of."""
        return np.searchsorted(self.starts, at, "right") - 1


@dataclass(frozen=True)
class MatchedStretch:
    """A stretch [start, stop) of a seen row that is `sequence`, and how far it is."""

    sequence: Sequence
    start: int
    stop: int
    matched: np.ndarray  # bool over the sequence's tokens

    @property
    def proven(self) -> bool:
        """Whether the encoder gave the sequence; False for a row that it refuses."""
        return UNPROVEN not in self.sequence.notes

    @property
    def mode(self) -> str:
        """The switches of the template that the sequence was rendered with; "" for the encoder's own."""
        return next((n.removeprefix(MODE) for n in self.sequence.notes if n.startswith(MODE)), "")

    @property
    def missing_head(self) -> int:
        """Tokens of the sequence before the first that was fed."""
        return int(self.matched.argmax())

    @property
    def missing_tail(self) -> np.ndarray:
        """Indices of the sequence's tokens after the last that was fed."""
        return np.arange(len(self.matched) - int(self.matched[::-1].argmax()), len(self.matched))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation loss as the trainer reports it, and the same batches weighted by their trained tokens."""

    reported: float
    by_token: float


@dataclass
class Evidence:
    """All that is known; rules take what they need. Lists are empty where there is nothing.

    read: rows that were read. scored: (row, log Pr([x,y]), log Pr(x)) of those that hold such columns. encoded: what
    the encoder makes of the rows; rejected: what it or the reader refuses, without the rows themselves.
    """

    read: int = 0
    scored: list[tuple[int, float, float]] = field(default_factory=list)
    encoded: EncodedRows = field(default_factory=lambda: EncodedRows.of([]))
    rows: list[Any] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    tokenizer: Any = None
    stop_ids: frozenset[int] = frozenset()
    context_length: int | None = None
    labels: list[ObservedRow] = field(default_factory=list)
    steps: list[ObservedRow] = field(default_factory=list)
    probe: Probe | None = None
    denominators: list[Denominator] = field(default_factory=list)
    leaks: list[Leak] = field(default_factory=list)
    evaluation: Evaluation | None = None
    unrehearsed: list[str] = field(default_factory=list)
    unmatched: list[int] | None = None  # numbers of rows that no prepared row holds
    repeats: Repeats | None = None  # of all rows, where they are looked at
    empty: tuple[str, ...] = ()  # what was given and holds nothing

    @property
    def seen(self) -> list[ObservedRow]:
        """What is trained: by the gradient where there was a step, else by the labels."""
        return self.steps or self.labels

    @cached_property
    def tokens(self) -> JoinedRows:
        """All tokens of what is trained."""
        return JoinedRows(self.seen)

    @property
    def examples(self) -> Iterator[Example]:
        """The accepted rows."""
        return self.encoded.examples()

    @property
    def accepted(self) -> int:
        """How many rows were accepted."""
        return len(self.encoded.firsts)

    def text(self, ids: Iterable[int]) -> str:
        """The text of token ids for a finding."""
        known = [int(i) for i in ids if i >= 0]
        return self.tokenizer.decode(known) if self.tokenizer is not None else " ".join(map(str, known))


@dataclass(frozen=True, slots=True)
class Denominator:
    """The weight that each trained token of one micro-batch of one rank gets (the median).

    total: Σ weights of the micro-batch. uniform: whether its tokens weigh alike.
    """

    rank: int
    micro_batch: int
    tokens: int
    weight: float
    total: float
    uniform: bool


@dataclass(frozen=True, slots=True)
class Leak:
    """Tokens that depend on others that they should not see; size relative to their own share."""

    what: str  # "document" or "padding"
    where: str
    size: float


def seen_in_batch(batch: Mapping[str, Any], number: int = 0) -> list[ObservedRow]:
    """A collated batch by its labels. labels[i] counts as a target at position i, as in transformers."""
    ids = np.atleast_2d(as_array(batch["input_ids"]))
    labels = np.atleast_2d(as_array(batch["labels"]))
    mask = batch.get("attention_mask")
    plain = mask is not None and np.ndim(mask) == 2
    attended = as_array(mask).astype(bool) if plain else np.ones(ids.shape, bool)
    documents = documents_of(batch.get("position_ids"), attended)
    trained = labels != -100
    trained[:, 0] = False  # the first label has no context: every shifted loss drops it
    target = np.where(trained, labels, -1)
    columns = zip(ids, attended, documents, target, trained.astype(np.float64), strict=True)
    return [ObservedRow(number, i, *column) for i, column in enumerate(columns)]


def seen_in_step(number: int, batch: MicroBatch) -> list[ObservedRow]:
    """The rows of a probed micro-batch by their gradient."""
    rows, width = batch.ids.shape
    # One column more: the last position of a row may be trained to predict something.
    target = np.full((rows, width + 1), -1, np.int64)
    weight = np.zeros((rows, width + 1))
    foreign = np.zeros((rows, width + 1), bool)
    for f in batch.found:
        row, column = divmod(f.row, width)
        if f.target < 0:
            foreign[row, column + 1] = True
            continue
        target[row, column + 1] = f.target
        weight[row, column + 1] += f.weight
    recovered = (target[:, :-1], weight[:, :-1], foreign[:, :-1])
    columns = zip(batch.ids, batch.attended, batch.documents, *recovered, strict=True)
    return [ObservedRow(number, i, *column) for i, column in enumerate(columns)]


def seen_in_forest(
    number: int, batch: MicroBatch, forest: Forest, sequences: list[Sequence]
) -> list[ObservedRow]:
    """The sequences of a probed forest. Where they share an edge, each gets the part that its own weight claims."""
    given = {(f.row, f.target): f.weight for f in batch.found}
    row_of = {int(node): row for row, node in enumerate(forest.fed)}
    claimed, shared = np.zeros(len(forest.token)), np.zeros(len(forest.token))
    for path, sequence in zip(forest.paths, sequences, strict=True):
        claimed[path] += sequence.weights
        shared[path] += 1
    seen = []
    for i, (path, sequence) in enumerate(zip(forest.paths, sequences, strict=True)):
        edges = [(row_of[int(forest.parent[v])], int(forest.token[v])) for v in path[1:]]
        total = np.array([0.0, *(given.get(edge, 0.0) for edge in edges)])
        own = np.where(
            claimed[path] > 0, sequence.weights / np.maximum(claimed[path], 1e-30), 1 / shared[path]
        )
        weight = total * own
        target = np.where(weight != 0, sequence.ids, -1)
        whole = np.ones(len(path), bool)
        seen.append(
            ObservedRow(number, i, sequence.ids, whole, np.zeros(len(path), np.int64), target, weight)
        )
    return seen


def mark_padding(seen: ObservedRow, pad: int | None) -> None:
    """Find padding that no mask declares, and take it out of the documents."""
    if pad is not None and seen.attended.all():
        free = (seen.ids == pad) & np.isin(seen.codes, (kind_code(UNKNOWN), kind_code("")))
        for order in (slice(None), slice(None, None, -1)):
            run = int(np.append(free[order], False).argmin())
            # Unaligned, the last token of the text may itself be the pad token.
            run -= bool(run and order.step and not seen.pieces)
            if run > 1:
                seen.padding[order][:run] = True
    out = seen.padding
    seen.codes[out], seen.output[out], seen.role[out], seen.expected[out] = 0, False, 0, np.nan

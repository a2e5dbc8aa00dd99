"""Rows of token ids, as samplers and trainers log them. The ids stay as they are: nothing is encoded again.

Two shapes, each with columns of many names:

| shape           | ids                                     | which tokens are y                        |
|-----------------|-----------------------------------------|-------------------------------------------|
| prompt and reply | a prompt's ids, a reply's ids           | the reply, or what its mask leaves of it  |
| one list        | input_ids (tokens with response_length) | labels, weights or a mask of equal length |

| written by              | ids                                 | mask                    | log-probabilities     |
|-------------------------|-------------------------------------|-------------------------|-----------------------|
| vLLM                    | prompt_token_ids, token_ids         |                         | logprobs              |
| SGLang                  | prompt_ids or input_ids, output_ids |                         | output_token_logprobs |
| verl                    | prompt_ids, response_ids            | response_mask           | response_logprobs     |
| SkyRL                   | prompt_token_ids, response_ids      | loss_masks              | rollout_logprobs      |
| TRL, prime-rl           | prompt_ids, completion_ids          | completion_mask         | logprobs              |
| slime                   | tokens, response_length             | loss_mask               | rollout_log_probs     |
| TRL, axolotl            | input_ids                           | labels, assistant_masks |                       |
| torchtune               | tokens                              | labels                  |                       |
| ygx encode              | input_ids                           | weights                 |                       |

Padding that `attention_mask` marks at either end is left out. Several documents in one list, by `position_ids` or
`seq_lengths`, are refused: what one of them shows the other isn't known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RowError
from .columns import Record, given
from .nouns import Rated, TokenRow
from .values import agreed, as_list, finite, from_json
from .weights import row_weight

PROMPTS = ("prompt_token_ids", "prompt_ids")
REPLIES = (
    "token_ids", "response_ids", "response_token_ids", "completion_ids", "completion_token_ids", "output_ids",
)  # fmt: skip
WHOLE = ("input_ids", "tokens")
MASKS = (
    "loss_mask", "loss_masks", "response_mask", "completion_mask", "assistant_masks", "assistant_mask", "tool_mask",
)  # fmt: skip
# Those of the policy before its update, as the trainer computed them, are another quantity than the sampler's, and what
# a ratio of policies divides by: where a row has both, they are taken.
OLD_LOG_PROBS = ("old_log_probs", "old_per_token_logps")
SAMPLED_LOG_PROBS = (
    "logprobs", "log_probs", "response_logprobs", "completion_logprobs", "rollout_logprobs", "rollout_log_probs",
    "sampling_per_token_logps", "output_token_logprobs", "token_logprobs",
)  # fmt: skip
LOG_PROBS = (*OLD_LOG_PROBS, *SAMPLED_LOG_PROBS)
ADVANTAGES = ("advantages", "advantage")
REWARDS = ("reward", "rewards", "score", "reward_score")
_STRUCTURE = ("attention_mask", "position_ids", "seq_lengths", "response_length", "prompt_mask")
OPTIONAL = ("labels", "weights", *MASKS, *LOG_PROBS, *ADVANTAGES, *REWARDS, *_STRUCTURE)

_MAX_ID = 2**31 - 1
_ROUNDING = 0.01  # a log-probability may be so far above 0
_ALL_TRAINED = "the row has no mask: every token is trained"
_FIRST = "the first token has no context to be predicted from: it isn't trained"


def token_columns(columns: Iterable[str]) -> tuple[str, ...] | None:
    """The columns that hold ids: (prompt, reply) or (whole,); None where these columns hold none."""
    columns = set(columns)
    prompt, reply, whole = (
        next((c for c in names if c in columns), None) for names in (PROMPTS, REPLIES, WHOLE)
    )
    # Of the name `tokens` there are lists of texts, too.
    if whole == "tokens" and columns.isdisjoint(("response_length", "labels")):
        whole = None
    if reply and (prompt or whole == "input_ids") and "attention_mask" not in columns:
        return (prompt or "input_ids", reply)
    if whole:
        return (whole,)
    return (prompt, reply) if prompt and reply else None


def of_tokens(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> TokenRow:
    """A row of ids with the weights, log-probabilities and advantages that it has for them."""
    parts = [_ids(row[c], c) for c in required]
    for names in (PROMPTS, REPLIES) if len(parts) == 2 else ():
        agreed(row, names, read=lambda c: _ids(row[c], c), same=np.array_equal)
    ids = np.concatenate(parts)
    prompt_length = len(parts[0]) if len(parts) == 2 else _prompt_length(row, len(ids))
    rows = _PerToken(row, ids, prompt_length)
    weights, notes = _weights(rows, ids)
    # `loss_mask` is a list of tokens' weights here, and one weight of the row elsewhere.
    weights *= row_weight({k: v for k, v in row.items() if k not in MASKS})
    sampled, old = (rows.agreed(names, rows.log_probs) for names in (SAMPLED_LOG_PROBS, OLD_LOG_PROBS))
    log_probs, advantages = sampled if old is None else old, rows.agreed(ADVANTAGES, rows.advantages)
    kept = _unpadded(rows)
    if not kept.stop:
        raise RowError("the row has no tokens", reason="empty_tokens", field=required[-1])
    _refuse_several(rows, kept)
    weights = weights[kept]
    if weights[:1].any():
        weights[:1], notes = 0, (*notes, _FIRST)
    return TokenRow(
        ids[kept], weights, max(prompt_length - kept.start, 0), _cut(log_probs, kept), _cut(advantages, kept),
        _reward(row), notes,
    )  # fmt: skip


def of_token_pair(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Rated:
    """TRL's ids of a prompt, a better reply and a worse one."""
    prompt, *replies = required
    chosen, rejected = (of_tokens({c: row[c] for c in (prompt, reply)}, (prompt, reply)) for reply in replies)
    return Rated((chosen, rejected), (1.0, -1.0), row_weight(row), ("chosen", "rejected"))


def _cut(values: npt.NDArray[np.float32] | None, kept: slice) -> npt.NDArray[np.float32] | None:
    return None if values is None else values[kept]


def _ids(value: Any, column: str) -> npt.NDArray[np.int64]:
    items = as_list(from_json(value, column), column)
    if len(items) == 1 and isinstance(items[0], list | tuple):  # a batch of one
        items = list(items[0])
    for i, item in enumerate(items):
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= _MAX_ID:
            what = f"{item!a:.60} is no token id"
            raise RowError(what, reason="bad_token", field=f"{column}[{i}]", fix="give whole numbers ≥ 0")
    return np.array(items, np.int64)


def _prompt_length(row: Record, length: int) -> int:
    reply = row.get("response_length")
    if reply is None:
        return 0
    if not isinstance(reply, int) or isinstance(reply, bool) or not 0 <= reply <= length:
        what = f"response_length is {reply!a:.60} of {length} tokens"
        raise RowError(what, reason="conflict", field="response_length")
    return length - reply


class _PerToken:
    """Columns with a value for each token: of all of them, or of the reply alone."""

    def __init__(self, row: Record, ids: npt.NDArray[np.int64], prompt_length: int) -> None:
        self.row, self.ids, self.length, self.prompt_length = row, ids, len(ids), prompt_length

    def agreed(self, names: Iterable[str], read: Callable[[str], Any]) -> Any:
        """float32 [T] of these columns, which must agree; None where the row has none of them."""
        return agreed(self.row, names, read=read, same=lambda a, b: np.array_equal(a, b, equal_nan=True))

    def log_probs(self, column: str) -> npt.NDArray[np.float32]:
        """float32 [T]: log Pr of each token; NaN where there is none."""
        values = self.column(column, np.nan, _log_prob)
        for i in np.flatnonzero((values > _ROUNDING) | np.isinf(values)).tolist():
            what, why = (
                f"{values[i]:g} is no log-probability",
                "the logarithm of a probability is finite and ≤ 0",
            )
            fix = "give natural logarithms; SGLang's entries are [log-probability, id, text]"
            at = f"{column}[{i - self.length + len(self.items(column))}]"
            raise RowError(what, reason="bad_log_prob", field=at, why=why, fix=fix)
        return values

    def advantages(self, column: str) -> npt.NDArray[np.float32]:
        """float32 [T]: a number for each token, or one for all of the reply."""
        value = from_json(self.row[column], column)
        if isinstance(value, list | tuple):
            return self.column(column, 0.0, lambda v, at, _: finite(v, at))
        advantages = np.full(self.length, finite(value, column), np.float32)
        advantages[: self.prompt_length] = 0
        return advantages

    def items(self, column: str) -> list[Any]:
        """The values of a column, of all tokens or of the reply's."""
        items = as_list(from_json(self.row[column], column), column)
        if len(items) == 1 and isinstance(items[0], list) and not self._is_entry(items[0]):
            items = items[0]
        missing = self.length - len(items)
        if missing not in (0, self.prompt_length):
            what = f"{len(items)} values for {self.length} tokens"
            what += f", {self.length - self.prompt_length} of them the reply's" if self.prompt_length else ""
            raise RowError(what, reason="wrong_length", field=column)
        return items

    def _is_entry(self, item: list[Any]) -> bool:
        """Whether a list is SGLang's entry of the only token, and not the values of a batch of one."""
        if self.length - self.prompt_length != 1 or len(item) not in (2, 3):
            return False
        return isinstance(item[1], int) or isinstance(item[-1], str)

    def column(self, column: str, outside: float, read: Callable[..., float]) -> npt.NDArray[np.float32]:
        """float32 [T] of a column; `outside` the reply where it is shorter. read: of an item, its place and token."""
        items = self.items(column)
        missing = self.length - len(items)
        tokens = self.ids[missing:].tolist()
        values = [read(v, f"{column}[{i}]", t) for i, (v, t) in enumerate(zip(items, tokens, strict=True))]
        return np.array([outside] * missing + values, np.float32)


def _number(item: Any, at: str, token: int) -> float:
    """A number; NaN for null."""
    if item is None:
        return float("nan")
    if not isinstance(item, int | float):
        raise RowError(f"{item!a:.60} is no number", reason="wrong_type", field=at)
    return float(item)


def _log_prob(item: Any, at: str, token: int) -> float:
    """A token's log-probability, of vLLM's and SGLang's richer entries, too; NaN for null, as of a first token."""
    if isinstance(item, Mapping) and "logprob" not in item:  # vLLM: {id: {"logprob": …, "rank": …}, …}
        if (item := item.get(str(token), item.get(token))) is None:
            what = f"there is no log-probability of the token {token} itself"
            raise RowError(what, reason="missing_field", field=at, fix="log that of each sampled token")
    elif isinstance(item, list | tuple) and item:  # SGLang: (log-probability, id, text)
        item, own = item[0], item[1] if len(item) > 1 else None
        if own not in (None, token):
            what, why = (
                f"the id {own!a:.60} beside the token {token}",
                "it is another token's log-probability",
            )
            fix = "entries are [log-probability, id, text], in the order of the row's ids"
            raise RowError(what, reason="conflict", field=at, why=why, fix=fix)
    return _number(item.get("logprob") if isinstance(item, Mapping) else item, at, token)


def _weights(rows: _PerToken, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
    """The weight of each token by labels, weights and masks, which must all agree to train it, and notes."""
    weights, notes = np.ones(rows.length, np.float32), ()
    weights[: rows.prompt_length] = 0
    columns = [c for c in ("labels", "weights", *MASKS) if given(rows.row, c) is not None]
    if not columns and not rows.prompt_length and len(ids):
        return weights, (_ALL_TRAINED,)
    for column in columns:
        if column == "labels":
            weights *= _of_labels(rows.items(column), ids)
            continue
        values = rows.column(column, 0.0, _number)
        if not np.isfinite(values).all() or (values < 0).any():
            raise RowError("a weight that isn't finite and ≥ 0", reason="bad_weight", field=column)
        if column != "weights" and not np.isin(values, (0, 1)).all():
            raise RowError("a mask of other values than 0 and 1", reason="bad_weight", field=column)
        weights *= values
    return weights, notes


def _of_labels(labels: list[Any], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """1 where the label is the token itself, 0 at −100; labels of the reply alone are its last tokens'."""
    trained = np.zeros(len(ids), np.float32)
    before = len(ids) - len(labels)
    for i, (label, token) in enumerate(zip(labels, ids[before:].tolist(), strict=True)):
        if label not in (-100, token) or isinstance(label, bool):
            what = f"the label {label!a:.60} is another one than its token, {token}"
            why = "a label stands at its own token; shifted by one, or of another text, it would train something else"
            raise RowError(what, reason="conflict", field=f"labels[{i}]", why=why)
        trained[before + i] = label != -100
    return trained


def _reward(row: Record) -> float | None:
    """A row's reward; rewards of single tokens add up to it."""
    found: float | None = agreed(row, REWARDS, read=lambda c: _total(from_json(row[c], c), c))
    return found


def _total(value: Any, column: str) -> float:
    if isinstance(value, list | tuple):
        return sum(finite(v, f"{column}[{i}]") for i, v in enumerate(value))
    return finite(int(value) if isinstance(value, bool) else value, column)


def _unpadded(rows: _PerToken) -> slice:
    """The tokens between the padding at both ends, by the attention mask."""
    if given(rows.row, "attention_mask") is None:
        return slice(0, rows.length)
    shown = np.flatnonzero(rows.column("attention_mask", 1.0, _number))
    if not len(shown):
        return slice(0, 0)
    kept = slice(int(shown[0]), int(shown[-1]) + 1)
    if kept.stop - kept.start != len(shown):
        why = "tokens after it would be shown another context than these ids"
        raise RowError("padding in the middle of the row", reason="conflict", field="attention_mask", why=why)
    return kept


def _refuse_several(rows: _PerToken, kept: slice) -> None:
    """Raise RowError for a list of several documents, each with positions of its own."""
    lengths = rows.row.get("seq_lengths")
    several = isinstance(lengths, list) and len(lengths) > 1
    if not several and given(rows.row, "position_ids") is not None:
        positions = rows.column("position_ids", 0.0, _number)[kept]
        several = bool((np.diff(positions) != 1).any())
    if several:
        column = "seq_lengths" if isinstance(lengths, list) else "position_ids"
        why = "each document is trained without the others in its context"
        raise RowError(
            "several documents in one row", reason="packed_row", field=column, why=why, fix="give them apart"
        )

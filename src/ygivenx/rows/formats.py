"""What a row means: its format is recognised by its columns, and becomes a noun (nouns.py).

| format            | columns                                 | becomes                                      |
|-------------------|-----------------------------------------|----------------------------------------------|
| messages          | messages (+ system, tools, ...)         | Conversation                                 |
| sharegpt          | conversations (+ system, tools, ...)    | Conversation                                 |
| prompt_completion | prompt, completion (+ tools, ...)       | Pair of texts, or Conversation of messages   |
| alpaca            | instruction, output (+ input, history)  | Conversation, the input on a line of its own |
| query_response    | query, response (+ history)             | Conversation                                 |
| prompt_response   | prompt, response (+ tools, ...)         | as prompt_completion                         |
| question_answer   | question, answer (+ system)             | Conversation of one user and one assistant   |
| xy                | x, y                                    | Pair                                         |
| text              | text, where nothing else fits           | Pair with an empty x                         |
| preference        | chosen and rejected (preferences.py)    | Preference                                   |
| rated             | prompt, replies and their rewards       | Rated                                        |
| tokens            | token ids (token_rows.py)               | TokenRow                                     |

Beside any of them that has one reply, KTO's `label` that says yes or no makes the row Rated.
docs/formats.md has a line of each. Columns that change what a row means are used or refused (columns.py); others are
ignored, and the format says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import ConfigError, DataError, RowError, nearest, refuse_unknown
from . import converters, preferences
from .columns import CHANGE_MEANING, JUDGEMENTS, Record, judgement
from .converters import TEMPLATE_COLUMNS, weighing_one
from .nouns import Conversation, Pair, Preference, Rated, TokenRow
from .token_rows import OPTIONAL, of_token_pair, of_tokens, token_columns
from .weights import ROW_KEYS

__all__ = [
    "FORMATS", "Conversation", "Format", "Pair", "Preference", "Rated", "TokenRow", "normalise", "recognise",
]  # fmt: skip

Noun = Conversation | Pair | Preference | Rated | TokenRow
Convert = Callable[[Record, tuple[str, ...], Iterable[str]], Noun]


@dataclass(frozen=True, slots=True)
class Format:
    """Columns that a row must have and may have, and what makes a noun of it.

    convert: a function of a row, the required columns, and roles that messages may have beside the known ones.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Convert
    roles: tuple[str, ...] = ()

    def __call__(self, row: Record) -> Noun:
        """Convert one row; raises RowError with the field at fault and a stable reason."""
        for column in self.required:
            if column not in row:
                raise RowError(f"the column {column!r} is missing", reason="missing_column", field=column)
        good = None if self.name in _UNJUDGED else judgement(row, self.required)
        if good is None:
            return self.convert(row, self.required, self.roles)
        noun = self.convert({k: v for k, v in row.items() if k not in JUDGEMENTS}, self.required, self.roles)
        reward = 1.0 if good else -1.0
        if isinstance(noun, TokenRow):
            return Rated((noun,), (reward,))
        assert isinstance(noun, Conversation | Pair), "other formats aren't judged"
        return Rated((weighing_one(noun),), (reward,), noun.weight)

    def sentence(self, columns: Iterable[str]) -> str:
        """The format in words, such as "messages (columns: messages, tools; ignored: id)"."""
        columns = list(columns)
        known = self.optional if self.name in _UNJUDGED else (*self.optional, *JUDGEMENTS)
        used = [*self.required, *(c for c in columns if c in known and c not in self.required)]
        others = [c for c in columns if c not in used]
        refused = [c for c in others if c in CHANGE_MEANING]
        kinds = {
            "ignored": [f"{c}{_meant(c, known)}" for c in others if c not in refused],
            "refused where they say something": refused,
        }
        rest = "".join(f"; {kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        return f"{self.name} (columns: {', '.join(used)}{rest})"


# A label beside these judges no reply: it is the class of a text, or contradicts what the format says.
_UNJUDGED = ("text", "preference", "rated")
_CHAT = ("system", *TEMPLATE_COLUMNS)
_QUESTION = tuple(c for c in _CHAT if c != "documents")
_ALPACA = ("input", "history", *_CHAT)
FORMATS = {
    f.name: f
    for f in (
        Format("messages", ("messages",), _CHAT, converters.of_messages),
        Format("sharegpt", ("conversations",), _CHAT, converters.of_messages),
        Format(
            "prompt_completion",
            ("prompt", "completion"),
            (*TEMPLATE_COLUMNS, "gold"),
            converters.of_prompt_completion,
        ),
        Format("alpaca", ("instruction", "output"), _ALPACA, converters.of_alpaca),
        Format(
            "question_answer", ("question", "answer"), (*_QUESTION, "gold"), converters.of_question_answer
        ),
        Format("query_response", ("query", "response"), ("history", *_QUESTION), converters.of_alpaca),
        Format(
            "prompt_response",
            ("prompt", "response"),
            (*TEMPLATE_COLUMNS, "gold"),
            converters.of_prompt_completion,
        ),
        Format("xy", ("x", "y"), (*ROW_KEYS, "gold"), converters.of_pair),
        Format("text", ("text",), ROW_KEYS, converters.of_text),
    )
}
# The most columns first: a row that fits one of these fits what it is made of, too.
_PREFERENCES = tuple(
    Format("preference", columns, (*_ALPACA, *ROW_KEYS), convert)
    for columns, convert in (
        (("input", "preferred_output", "non_preferred_output"), preferences.of_preferred_output),
        (("prompt", "chosen", "rejected"), preferences.of_chosen_rejected),
        (("question", "chosen", "rejected"), preferences.of_chosen_rejected),
        (("instruction", "chosen", "rejected"), preferences.of_instruction),
        (("conversations", "chosen", "rejected"), preferences.of_conversations),
        (("messages", "rejected_response"), preferences.of_rejected_response),
        (("messages", "rejected_messages"), preferences.of_rejected_response),
        (("prompt_ids", "chosen_ids", "rejected_ids"), of_token_pair),
        (("chosen", "rejected"), preferences.of_implicit_prompt),
    )
)
_RATED = tuple(
    Format("rated", (prompt, replies, rewards), (*_CHAT, *ROW_KEYS), preferences.of_rated)
    for prompt in ("prompt", "instruction", "question", "messages")
    for replies in ("completions", "responses", "candidates", "answers")
    for rewards in preferences.RATINGS
)
# Known from elsewhere, and none of them is a prompt with a reply.
_FOREIGN = {
    (
        "segments",
    ): "texts with labels of their own, axolotl's input_output: give token ids with labels instead",
    ("prompt", "completions", "labels"): "rewards of single steps (stepwise supervision)",
    ("conversation",): "ms-swift's conversation of human and assistant: write it as messages",
    ("anchor", "positive"): "pairs for embeddings",
}
# Their columns have many names: `recognise` finds those of a file.
NAMES = (*FORMATS, "preference", "rated", "tokens")


def normalise(
    row: Record,
    *,
    fmt: str | None = None,
    columns: tuple[str, str] | None = None,
    as_text: bool = False,
    roles: Iterable[str] = (),
) -> Noun:
    """One row as a noun.

    `fmt` names a format (see the module); `columns` = (x, y) names two text columns instead, which become
    a user's and an assistant's message, or with `as_text=True` a Pair. Otherwise the columns decide. `roles`: what
    messages may have as a role beside the known ones.
    Raises RowError with the field at fault and a stable reason; ConfigError if `fmt` isn't known.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {type(row).__name__}, not an object", reason="not_an_object")
    x, y = columns or (None, None)
    try:
        convert = recognise(map(str, row), fmt=fmt, x=x, y=y, as_text=as_text, roles=roles)
    except DataError as e:
        raise RowError(e.what, reason="unknown_format", why=e.why, fix=e.fix) from None
    return convert(row)


def recognise(
    columns: Iterable[str],
    *,
    fmt: str | None = None,
    x: str | None = None,
    y: str | None = None,
    as_text: bool = False,
    roles: Iterable[str] = (),
) -> Format:
    """The format of rows with these columns, unless it is named.

    Raises DataError where none or several fit, ConfigError for arguments that contradict each other.
    """
    columns, roles = list(columns), tuple(roles)
    _agree(fmt, x, y, as_text)
    if x is not None and y is not None:
        found = _of_two(x, y, as_text, columns)
    elif fmt is not None:
        found = _named(fmt, columns)
    else:
        found = _fitting(columns)
    return Format(found.name, found.required, found.optional, found.convert, roles) if roles else found


def _of_two(x: str, y: str, as_text: bool, columns: list[str]) -> Format:
    _need((x, y), columns)
    if as_text:
        return Format("x | y as text", (x, y), (*ROW_KEYS, "gold"), converters.of_pair)
    return Format("x | y", (x, y), (*_QUESTION, "gold"), converters.of_question_answer)


def _named(fmt: str, columns: list[str]) -> Format:
    if fmt in FORMATS:
        _need(FORMATS[fmt].required, columns)
        return FORMATS[fmt]
    found = (
        _tokens(columns)
        if fmt == "tokens"
        else _first(_PREFERENCES if fmt == "preference" else _RATED, columns)
    )
    if found is None:
        raise _unrecognised(f"there are no columns of the format {fmt!r}", columns)
    return found


def _fitting(columns: list[str]) -> Format:
    """The one format that fits these columns."""
    if rated := _first((*_PREFERENCES, *_RATED), columns):
        return rated
    fits = [f for f in FORMATS.values() if set(f.required) <= set(columns)]
    if tokens := _tokens(columns):
        fits.append(tokens)
    # Published sets often carry the rendered row as `text` beside its structure.
    fits = [f for f in fits if f.name != "text"] or fits
    if not fits:
        raise _unrecognised(f"the columns fit no known format{_near_miss(columns)}", columns)
    if len(fits) > 1:
        names = ", ".join(f.name for f in fits)
        raise _unrecognised(f"the columns fit {len(fits)} formats: {names}", columns)
    return fits[0]


def _first(formats: Iterable[Format], columns: list[str]) -> Format | None:
    return next((f for f in formats if set(f.required) <= set(columns)), None)


def _tokens(columns: list[str]) -> Format | None:
    found = token_columns(columns)
    return None if found is None else Format("tokens", found, (*OPTIONAL, *ROW_KEYS), of_tokens)


def _agree(fmt: str | None, x: str | None, y: str | None, as_text: bool) -> None:
    if (x is None) != (y is None):
        raise ConfigError("x= and y= go together", fix="name both columns (--x, --y)")
    if fmt is not None and x is not None:
        raise ConfigError("fmt= (--format) beside x= and y=", fix="name the format or the two columns")
    if as_text and x is None:
        raise ConfigError("as text needs the names of two columns", fix="give x= and y= (--x, --y)")
    refuse_unknown("format", [fmt] if fmt is not None else [], NAMES)


def _need(names: Iterable[str], columns: list[str]) -> None:
    for name in names:
        if name not in columns:
            raise _unrecognised(f"there is no column {name!r}{nearest(name, columns)}", columns)


def _close(name: str, known: Iterable[str]) -> list[str]:
    # 0.85 takes one wrong letter in six: promt is prompt, and next isn't text.
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.85)


def _meant(column: str, known: Iterable[str]) -> str:
    """A hint beside a column that is nearly one that the format has."""
    return f" (did you mean {close[0]}?)" if (close := _close(column, known)) else ""


def _near_miss(columns: list[str]) -> str:
    for known, what in _FOREIGN.items():
        if set(known) <= set(columns):
            return f": {what}"
    for f in FORMATS.values():
        lacking = [c for c in f.required if c not in columns]
        for name in lacking:
            if close := _close(name, columns):
                return f"; did you mean {name!r} by {close[0]!r}? Then rename the column"
        if len(lacking) < len(f.required):
            return f"; {f.name} lacks {lacking[0]!r}"
    return ""


def _unrecognised(what: str, columns: list[str]) -> DataError:
    known = "; ".join(f"{f.name} ({', '.join(f.required)})" for f in FORMATS.values())
    return DataError(
        what,
        why=f"the columns found are {', '.join(map(repr, columns)) or '(none)'}",
        fix=f"name a format with fmt= (--format), or two text columns with x= and y= (--x, --y); formats: {known}; "
        "preference (prompt, chosen, rejected); rated (prompt, completions, rewards); tokens (input_ids, labels, and "
        "other names)",
    )

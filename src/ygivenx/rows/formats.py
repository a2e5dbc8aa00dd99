"""What a row means: its format is recognised by its columns, and becomes a `Conversation` or a `Pair`.

| format            | columns                                 | becomes                                      |
|-------------------|-----------------------------------------|----------------------------------------------|
| messages          | messages (+ system, tools, ...)         | Conversation                                 |
| sharegpt          | conversations (+ system, tools, ...)    | Conversation                                 |
| prompt_completion | prompt, completion (+ tools, ...)       | Pair of texts, or Conversation of messages   |
| alpaca            | instruction, output (+ input, history)  | Conversation, the input on a line of its own |
| question_answer   | question, answer (+ system)             | Conversation of one user and one assistant   |
| xy                | x, y                                    | Pair                                         |
| text              | text, where nothing else fits           | Pair with an empty x                         |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, DataError, RowError, nearest
from .messages import Message, as_list, as_object, encodable, from_json, message_list, text, tool_list

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template reads them, with the further arguments of the template."""

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts as the model reads them, y right after x, without a template."""

    x: str
    y: str


@dataclass(frozen=True, slots=True)
class Format:
    """Columns that a row must have and may have, and what makes a noun of it: `convert(row, required)`."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Record, tuple[str, ...]], Conversation | Pair]

    def __call__(self, row: Record) -> Conversation | Pair:
        """Convert one row; raises RowError with the field at fault and a stable reason."""
        for column in self.required:
            if column not in row:
                raise RowError(f"the column {column!r} is missing", reason="missing_column", field=column)
        return self.convert(row, self.required)

    def sentence(self, columns: Iterable[str]) -> str:
        """The format aloud, such as "messages (columns: messages, tools; ignored: id)"."""
        used = [*self.required, *(c for c in columns if c in self.optional)]
        ignored = [c for c in columns if c not in used]
        return (
            f"{self.name} (columns: {', '.join(used)}{'; ignored: ' if ignored else ''}{', '.join(ignored)})"
        )


def normalise(
    row: Record, *, fmt: str | None = None, columns: tuple[str, str] | None = None, as_text: bool = False
) -> Conversation | Pair:
    """One row as a Conversation or a Pair.

    `fmt` names a format (see the module); `columns` = (x, y) names two text columns instead, which become
    a user's and an assistant's message, or with `as_text=True` a Pair. Otherwise the columns decide.
    Raises RowError with the field at fault and a stable reason; ConfigError if `fmt` isn't known.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {type(row).__name__}, not an object", reason="not_an_object")
    x, y = columns or (None, None)
    try:
        convert = recognise(map(str, row), fmt=fmt, x=x, y=y, as_text=as_text)
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
) -> Format:
    """The format of rows with these columns, unless it is named.

    Raises DataError where none or several fit, ConfigError for arguments that contradict each other.
    """
    columns = list(columns)
    _agree(fmt, x, y, as_text)
    if x is not None and y is not None:
        _need((x, y), columns)
        if as_text:
            return Format("x | y as text", (x, y), (), _pair)
        return Format("x | y", (x, y), ("system",), _question_answer)
    if fmt is not None:
        _need(FORMATS[fmt].required, columns)
        return FORMATS[fmt]
    fits = [f for f in FORMATS.values() if set(f.required) <= set(columns)]
    # Published sets often carry the rendered row as `text` beside its structure.
    fits = [f for f in fits if f.name != "text"] or fits
    if not fits:
        raise _unrecognised(f"the columns fit no known format{_near_miss(columns)}", columns)
    if len(fits) > 1:
        names = ", ".join(f.name for f in fits)
        raise _unrecognised(f"the columns fit {len(fits)} formats: {names}", columns)
    return fits[0]


def _agree(fmt: str | None, x: str | None, y: str | None, as_text: bool) -> None:
    if (x is None) != (y is None):
        raise ConfigError("x= and y= go together", fix="name both columns (--x, --y)")
    if fmt is not None and x is not None:
        raise ConfigError("fmt= (--format) beside x= and y=", fix="name the format or the two columns")
    if as_text and x is None:
        raise ConfigError("as text needs the names of two columns", fix="give x= and y= (--x, --y)")
    if fmt is not None and fmt not in FORMATS:
        raise ConfigError(
            f"unknown format {fmt!r}{nearest(fmt, FORMATS)}", fix=f"known: {', '.join(FORMATS)}"
        )


def _need(names: Iterable[str], columns: list[str]) -> None:
    for name in names:
        if name not in columns:
            raise _unrecognised(f"there is no column {name!r}{nearest(name, columns)}", columns)


def _near_miss(columns: list[str]) -> str:
    for f in FORMATS.values():
        lacking = [c for c in f.required if c not in columns]
        for name in lacking:
            if close := difflib.get_close_matches(name, columns, n=1, cutoff=0.85):
                return f"; did you mean {name!r} by {close[0]!r}?"
        if len(lacking) < len(f.required):
            return f"; {f.name} lacks {lacking[0]!r}"
    return ""


def _unrecognised(what: str, columns: list[str]) -> DataError:
    known = "; ".join(f"{f.name} ({', '.join(f.required)})" for f in FORMATS.values())
    return DataError(
        what,
        why=f"the columns found are {', '.join(map(repr, columns)) or '(none)'}",
        fix=f"name a format with fmt= (--format), or two text columns with x= and y= (--x, --y); formats: {known}",
    )


# --- formats ---------------------------------------------------------------------------------------------


def _messages(row: Record, required: tuple[str, ...]) -> Conversation:
    messages = message_list(row[required[0]], required[0])
    system = _system(row)
    if system and messages[0]["role"] == "system":
        why = f"{required[0]} begins with one"
        raise RowError("a second system message", reason="conflict", field="system", why=why)
    return _conversation(system + messages, row)


def _prompt_completion(row: Record, required: tuple[str, ...]) -> Conversation | Pair:
    if any(isinstance(row[c], str) or row[c] is None for c in required):
        if _given(row, "tools") or _given(row, "functions"):
            why = "a text prompt has no place for them: they would be dropped"
            raise RowError("tools beside a text prompt", reason="conflict", field="tools", why=why)
        return _pair(row, required)
    prompt, completion = (message_list(row[c], c) for c in required)
    # Only the completion is y: replies inside the prompt are context.
    context = [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in prompt]
    return _conversation(context + completion, row)


def _alpaca(row: Record, required: tuple[str, ...]) -> Conversation:
    instruction, output = (text(row[c], c) for c in required)
    extra = _given(row, "input")
    messages = _system(row)
    for i, turn in enumerate(as_list(_given(row, "history") or [], "history")):
        at = f"history[{i}]"
        if len(as_list(turn, at)) != 2:
            raise RowError(
                f"{len(turn)} items where [question, answer] belongs", reason="wrong_type", field=at
            )
        messages += _turn(text(turn[0], f"{at}[0]"), text(turn[1], f"{at}[1]"))
    x = instruction if extra is None else f"{instruction}\n{text(extra, 'input')}"
    return _conversation(messages + _turn(x, output), row)


def _question_answer(row: Record, required: tuple[str, ...]) -> Conversation:
    x, y = (text(row[c], c) for c in required)
    return Conversation(tuple(_system(row) + _turn(x, y)))


def _pair(row: Record, required: tuple[str, ...]) -> Pair:
    return Pair(*(text(row[c], c) for c in required))


def _plain_text(row: Record, required: tuple[str, ...]) -> Pair:
    return Pair("", text(row[required[0]], required[0]))


_TEMPLATE = ("tools", "functions", "documents", "chat_template_kwargs")
FORMATS = {
    f.name: f
    for f in (
        Format("messages", ("messages",), ("system", *_TEMPLATE), _messages),
        Format("sharegpt", ("conversations",), ("system", *_TEMPLATE), _messages),
        Format("prompt_completion", ("prompt", "completion"), _TEMPLATE, _prompt_completion),
        Format("alpaca", ("instruction", "output"), ("input", "history", "system", *_TEMPLATE), _alpaca),
        Format("question_answer", ("question", "answer"), ("system",), _question_answer),
        Format("xy", ("x", "y"), (), _pair),
        Format("text", ("text",), (), _plain_text),
    )
}


def _conversation(messages: list[Message], row: Record) -> Conversation:
    documents, kwargs = (
        encodable(from_json(_given(row, column) or empty, column), column)
        for column, empty in (("documents", []), ("chat_template_kwargs", {}))
    )
    return Conversation(
        tuple(messages),
        _tools(row),
        [as_object(d, f"documents[{i}]") for i, d in enumerate(as_list(documents, "documents"))] or None,
        as_object(kwargs, "chat_template_kwargs"),
    )


def _tools(row: Record) -> list[dict[str, Any]] | None:
    """The tools of a row, which OpenAI's older files call functions."""
    given = {c: row[c] for c in ("tools", "functions") if _given(row, c) is not None}
    if len(given) > 1:
        raise RowError("functions beside tools", reason="conflict", field="functions")
    return next((tool_list(value, column) for column, value in given.items()), None)


def _given(row: Record, column: str) -> Any:
    """The value of a column that may be missing or empty; None if it is."""
    value = row.get(column)
    return None if value in ("", [], {}) else value


def _system(row: Record) -> list[Message]:
    value = _given(row, "system")
    return [] if value is None else [{"role": "system", "content": text(value, "system")}]


def _turn(x: str, y: str) -> list[Message]:
    return [{"role": "user", "content": x}, {"role": "assistant", "content": y}]

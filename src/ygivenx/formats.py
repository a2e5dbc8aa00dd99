"""What a row means: its format is recognised by its columns, and becomes a `Conversation` or a `Pair`.

| format            | columns                                     | becomes                                        |
|-------------------|---------------------------------------------|------------------------------------------------|
| messages          | messages (+ tools, documents, ...)          | Conversation                                   |
| sharegpt          | conversations (+ system, tools, ...)        | Conversation                                   |
| prompt_completion | prompt, completion (+ tools, ...)           | Pair of texts; lists of messages: Conversation |
| alpaca            | instruction, output (+ input, history, ...) | Conversation, input on a line of its own       |
| question_answer   | question, answer (+ system)                 | Conversation of one user and one assistant     |
| xy                | x, y                                        | Pair                                           |
| text              | text, where nothing else fits               | Pair with an empty x                           |

Messages come out in the form that chat templates read: text parts joined, typed parts as `content`,
`reasoning_content` and `tool_calls`, arguments as objects, functions wrapped as `{"type": "function", ...}`,
and whatever a row calls the weight of a message (`WEIGHT_KEYS`) as a float `weight`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .errors import ConfigError, DataError, RowError, nearest
from .strictjson import Strict

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template reads them, with the further arguments of the template."""

    messages: tuple[dict[str, Any], ...]
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
        used = [*self.required, *(c for c in self.optional if c in set(columns))]
        ignored = [c for c in columns if c not in used]
        return (
            f"{self.name} (columns: {', '.join(used)}{'; ignored: ' if ignored else ''}{', '.join(ignored)})"
        )


def normalise(
    row: Record, *, fmt: str | None = None, columns: tuple[str, str] | None = None, as_text: bool = False
) -> Conversation | Pair:
    """One row as a Conversation or a Pair.

    `fmt` names a format (see the module); `columns` = (x, y) names two text columns of any name instead, which
    become a user and an assistant message, or with `as_text=True` a Pair. Otherwise the columns decide.
    Raises RowError with the field at fault and a stable reason; ConfigError if `fmt` isn't known.
    """
    x, y = columns or (None, None)
    names = list(_object(row, ""))
    try:
        return recognise(names, fmt=fmt, x=x, y=y, as_text=as_text)(row)
    except DataError as e:
        raise RowError(e.what, reason="unknown_format", why=e.why, fix=e.fix) from None


def recognise(
    columns: Iterable[str],
    *,
    fmt: str | None = None,
    x: str | None = None,
    y: str | None = None,
    as_text: bool = False,
) -> Format:
    """The format of rows with these columns. Raises DataError where none or several fit, ConfigError for
    arguments that contradict each other."""
    columns = list(columns)
    if x is not None or y is not None:
        return _by_name(columns, fmt, x, y, as_text)
    if fmt is not None and fmt not in FORMATS:
        raise ConfigError(
            f"unknown format {fmt!r}{nearest(fmt, FORMATS)}", fix=f"known: {', '.join(FORMATS)}"
        )
    if as_text:
        raise ConfigError("as_text needs the names of the two columns", fix="give x= and y=")
    if fmt is not None:
        found = FORMATS[fmt]
        if missing := [c for c in found.required if c not in columns]:
            raise DataError(
                f"format {fmt} needs the column {missing[0]!r}{nearest(missing[0], columns)}",
                **_found(columns),
            )
        return found
    fits = [f for f in FORMATS.values() if set(f.required) <= set(columns)]
    # Published sets often carry the rendered row as `text` beside its structure.
    fits = [f for f in fits if f.name != "text"] or fits
    if len(fits) != 1:
        what = (
            f"the columns fit {len(fits)} formats: {', '.join(f.name for f in fits)}"
            if fits
            else _unknown(columns)
        )
        raise DataError(what, **_found(columns))
    return fits[0]


def _by_name(columns: list[str], fmt: str | None, x: str | None, y: str | None, as_text: bool) -> Format:
    if x is None or y is None or fmt is not None:
        raise ConfigError("x= and y= go together, and without fmt=", fix="name both columns, or a format")
    for name in (x, y):
        if name not in columns:
            raise DataError(f"there is no column {name!r}{nearest(name, columns)}", **_found(columns))
    convert = _pair if as_text else _question_answer
    return Format("x | y, as text" if as_text else "x | y", (x, y), () if as_text else ("system",), convert)


def _unknown(columns: list[str]) -> str:
    known = {c for f in FORMATS.values() for c in f.required if len(c) > 1}
    hints = {c: nearest(c, known) for c in columns if c not in known}
    close = next((f" ({c!r}{hint})" for c, hint in hints.items() if hint), "")
    return f"the columns fit no known format{close}"


def _found(columns: list[str]) -> dict[str, str]:
    known = "; ".join(f"{f.name}: {', '.join(f.required)}" for f in FORMATS.values())
    return {
        "why": f"found the columns {', '.join(map(repr, columns)) or '(none)'}",
        "fix": f"name the format with fmt= or two text columns with x= and y=. Formats: {known}",
    }


# --- formats ---------------------------------------------------------------------------------------------


def _messages(row: Record, required: tuple[str, ...]) -> Conversation:
    column = required[0]
    messages = _message_list(row[column], column)
    if row.get("system"):
        if messages[0]["role"] == "system":
            raise RowError(
                "two system messages", reason="conflict", field="system", why=f"{column} begins with one"
            )
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    return _conversation(messages, row)


def _prompt_completion(row: Record, required: tuple[str, ...]) -> Conversation | Pair:
    x, y = (row[c] for c in required)
    if isinstance(x, str) and isinstance(y, str):
        if row.get("tools"):
            why = "a text prompt has no place for them, so they would be dropped"
            raise RowError("tools beside a text prompt", reason="conflict", field="tools", why=why)
        return _pair(row, required)
    prompt, completion = (_message_list(row[c], c) for c in required)
    # Only the completion is y: replies inside the prompt are context.
    prompt = [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in prompt]
    return _conversation(prompt + completion, row)


def _alpaca(row: Record, required: tuple[str, ...]) -> Conversation:
    instruction, output = (_text(row[c], c) for c in required)
    extra = _text(row.get("input") or "", "input")
    messages = _system(row)
    for i, turn in enumerate(_list(row.get("history") or [], "history")):
        at = f"history[{i}]"
        if len(_list(turn, at)) != 2:
            raise RowError(
                f"a turn is [question, answer], not {len(turn)} items", reason="wrong_type", field=at
            )
        messages += _turn(_text(turn[0], f"{at}[0]"), _text(turn[1], f"{at}[1]"))
    return _conversation(messages + _turn(f"{instruction}\n{extra}" if extra else instruction, output), row)


def _question_answer(row: Record, required: tuple[str, ...]) -> Conversation:
    x, y = (_text(row[c], c) for c in required)
    return Conversation(tuple(_system(row) + _turn(x, y)))


def _pair(row: Record, required: tuple[str, ...]) -> Pair:
    return Pair(*(_text(row[c], c) for c in required))


def _plain_text(row: Record, required: tuple[str, ...]) -> Pair:
    return Pair("", _text(row[required[0]], required[0]))


_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
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


def _conversation(messages: list[dict[str, Any]], row: Record) -> Conversation:
    documents = _from_json(row.get("documents") or None, "documents")
    kwargs = _from_json(row.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    return Conversation(
        tuple(messages),
        _tools(row.get("tools")),
        documents and [_object(d, f"documents[{i}]") for i, d in enumerate(_list(documents, "documents"))],
        _object(kwargs, "chat_template_kwargs"),
    )


def _system(row: Record) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _text(row["system"], "system")}] if row.get("system") else []


def _turn(x: str, y: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": x}, {"role": "assistant", "content": y}]


# --- messages --------------------------------------------------------------------------------------------

WEIGHT_KEYS = ("weight", "loss_weight", "train", "training")
_TEXT_KEYS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_SHAREGPT_CALLS = ("function_call", "tool_call", "tool_calls")
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", *_SHAREGPT_CALLS), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response", "function"), "tool"),
    "system": "system",
}


def _message_list(value: Any, column: str) -> list[dict[str, Any]]:
    messages = _list(_from_json(value, column), column)
    if not messages:
        raise RowError("there are no messages", reason="empty_messages", field=column)
    return [_message(m, f"{column}[{i}]") for i, m in enumerate(messages)]


def _message(message: Any, at: str) -> dict[str, Any]:
    # Columnar files fill every key that any other message has with null.
    m = {k: v for k, v in _object(message, at).items() if v is not None or k in ("content", "value")}
    if "from" in m and "role" not in m:
        m = _from_sharegpt(m, at)
    if "role" not in m:
        raise RowError("the message has no role", reason="missing_role", field=f"{at}.role")
    _text(m["role"], f"{at}.role")
    for key in _TEXT_KEYS:
        if key in m:
            _text(m[key], f"{at}.{key}")
    if isinstance(m.get("content"), list):
        m = _join_parts(m, at)
    m = _weighted(_with_calls(m, at), at)
    if m.get("content") is not None:
        _text(m["content"], f"{at}.content")
    elif not m.get("tool_calls"):
        why = "only a message that calls tools may have none"
        raise RowError(
            "the content is null or missing", reason="null_content", field=f"{at}.content", why=why
        )
    return m


def _from_sharegpt(m: dict[str, Any], at: str) -> dict[str, Any]:
    """{from, value} as {role, content}; a function call's JSON as tool calls."""
    name, value = _text(m.pop("from"), f"{at}.from"), m.pop("value", None)
    if name not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise RowError(
            f"unknown role {name!a}{nearest(name, _SHAREGPT_ROLES)}",
            reason="unknown_role", field=f"{at}.from", fix=f"known: {known}",
        )  # fmt: skip
    m |= {"role": _SHAREGPT_ROLES[name], "content": value}
    if name in _SHAREGPT_CALLS:
        calls = _from_json(_text(value, f"{at}.value"), f"{at}.value")
        calls = calls if isinstance(calls, list) else [calls]
        m |= {"content": "", "tool_calls": [_call(c, f"{at}.value") for c in calls]}
    elif value is None:
        raise RowError("the value is null or missing", reason="null_content", field=f"{at}.value")
    return m


_TEXT_PARTS = ("text", "input_text", "output_text")
# The order in which templates write a message's fields; parts in another order have no faithful form.
_FIELD_OF_PART = {
    "reasoning": "reasoning_content", "thinking": "reasoning_content",
    **dict.fromkeys(_TEXT_PARTS, "content"),
    "tool_call": "tool_calls",
}  # fmt: skip
_FIELD_ORDER = ("reasoning_content", "content", "tool_calls")


def _join_parts(m: dict[str, Any], at: str) -> dict[str, Any]:
    """A list of typed parts as reasoning_content, content and tool_calls, in that order."""
    fields: dict[str, list[Any]] = {"content": []}
    order = []
    for i, part in enumerate(m["content"]):
        here = f"{at}.content[{i}]"
        kind = _object(part, here).get("type")
        if kind not in _FIELD_OF_PART:
            known = ", ".join(_FIELD_OF_PART)
            raise RowError(
                f"unknown part of type {kind!a}", reason="unknown_part", field=here, fix=f"known: {known}"
            )
        value = next((part[k] for k in ("value", "text", kind) if part.get(k) is not None), None)
        name = _FIELD_OF_PART[kind]
        fields.setdefault(name, []).append(_call(value, here) if name == "tool_calls" else _text(value, here))
        order.append(_FIELD_ORDER.index(name))
    if any(a > b for a, b in pairwise(order)):
        why = "a template writes a message as reasoning, text, tool calls"
        raise RowError(
            "parts in an order that no message has", reason="part_order", field=f"{at}.content", why=why
        )
    if clash := [n for n in fields if n != "content" and n in m]:
        raise RowError(
            f"{clash[0]} both as a part and as a field", reason="conflict", field=f"{at}.{clash[0]}"
        )
    return m | {n: v if n == "tool_calls" else "".join(v) for n, v in fields.items()}


def _with_calls(m: dict[str, Any], at: str) -> dict[str, Any]:
    """Tool calls in one form; OpenAI's older `function_call` and role `function` become today's."""
    if "function_call" in m:
        if "tool_calls" in m:
            raise RowError("function_call beside tool_calls", reason="conflict", field=f"{at}.function_call")
        m["tool_calls"] = [m.pop("function_call")]
    if m["role"] == "function":
        m["role"] = "tool"
    if "tool_calls" in m:
        calls = _list(_from_json(m["tool_calls"], f"{at}.tool_calls"), f"{at}.tool_calls")
        m["tool_calls"] = [_call(c, f"{at}.tool_calls[{i}]") for i, c in enumerate(calls)]
    return m


def _call(value: Any, at: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments": an object}, ...} from any of its usual forms."""
    call = _object(_from_json(value, at), at)
    wrapped = isinstance(call.get("function"), Mapping)
    function = dict(call["function"]) if wrapped else call
    _text(function.get("name"), f"{at}.name")
    if "arguments" not in function:
        raise RowError("the call has no arguments", reason="missing_field", field=f"{at}.arguments")
    arguments = _from_json(function["arguments"], f"{at}.arguments")
    function = {**function, "arguments": _encodable(_object(arguments, f"{at}.arguments"), f"{at}.arguments")}
    return (
        {**call, "type": "function", "function": function}
        if wrapped
        else {"type": "function", "function": function}
    )


def _weighted(m: dict[str, Any], at: str) -> dict[str, Any]:
    """The weight of a message, whatever the row calls it, as a float `weight`."""
    weights = {key: m.pop(key) for key in WEIGHT_KEYS if key in m}
    for key, value in weights.items():
        number = isinstance(value, bool if key.startswith("train") else int | float)
        if not number or not math.isfinite(value) or value < 0:
            kind = "true or false" if key.startswith("train") else "a number ≥ 0"
            raise RowError(f"{value!a} isn't {kind}", reason="bad_weight", field=f"{at}.{key}")
    if len({float(w) for w in weights.values()}) > 1:
        raise RowError(
            f"{' and '.join(weights)} contradict each other", reason="conflict", field=f"{at}.weight"
        )
    return m | {"weight": float(w) for w in weights.values()}


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools as a list of {"type": "function", "function": ...}, from a list or its JSON; None for none."""
    tools = [
        _object(t, f"tools[{i}]") for i, t in enumerate(_list(_from_json(value or [], "tools"), "tools"))
    ]
    wrapped = [
        t if "type" in t and "parameters" not in t else {"type": "function", "function": t} for t in tools
    ]
    return _encodable(wrapped, "tools") or None


# --- values ----------------------------------------------------------------------------------------------


def _wrong_type(value: Any, wanted: str, at: str) -> RowError:
    kind = {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(
        type(value), type(value).__name__
    )
    return RowError(f"{kind} where {wanted} belongs", reason="wrong_type", field=at)


def _object(value: Any, at: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError("not an object", reason="not_an_object", field=at)
    return dict(value)


def _list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong_type(value, "a list", at)
    return list(value)


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(value, "text", at)
    if not value.isascii():
        _encodable(value, at)
    return value


def _encodable(value: Any, at: str) -> Any:
    """`value` if all its text can be encoded: half a surrogate pair is no character."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as e:
        raise RowError("half a surrogate pair", reason="lone_surrogate", field=at, why=e.reason) from None
    except (TypeError, ValueError) as e:
        raise RowError("not a JSON value", reason="wrong_type", field=at, why=str(e)) from None
    return value


def _from_json(value: Any, at: str) -> Any:
    """The value of a text that holds JSON, as in CSV cells and many `tools` columns; others as they are."""
    if not isinstance(value, str):
        return value
    try:
        return Strict().whole(value)
    except RowError as e:
        raise RowError(f"the text isn't JSON: {e.what}", reason=e.reason, field=at, why=e.why) from None

"""Messages in the one form that chat templates read, from the forms that datasets have.

Text parts are joined; typed parts become `content`, `reasoning_content` and `tool_calls`; ShareGPT's
from/value become role/content; arguments are objects, functions wrapped as `{"type": "function",
"function": ...}`; and whatever a row calls the weight of a message (`WEIGHT_KEYS`) is a float `weight`. Other
keys stay as they are. Everything raises RowError with the field at fault.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..errors import RowError, nearest
from .strictjson import Strict

Message = dict[str, Any]

WEIGHT_KEYS = ("weight", "loss_weight", "train", "training")
_FLAGS = ("train", "training")
_MAX_WEIGHT = 3.4e38  # of float32
_TEXT_KEYS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")

_CHECKED = {"role", "content", "weight", *_TEXT_KEYS}  # by name; of other keys all that is in them
MAX_DEPTH = 64

_SHAREGPT_CALLS = ("function_call", "tool_call", "tool_calls")
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", *_SHAREGPT_CALLS), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response", "function"), "tool"),
}

_FIELD_OF_PART = {
    **dict.fromkeys(("reasoning", "thinking"), "reasoning_content"),
    **dict.fromkeys(("text", "input_text", "output_text"), "content"),
    "tool_call": "tool_calls",
}
# The order in which templates write a message's fields; parts in another order have no faithful form.
_FIELD_ORDER = ("reasoning_content", "content", "tool_calls")


def message_list(value: Any, column: str) -> list[Message]:
    """The messages of a column, a list or the JSON of one; at least one."""
    messages = as_list(from_json(value, column), column)
    if not messages:
        raise RowError("there are no messages", reason="empty_messages", field=column)
    return [_message(m, f"{column}[{i}]") for i, m in enumerate(messages)]


def tool_list(value: Any, column: str = "tools") -> list[dict[str, Any]] | None:
    """Tools as a list of {"type": "function", "function": ...}, from a list or its JSON; None for none."""
    tools = as_list(from_json(value, column), column) if value is not None else []
    return json_value([_tool(t, f"{column}[{i}]") for i, t in enumerate(tools)], column) or None


def _tool(value: Any, at: str) -> dict[str, Any]:
    tool = as_object(value, at)
    if isinstance(tool.get("function"), Mapping):
        return tool
    if "name" in tool:
        return {
            "type": "function",
            "function": {k: v for k, v in tool.items() if (k, v) != ("type", "function")},
        }
    if "type" in tool:  # a tool of the provider's, such as a code interpreter
        return tool
    raise RowError("a tool without a name", reason="missing_field", field=f"{at}.name")


def _message(value: Any, at: str) -> Message:
    # Columnar files fill every key that any other message has with null.
    m = {k: v for k, v in as_object(value, at).items() if v is not None or k in ("content", "value")}
    if "from" in m and "role" not in m:
        m = _from_sharegpt(m, at)
    if "role" not in m:
        raise RowError("the message has no role", reason="missing_role", field=f"{at}.role")
    text(m["role"], f"{at}.role")
    for key in _TEXT_KEYS:
        if key in m:
            text(m[key], f"{at}.{key}")
    if isinstance(m.get("content"), list):
        m = _join_parts(m, at)
    m = _weighted(_with_calls(m, at), at)
    if m.get("content") is not None:
        text(m["content"], f"{at}.content")
    elif "tool_calls" not in m:
        why = "only a message that calls tools may have none"
        raise RowError(
            "the content is null or missing", reason="null_content", field=f"{at}.content", why=why
        )
    for key in m.keys() - _CHECKED:
        encodable({key: m[key]}, at)
    return m


def _from_sharegpt(m: Message, at: str) -> Message:
    """{from, value} as {role, content}; a function call's JSON, one or a list of them, as tool calls."""
    name, value = text(m.pop("from"), f"{at}.from"), m.pop("value", None)
    if name not in _SHAREGPT_ROLES:
        what, fix = (
            f"unknown role {name!a}{nearest(name, _SHAREGPT_ROLES)}",
            f"known: {', '.join(_SHAREGPT_ROLES)}",
        )
        raise RowError(what, reason="unknown_role", field=f"{at}.from", fix=fix)
    if value is None:
        raise RowError("the value is null or missing", reason="null_content", field=f"{at}.value")
    text(value, f"{at}.value")
    m |= {"role": _SHAREGPT_ROLES[name], "content": value}
    if name in _SHAREGPT_CALLS:
        calls = from_json(value, f"{at}.value")
        m |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return m


def _join_parts(m: Message, at: str) -> Message:
    """A list of typed parts as reasoning_content, content and tool_calls; without text the content is ""."""
    found: dict[str, list[Any]] = {"content": []}
    order = []
    for i, part in enumerate(m["content"]):
        here = f"{at}.content[{i}]"
        kind = as_object(part, here).get("type")
        if not isinstance(kind, str) or kind not in _FIELD_OF_PART:
            fix = f"known: {', '.join(_FIELD_OF_PART)}"
            raise RowError(f"unknown part of type {kind!a}", reason="unknown_part", field=here, fix=fix)
        value = next((part[k] for k in ("value", "text", kind) if part.get(k) is not None), None)
        name = _FIELD_OF_PART[kind]
        found.setdefault(name, []).append(
            from_json(value, here) if name == "tool_calls" else text(value, here)
        )
        order.append(_FIELD_ORDER.index(name))
    if any(a > b for a, b in pairwise(order)):
        why = "a template writes a message as reasoning, text, tool calls"
        raise RowError(
            "parts in an order that no message has", reason="part_order", field=f"{at}.content", why=why
        )
    if clash := [n for n in found if n != "content" and n in m]:
        raise RowError(
            f"{clash[0]} both as a part and as a field", reason="conflict", field=f"{at}.{clash[0]}"
        )
    return m | {n: v if n == "tool_calls" else "".join(v) for n, v in found.items()}


def _with_calls(m: Message, at: str) -> Message:
    """Tool calls in one form; OpenAI's older `function_call` and role `function` become today's."""
    if "function_call" in m:
        if "tool_calls" in m:
            raise RowError("function_call beside tool_calls", reason="conflict", field=f"{at}.function_call")
        m["tool_calls"] = [m.pop("function_call")]
    if m["role"] == "function":
        m["role"] = "tool"
    field = f"{at}.tool_calls"
    calls = as_list(from_json(m.pop("tool_calls", []), field), field)
    return m | {"tool_calls": [_call(c, f"{field}[{i}]") for i, c in enumerate(calls)]} if calls else m


def _call(value: Any, at: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments": an object}, ...} from any of its usual forms."""
    call = {k: v for k, v in as_object(from_json(value, at), at).items() if v is not None}
    wrapped = isinstance(call.get("function"), Mapping)
    function = (
        dict(call["function"]) if wrapped else {k: v for k, v in call.items() if k not in ("type", "id")}
    )
    text(function.get("name"), f"{at}.name")
    if function.get("arguments") is None:
        raise RowError("the call has no arguments", reason="missing_field", field=f"{at}.arguments")
    arguments = as_object(from_json(function["arguments"], f"{at}.arguments"), f"{at}.arguments")
    function["arguments"] = json_value(arguments, f"{at}.arguments")
    outside = call if wrapped else {k: call[k] for k in ("id",) if k in call}
    return {**outside, "type": "function", "function": function}


def _weighted(m: Message, at: str) -> Message:
    """The weight of a message, whatever the row calls it, as a float `weight` ≥ 0."""
    weights = {}
    for key in [k for k in WEIGHT_KEYS if k in m]:
        value = m.pop(key)
        right = isinstance(value, bool) == (key in _FLAGS) and isinstance(value, int | float)
        if not right or not 0 <= value <= _MAX_WEIGHT:
            wanted = "true or false" if key in _FLAGS else "a number ≥ 0"
            raise RowError(f"{value!a} isn't {wanted}", reason="bad_weight", field=f"{at}.{key}")
        weights[key] = float(value)
    if len(set(weights.values())) > 1:
        raise RowError(
            f"{' and '.join(weights)} contradict each other", reason="conflict", field=f"{at}.weight"
        )
    return {**m, "weight": next(iter(weights.values()))} if weights else m


# --- values ----------------------------------------------------------------------------------------------

_NAMES = {dict: "an object", list: "a list", str: "text", type(None): "null"}


def as_object(value: Any, at: str) -> dict[str, Any]:
    """A copy of an object."""
    if not isinstance(value, Mapping):
        raise _wrong_type(value, "an object", at)
    return dict(value)


def as_list(value: Any, at: str) -> list[Any]:
    """A copy of a list."""
    if not isinstance(value, list | tuple):
        raise _wrong_type(value, "a list", at)
    return list(value)


def text(value: Any, at: str) -> str:
    """A text that can be encoded."""
    if not isinstance(value, str):
        raise _wrong_type(value, "text", at)
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as e:
        raise RowError("half a surrogate pair", reason="lone_surrogate", field=at, why=e.reason) from None
    return value


def encodable(value: Any, at: str, depth: int = MAX_DEPTH) -> Any:
    """A value as it is, if its texts can be encoded (half a surrogate pair is no character) and it isn't nested deeper.

    A template may write any of it, and Python's stack bounds what can be followed through one.
    """
    if isinstance(value, str):
        return text(value, at)
    if not isinstance(value, Mapping | list | tuple):
        return value
    if not depth:
        why = f"more than {MAX_DEPTH} levels"
        raise RowError("nested too deeply", reason="too_deep", field=at.split(".", 1)[0], why=why)
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        encodable(key, at)
        encodable(item, f"{at}.{key}" if isinstance(value, Mapping) else f"{at}[{key}]", depth - 1)
    return value


def json_value(value: Any, at: str) -> Any:
    """An encodable value as it is, if JSON has such values: templates write it as JSON."""
    encodable(value, at)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise RowError("not a JSON value", reason="wrong_type", field=at, why=str(e)) from None
    return value


def from_json(value: Any, at: str) -> Any:
    """The value of a text that holds JSON, as CSV cells and many `tools` columns do; others as they are."""
    if not isinstance(value, str):
        return value
    try:
        return Strict().whole(value)
    except RowError as e:
        raise RowError(e.what, reason=e.reason, field=at, why=e.why) from None


def _wrong_type(value: Any, wanted: str, at: str) -> RowError:
    kind = _NAMES.get(type(value), type(value).__name__)
    return RowError(f"{kind} where {wanted} belongs", reason="wrong_type", field=at)

"""Messages in the one form that chat templates read, from the forms that datasets have.

Text parts are joined; typed parts become `content`, `reasoning_content` and `tool_calls`; ShareGPT's
from/value become role/content; arguments are objects, functions wrapped as `{"type": "function",
"function": ...}`; roles have one name each; what a row calls the weight of a message or of a part of it becomes
`weight` and `spans` (weights.py). Other keys stay as they are. Everything raises RowError with the field at fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

from ..errors import RowError, nearest
from .nouns import Message
from .values import agreed, as_list, as_object, encodable, from_json, json_value, text
from .weights import MESSAGE_KEYS, WEIGHT_KEYS, take_weight, weighted

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # of one thought
_TEXT_KEYS = ("name", "tool_call_id", *_THOUGHTS)
# Encodable by other checks; of other keys all that is in them is looked at.
_CHECKED = {"role", "content", *WEIGHT_KEYS, *_TEXT_KEYS}
# What ygivenx itself reads of a message, or gives to the template under the name that it reads.
READ_KEYS = frozenset({"role", "content", "tool_calls", "prefix", *WEIGHT_KEYS, *_TEXT_KEYS})
# What it reads of a message as rows have it.
KNOWN_KEYS = frozenset({*READ_KEYS, *MESSAGE_KEYS})

# Mistral and DeepSeek call the reply that generation goes on with `prefix`, Kimi `partial`.
_PREFIX_KEYS = ("prefix", "partial", "continue_final_message")

_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
_ALIASES = {
    "user": ("human",),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai", *_CALL_ROLES),
    "tool": ("observation", "function_response", "tool_response", "function"),
}
# `ipython` is Llama 3's name for tool, and its template reads it.
_ROLES = {role: role for role in ("system", "user", "assistant", "tool", "developer", "ipython")} | {
    alias: role for role, aliases in _ALIASES.items() for alias in aliases
}

_FIELD_OF_PART = {
    **dict.fromkeys(("reasoning", "thinking"), "reasoning_content"),
    **dict.fromkeys(("text", "input_text", "output_text"), "content"),
    "tool_call": "tool_calls",
}
# The order in which templates write a message's fields; parts in another order have no faithful form.
_FIELD_ORDER = ("reasoning_content", "content", "tool_calls")
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
_MEDIA = (
    "image",
    "image_url",
    "input_image",
    "audio",
    "input_audio",
    "audio_url",
    "video",
    "video_url",
    "file",
)


def message_list(value: Any, column: str, roles: Iterable[str] = ()) -> list[Message]:
    """The messages of a column, a list or the JSON of one; at least one. `roles`: further ones that are allowed."""
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        fix = 'write [{"role": "user", "content": ...}, ...]; columns of plain text are named with x= and y= (--x, --y)'
        what = f"the text {value!a:.60} where a list of messages belongs"
        raise RowError(what, reason="wrong_type", field=column, fix=fix)
    messages = as_list(from_json(value, column), column)
    if not messages:
        raise RowError("there are no messages", reason="empty_messages", field=column)
    return [one_message(m, f"{column}[{i}]", roles) for i, m in enumerate(messages)]


def tool_list(value: Any, column: str = "tools") -> list[dict[str, Any]] | None:
    """Tools as a list of {"type": "function", "function": ...}, from a list or its JSON; None for none."""
    tools = as_list(from_json(value, column), column) if value is not None else []
    return json_value([_tool(t, f"{column}[{i}]") for i, t in enumerate(tools)], column) or None


def unread_keys(messages: Iterable[Message], template: str) -> list[str]:
    """Keys of messages that neither ygivenx nor a template of this source reads, in alphabetical order."""
    keys = {key for m in messages for key in m} - READ_KEYS
    return sorted(key for key in keys if not re.search(rf"\b{re.escape(key)}\b", template))


def _tool(value: Any, at: str) -> dict[str, Any]:
    tool = as_object(value, at)
    if isinstance(tool.get("function"), Mapping):
        return tool
    if "name" in tool:
        return {
            "type": "function",
            # The "type" of the wrapper goes; a tool that has another type of its own keeps it.
            "function": {k: v for k, v in tool.items() if (k, v) != ("type", "function")},
        }
    if "type" in tool:  # a tool of the provider's, such as a code interpreter
        return tool
    raise RowError("a tool without a name", reason="missing_field", field=f"{at}.name")


def one_message(value: Any, at: str, roles: Iterable[str] = ()) -> Message:
    """A message in the one form, from any of its forms; `at` is its place in the row."""
    # Columnar files fill every key that any other message has with null.
    m = {k: v for k, v in as_object(value, at).items() if v is not None or k in ("content", "value")}
    m = _with_role(m, at, roles)
    for key in _TEXT_KEYS:
        if key in m:
            text(m[key], f"{at}.{key}")
    if isinstance(m.get("content"), list):
        m = _join_parts(m, at)
    if len(thoughts := [k for k in _THOUGHTS if k in m]) > 1 and agreed(m, thoughts, at):
        m = {k: v for k, v in m.items() if v or k not in thoughts}  # an empty one would hide the other
    m = _with_prefix(weighted(_with_calls(m, at), at), at)
    _check_content(m, at)
    for key in m.keys() - _CHECKED:
        encodable({key: m[key]}, at)
    return m


def _check_content(m: Message, at: str) -> None:
    for key in MEDIA_KEYS:
        if m.get(key):
            raise not_text(f"the key {key!r} holds what isn't text", f"{at}.{key}")
    if m.get("content") is not None:
        text(m["content"], f"{at}.content")
    elif "tool_calls" not in m:
        what, why = "the content is null or missing", "only a message that calls tools may have none"
        raise RowError(what, reason="null_content", field=f"{at}.content", why=why)


# --- roles -----------------------------------------------------------------------------------------------


def _with_role(m: Message, at: str, roles: Iterable[str]) -> Message:
    """The message with a role that templates know, from `role` and `content` or ShareGPT's `from` and `value`."""
    role_key = "role" if "role" in m or "from" not in m else "from"
    if role_key not in m:
        raise RowError("the message has no role", reason="missing_role", field=f"{at}.role")
    name = text(m.pop(role_key), f"{at}.{role_key}")
    content_key = (
        "value" if "value" in m and (m["value"] or "content" not in m) and not m.get("content") else "content"
    )
    agreed(m, ("content", "value"), at)
    if role_key == "from" and m.get(content_key) is None:
        raise RowError("the value is null or missing", reason="null_content", field=f"{at}.{content_key}")
    if content_key == "value":
        m["content"] = text(m.pop("value"), f"{at}.value")
    m = {"role": _role(name, f"{at}.{role_key}", roles), **m}
    if isinstance(sender := m.get("from"), str) and sender in _ROLES:  # else it names who spoke
        agreed({"role": m["role"], "from": _ROLES[sender]}, ("role", "from"), at)
    if name.lower() in _CALL_ROLES and "tool_calls" not in m:
        calls = from_json(m.get("content"), f"{at}.{content_key}")
        m |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return m


def _role(name: str, at: str, roles: Iterable[str]) -> str:
    if name in roles:
        return name
    role = _ROLES.get(name) or _ROLES.get(name.strip().lower())
    if role is None:
        what = f"unknown role {name!a:.60}{nearest(name.strip().lower(), _ROLES)}"
        fix = f"known: {', '.join(_ROLES)}; a role of the template's own is read with roles={[name]!a:.60}"
        why = "its message would become context that no model was trained on"
        raise RowError(what, reason="unknown_role", field=at, why=why, fix=fix)
    return role


def _with_prefix(m: Message, at: str) -> Message:
    """The message with `prefix: True` if it is a reply that generation goes on with."""
    given = {k: m.pop(k) for k in _PREFIX_KEYS if k in m}
    if not given:
        return m
    for key, value in given.items():
        if not isinstance(value, bool):
            raise RowError(f"{value!a:.60} isn't true or false", reason="wrong_type", field=f"{at}.{key}")
    if len(set(given.values())) > 1:
        what = f"{' and '.join(given)} contradict each other"
        raise RowError(
            what, reason="conflict", field=f"{at}.{next(iter(given))}", fix="leave the right one of them"
        )
    if not any(given.values()):
        return m
    if m["role"] != "assistant":
        what, why = f"{next(iter(given))} in a message of the {m['role']}", "only a reply can be continued"
        raise RowError(what, reason="conflict", field=f"{at}.{next(iter(given))}", why=why)
    return {**m, "prefix": True}


# --- parts -----------------------------------------------------------------------------------------------


def _join_parts(m: Message, at: str) -> Message:
    """A list of typed parts as reasoning_content, content and tool_calls; without text the content is ""."""
    found: dict[str, list[Any]] = {"content": []}
    order, weights = [], []
    for i, given in enumerate(m["content"]):
        here = f"{at}.content[{i}]"
        part = as_object(given, here)
        name, value = _part(part, here)
        weights.append((name, take_weight(part, here)))
        found.setdefault(name, []).append(value)
        order.append(_FIELD_ORDER.index(name))
    if any(a > b for a, b in pairwise(order)):
        what, why = (
            "parts in an order that no message has",
            "a template writes a message as reasoning, text, tool calls",
        )
        raise RowError(what, reason="part_order", field=f"{at}.content", why=why)
    if clash := [n for n in found if n != "content" and n in m]:
        what = f"{clash[0]} both as a part and as a field"
        raise RowError(what, reason="conflict", field=f"{at}.{clash[0]}")
    spans = _spans_of_parts(weights, found["content"], m, at)
    return m | {n: v if n == "tool_calls" else "".join(v) for n, v in found.items()} | spans


def _part(part: dict[str, Any], at: str) -> tuple[str, Any]:
    """The field of a message that a part belongs to, and its value."""
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _FIELD_OF_PART:
        if kind in _MEDIA:
            raise not_text(f"a part of type {kind!r}", at, "unknown_part")
        fix = f"known: {', '.join(_FIELD_OF_PART)}"
        raise RowError(f"unknown part of type {kind!a:.60}", reason="unknown_part", field=at, fix=fix)
    keys = ("value", "text", kind)
    value = agreed(part, keys, at) or next((part[k] for k in keys if part.get(k) is not None), None)
    name = _FIELD_OF_PART[kind]
    return name, from_json(value, at) if name == "tool_calls" else text(value, at)


def _spans_of_parts(
    weights: list[tuple[str, float | None]], texts: list[str], m: Message, at: str
) -> dict[str, Any]:
    """Parts with weights of their own as `spans` of the joined content."""
    if not any(weight is not None for _, weight in weights):
        return {}
    if any(weight is not None and name != "content" for name, weight in weights):
        fix = "give the message a weight, or leave reasoning or tool calls out by train="
        raise RowError(
            "only parts of text may have a weight", reason="bad_weight", field=f"{at}.content", fix=fix
        )
    if clash := [k for k in ("spans", "training_detail", "train_detail") if k in m]:
        raise RowError(f"{clash[0]} beside weights of parts", reason="conflict", field=f"{at}.{clash[0]}")
    stops = list(accumulate(map(len, texts)))
    of_text = [1.0 if weight is None else weight for name, weight in weights if name == "content"]
    starts = [0, *stops[:-1]]
    spans = zip(starts, stops, of_text, strict=True)
    return {"spans": [{"start": a, "stop": b, "weight": w} for a, b, w in spans]}


def not_text(what: str, at: str, reason: str = "not_text") -> RowError:
    """Images, audio and video: a text model can't be trained on what it isn't shown."""
    why = "only text is encoded: the model would be trained to answer without having seen it"
    return RowError(what, reason=reason, field=at, why=why, fix="keep such rows for a multimodal trainer")


# --- tool calls ------------------------------------------------------------------------------------------


def _with_calls(m: Message, at: str) -> Message:
    """Tool calls in one form; OpenAI's older `function_call` becomes today's."""
    if "function_call" in m:
        if "tool_calls" in m:
            raise RowError("function_call beside tool_calls", reason="conflict", field=f"{at}.function_call")
        m["tool_calls"] = [m.pop("function_call")]
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

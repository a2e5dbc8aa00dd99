"""Rows of text as nouns: each function takes a row and the columns that its format requires."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..errors import RowError
from .columns import Record, given, is_continued, json_column, refuse_other_meanings
from .messages import message_list, tool_list
from .nouns import Conversation, Message, Pair
from .values import as_list, as_object, text
from .weights import ROW_KEYS, row_weight

_FOR_A_TEMPLATE = ("tools", "functions", "documents", "chat_template_kwargs", "continue_final_message")
TEMPLATE_COLUMNS = (*_FOR_A_TEMPLATE, *ROW_KEYS)


def of_messages(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Conversation:
    """A column of messages, OpenAI's or ShareGPT's."""
    refuse_other_meanings(row)
    return conversation_of(row, required[0], roles)


def conversation_of(row: Record, column: str, roles: Iterable[str] = ()) -> Conversation:
    """The conversation of a column, whatever other columns say of it."""
    messages = message_list(row[column], column, roles)
    system = system_message(row)
    if system and messages[0]["role"] == "system":
        why = f"{column} begins with one"
        raise RowError("a second system message", reason="conflict", field="system", why=why)
    return conversation(system + messages, row)


def of_prompt_completion(
    row: Record, required: tuple[str, ...], roles: Iterable[str] = ()
) -> Conversation | Pair:
    """A prompt and a completion, both texts or both messages."""
    refuse_other_meanings(row)
    return joined(row, required[0], required[1], roles)


def joined(row: Record, x: str, y: str, roles: Iterable[str] = ()) -> Conversation | Pair:
    """The prompt of column x with the reply of column y: both texts, or both messages."""
    if any(isinstance(row[c], str) or row[c] is None for c in (x, y)):
        for column in _FOR_A_TEMPLATE:
            if given(row, column):
                why = "a text prompt has no template that could use it: it would be dropped"
                raise RowError(f"{column} beside a text prompt", reason="conflict", field=column, why=why)
        return Pair(text(row[x], x), text(row[y], y), row_weight(row))
    prompt, completion = (message_list(row[c], c, roles) for c in (x, y))
    return conversation(as_context(prompt, completion, y), row)


def as_context(prompt: list[Message], completion: list[Message], column: str) -> list[Message]:
    """Prompt and completion as one list of messages, of which only the completion is y.

    A reply that the prompt begins and the completion goes on with becomes one message, trained from where the
    completion begins.
    """
    context = [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in prompt]
    if not (prompt and completion and prompt[-1].get("prefix")):
        return context + completion
    begun, rest = prompt[-1], completion[0]
    if (
        rest["role"] != "assistant"
        or begun.keys() & {"tool_calls", "spans"}
        or not isinstance(rest.get("content"), str)
    ):
        what = "the prompt ends in a reply to be continued, and the completion doesn't continue it"
        raise RowError(what, reason="conflict", field=f"{column}[0]")
    if "spans" in rest:
        raise RowError("spans in a continuation", reason="conflict", field=f"{column}[0].spans")
    start, content = len(begun["content"]), begun["content"] + rest["content"]
    spans = [{"start": start, "stop": len(content), "weight": 1.0}]
    whole = {k: v for k, v in begun.items() if k not in ("prefix", "weight")} | rest
    return [*context[:-1], {**whole, "content": content, "spans": spans}, *completion[1:]]


def of_alpaca(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Conversation:
    """An instruction with its input, and an output."""
    refuse_other_meanings(row)
    return conversation([*alpaca_prompt(row, required[0]), reply(text(row[required[1]], required[1]))], row)


def alpaca_prompt(row: Record, column: str) -> list[Message]:
    """The system message, the earlier turns, and the instruction with its input on a line of its own."""
    instruction, extra, messages = text(row[column], column), given(row, "input"), system_message(row)
    for i, turn in enumerate(as_list(given(row, "history") or [], "history")):
        at = f"history[{i}]"
        if len(as_list(turn, at)) != 2:
            what = f"{len(turn)} items where [question, answer] belongs"
            raise RowError(what, reason="wrong_type", field=at)
        messages += [user(text(turn[0], f"{at}[0]")), reply(text(turn[1], f"{at}[1]"))]
    return [*messages, user(instruction if extra is None else f"{instruction}\n{text(extra, 'input')}")]


def of_question_answer(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Conversation:
    """Two texts: what a user asks and what the assistant answers."""
    refuse_other_meanings(row, required)
    x, y = (text(row[c], c) for c in required)
    # Beside a question, `documents` are what it was drawn from, often as plain texts: no template's documents.
    others = {c: v for c, v in row.items() if c not in (*required, "documents")}
    return conversation([*system_message(others), user(x), reply(y)], others)


def of_pair(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Pair:
    """Two texts as the model reads them."""
    refuse_other_meanings(row, required)
    x, y = required
    return Pair(text(row[x], x), text(row[y], y), row_weight(row))


def of_text(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Pair:
    """One text, all of it y."""
    # A class beside a text is a label of that text, and there is no reply that it could judge.
    refuse_other_meanings(row, ("label",))
    return Pair("", text(row[required[0]], required[0]), row_weight(row))


def conversation(messages: list[Message], row: Record) -> Conversation:
    """Messages with what else the row has for its template; only the last one may be left open."""
    documents = as_list(json_column(row, "documents", []), "documents")
    for i, m in enumerate(messages[:-1]):
        if m.get("prefix"):
            why = "only the last message can be continued"
            raise RowError(
                "a reply to be continued in the middle",
                reason="conflict",
                field=f"messages[{i}].prefix",
                why=why,
            )
    prefix, continued = bool(messages[-1].pop("prefix", False)), is_continued(row)
    if prefix and continued is False:
        what, fix = "false, and the last reply has prefix: true", "leave the right one of them"
        raise RowError(what, reason="conflict", field="continue_final_message", fix=fix)
    is_open = prefix or bool(continued)
    if is_open and messages[-1]["role"] != "assistant":
        what = f"there is no reply to be continued: the last message is the {messages[-1]['role']}'s"
        raise RowError(what, reason="conflict", field="continue_final_message")
    return Conversation(
        tuple(messages),
        tools_of(row),
        [as_object(d, f"documents[{i}]") for i, d in enumerate(documents)] or None,
        as_object(json_column(row, "chat_template_kwargs", {}), "chat_template_kwargs"),
        row_weight(row),
        is_open,
    )


def tools_of(row: Record) -> list[dict[str, Any]] | None:
    """The tools of a row, which OpenAI's older files call functions."""
    columns = {c: row[c] for c in ("tools", "functions") if given(row, c) is not None}
    if len(columns) > 1:
        raise RowError("functions beside tools", reason="conflict", field="functions")
    return next((tool_list(value, column) for column, value in columns.items()), None)


def system_message(row: Record) -> list[Message]:
    """The system message of a row's `system` column; none without one."""
    value = given(row, "system")
    return [] if value is None else [{"role": "system", "content": text(value, "system")}]


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def reply(content: str) -> Message:
    """The assistant's message."""
    return {"role": "assistant", "content": content}


def weighing_one(noun: Conversation | Pair) -> Conversation | Pair:
    """The same without the row's weight, which its owner keeps."""
    return replace(noun, weight=1.0)

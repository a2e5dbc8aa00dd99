"""Rows whose replies are rated: one prompt, a better reply and a worse one, or several with a reward each.

| trainer                | columns                                              |
|------------------------|------------------------------------------------------|
| TRL                    | prompt, chosen, rejected: texts or messages          |
| TRL, implicit prompt   | chosen, rejected: whole conversations or texts       |
| LLaMA-Factory (Alpaca) | instruction (+ input, history), chosen, rejected     |
| LLaMA-Factory (ShareGPT) | conversations, chosen, rejected: one message each  |
| ms-swift               | messages with the better reply, rejected_response    |
| OpenAI                 | input, preferred_output, non_preferred_output        |
| best of n              | prompt, completions (responses, ...), rewards (scores, ratings): lists |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import RowError
from .columns import REJECTED, Record, refuse_other_meanings
from .converters import alpaca_prompt, as_context, conversation, conversation_of, joined, reply, weighing_one
from .messages import message_list
from .nouns import Conversation, Message, Pair, Preference, Rated
from .values import agreed, as_list, as_object, finite, from_json, text
from .weights import row_weight

RATINGS = ("rewards", "scores", "ratings")
# How hh-rlhf marks a reply inside one text.
_TURN = "\n\nAssistant:"


def of_chosen_rejected(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Preference:
    """TRL's: a prompt with two completions; messages of one completion are a list or, elsewhere, one object."""
    prompt, *replies = required
    chosen, rejected = (joined({**row, c: _listed(row[c])}, prompt, c, roles) for c in replies)
    return _preference(chosen, rejected, row)


def of_implicit_prompt(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Preference:
    """Two whole conversations or texts; what they begin with in common is the prompt."""
    chosen, rejected = (from_json(row[c], c) if _is_json(row[c]) else row[c] for c in required)
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = _border(text(chosen, required[0]), text(rejected, required[1]))
        return _preference(Pair(chosen[:at], chosen[at:]), Pair(rejected[:at], rejected[at:]), row)
    better, worse = (message_list(row[c], c, roles) for c in required)
    stop = _common(better, worse)
    if stop == 0:
        why = "they have no message in common, so that there is no prompt"
        raise RowError(
            "two conversations, not two replies to one", reason="conflict", field=required[1], why=why
        )
    return _preference(
        _side(better[:stop], better[stop:], row, required[0]),
        _side(worse[:stop], worse[stop:], row, required[1]),
        row,
    )


def of_instruction(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Preference:
    """LLaMA-Factory's Alpaca rows."""
    prompt = alpaca_prompt(row, required[0])
    chosen, rejected = (conversation([*prompt, reply(text(row[c], c))], row) for c in required[1:])
    return _preference(chosen, rejected, row)


def of_conversations(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Preference:
    """LLaMA-Factory's ShareGPT rows: a prompt of messages, one message for each reply."""
    column, *replies = required
    chosen, rejected = (joined({**row, c: _listed(row[c])}, column, c, roles) for c in replies)
    return _preference(chosen, rejected, row)


def of_rejected_response(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Preference:
    """ms-swift's: the messages end in the better reply; the worse one stands in a column of its own."""
    messages, column = required
    chosen = conversation_of(row, messages, roles)
    last = chosen.messages[-1]
    if last["role"] != "assistant":
        raise RowError("the messages don't end in the better reply", reason="conflict", field=messages)
    value = _listed(row[column])
    worse = [reply(value)] if isinstance(value, str) else message_list(value, column, roles)
    prompt = list(chosen.messages[:-1])
    return _preference(_side(prompt, [last], row, messages), _side(prompt, worse, row, column), row)


def of_preferred_output(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Preference:
    """OpenAI's: the input is an object with messages and tools."""
    column, *replies = required
    given = as_object(from_json(row[column], column), column)
    if "messages" not in given:
        raise RowError("the input has no messages", reason="missing_field", field=f"{column}.messages")
    whole: Record = dict(row) | {k: given[k] for k in ("tools", "functions") if k in given}
    prompt = message_list(given["messages"], f"{column}.messages", roles)
    chosen, rejected = (_side(prompt, message_list(row[c], c, roles), whole, c) for c in replies)
    return _preference(chosen, rejected, row)


def of_rated(row: Record, required: tuple[str, ...], roles: Iterable[str] = ()) -> Rated:
    """Best of n: a prompt, a list of replies (texts, messages or lists of them), and a number for each."""
    refuse_other_meanings(row)
    prompt, column, ratings = required
    agreed(row, RATINGS, read=lambda c: from_json(row[c], c))
    replies, rewards = (as_list(from_json(row[c], c), c) for c in (column, ratings))
    if not replies or len(replies) != len(rewards):
        raise RowError(
            f"{len(rewards)} rewards for {len(replies)} replies", reason="wrong_length", field=ratings
        )
    whole = [_to_rate(row, prompt, value, f"{column}[{i}]", roles) for i, value in enumerate(replies)]
    numbers = tuple(finite(value, f"{ratings}[{i}]") for i, value in enumerate(rewards))
    names = tuple(f"{column}[{i}]" for i in range(len(replies)))
    return Rated(tuple(map(weighing_one, whole)), numbers, row_weight(row), names)


def _to_rate(row: Record, prompt: str, value: Any, at: str, roles: Iterable[str]) -> Conversation | Pair:
    """A prompt with one of its replies."""
    if prompt == "prompt":
        is_chat = isinstance(row[prompt], list)
        value = [reply(value)] if is_chat and isinstance(value, str) else _listed(value)
        return joined({**row, at: value}, prompt, at, roles)
    context = message_list(row[prompt], prompt, roles) if prompt == "messages" else alpaca_prompt(row, prompt)
    completion = [reply(value)] if isinstance(value, str) else message_list(_listed(value), at, roles)
    return _side(context, completion, row, at)


def _preference(chosen: Conversation | Pair, rejected: Conversation | Pair, row: Record) -> Preference:
    refuse_other_meanings(row, REJECTED)
    agreed(row, REJECTED)
    return Preference(weighing_one(chosen), weighing_one(rejected), row_weight(row))


def _side(prompt: list[Message], completion: list[Message], row: Record, column: str) -> Conversation:
    if not completion:
        raise RowError("there is no reply after the prompt", reason="empty_messages", field=column)
    return conversation(as_context([dict(m) for m in prompt], completion, column), row)


def _border(chosen: str, rejected: str) -> int:
    """Where the replies of two dialogues begin, as hh-rlhf writes them.

    0 for other texts: all of them is y then. What both begin with cancels in any difference of log Pr, and a cut inside
    a word would put the border inside a token.
    """
    at = chosen.rfind(_TURN) + len(_TURN)
    return at if at >= len(_TURN) and chosen[:at] == rejected[:at] else 0


def _common(a: list[Message], b: list[Message]) -> int:
    """How many messages two conversations begin with in common, a last reply apart."""
    n = 0
    # The last message of either is its reply, even where both say the same.
    while n < min(len(a), len(b)) - 1 and a[n] == b[n]:
        n += 1
    return n


def _listed(value: Any) -> Any:
    """One message as a list of one."""
    return [value] if isinstance(value, dict) else value


def _is_json(value: Any) -> bool:
    # A reply may begin with a bracket of its own: only a list of objects is taken for messages.
    return isinstance(value, str) and value.lstrip().startswith("[{")

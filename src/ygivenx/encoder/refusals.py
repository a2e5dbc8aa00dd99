"""Refusals in the user's words, and which option, tried on the very row, would take it."""

from __future__ import annotations

from ..errors import RowError
from .tokens import Encoded, across


def control_text(token: str, path: str, why: str = "") -> RowError:
    """A special token in a row's text."""
    return RowError(
        f"{token!r} is a control token of the tokenizer, written in the row's text",
        reason="control_text",
        field=path,
        why=why or "parsed, it would forge the structure of the conversation",
        fix="control='text' encodes it as ordinary text, control='parse' as the token; or mend the row",
    )


def straddle(encoded: Encoded, at: int, field: str) -> RowError:
    """A token across the border of x and y, or white space before it that is split otherwise if a word follows."""
    if (k := across(encoded, at)) is not None:
        token = repr(encoded.text[encoded.starts[k] : encoded.stops[k]])
        what = f"the token {token} holds the end of x and the beginning of y"
    else:
        what = "the ids of x aren't a prefix of the ids of x and y together"
    return RowError(
        what,
        reason="straddling_token",
        field=field,
        why="inference shows x encoded alone: the model would be trained on ids that it never sees",
        fix="border='split' encodes x and y apart, border='mask' leaves a token that holds both out of y, "
        "border='refuse' (the default) keeps such rows out",
    )


def not_json(path: str) -> RowError:
    """Arguments of a call as Python prints them."""
    return RowError(
        "the template writes these arguments as Python prints them",
        reason="not_json",
        field=path,
        why="a model would be trained on calls that no parser reads",
        fix="repair='arguments_as_text' gives them as JSON text, or give a template that writes JSON",
    )


def dropped(path: str, of: str = "a reply") -> RowError:
    """A part that would be trained, and is left out."""
    return RowError(
        f"the template leaves out this part of {of} that would be trained",
        reason="dropped_field",
        field=path,
        why="the model would be trained to answer without it",
        fix="give a template that writes it, remove the field, or dropped='warn'",
    )


def dropped_message(i: int, role: str) -> RowError:
    """A whole message of x that is left out."""
    return RowError(
        f"the template leaves out this whole message of the {role}",
        reason="dropped_field",
        field=f"messages[{i}]",
        why="the model would be trained to answer without having seen it",
        fix="give a template that writes it, remove the message, or dropped='warn'",
    )


def unfaithful(path: str) -> RowError:
    """A repair after which a text isn't the row's."""
    return RowError(
        "written so, the template changes what this text says",
        reason="changed_text",
        field=path,
        why="the model would be trained on another text than the row has",
    )

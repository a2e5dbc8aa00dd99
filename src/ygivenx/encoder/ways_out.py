"""Ways out of a refusal: options of the encoder that were tried on the very row, and take it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import RowError
from ..rows.nouns import Conversation
from ..templating.inputs import inputs_of
from .chats import Chats
from .policy import Options
from .repairs import SWITCH

_NAMED_REPAIRS = ("append_end", "developer_as_system", "system_as_user")
# What is worth a trial, the least change first, where a template doesn't take a row as it is; and for other reasons.
_OF_TEMPLATES: tuple[tuple[str, str], ...] = (
    ("thoughts", "off"),
    ("thoughts", "empty"),
    *(("repair", name) for name in _NAMED_REPAIRS),
    ("template_kwargs", ""),  # each switch of the template's
    ("dropped", "warn"),
    ("context", "rendered"),
)
_OF_REASON: dict[str, tuple[tuple[str, str], ...]] = {
    "straddling_token": (*_OF_TEMPLATES[:2], ("border", "split"), ("border", "mask")),
    "control_text": (("control", "text"),),
    "no_origins": (("control", "parse"),),
    "too_long": (("overflow", "drop_turns"), ("overflow", "drop_reply"), ("overflow", "truncate")),
    **dict.fromkeys(
        (
            "not_continued", "no_thought", "no_end_of_turn", "no_prompt", "stop_inside", "dropped_field",
            "changed_text", "not_json", "template_error",
        ),
        _OF_TEMPLATES,
    ),
}  # fmt: skip
# What they say to do is no option that could be tried: to mend the row, or to name a stop.
_MENDED_OTHERWISE = ("stop_inside", "no_end_of_turn", "no_prompt", "template_error")
_ENOUGH = 2  # ways that a refusal names
_TRIALS = 100  # rows of one reason with which everything is tried; then what helped one of them


class WaysOut:
    """Tries options on refused rows; an encoder for each is made once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._chats: dict[str, Chats] = {}
        self._plain = Chats(options)
        self._rows: Counter[str] = Counter()  # refused rows by reason
        self._helped: set[tuple[str, str]] = set()  # reason and way

    def named(self, row: Any, refusal: RowError) -> RowError:
        """The refusal with the options that take this row, or with the word that none does."""
        ways = _OF_REASON.get(refusal.reason)
        if ways is None or not isinstance(row, Conversation):
            return refusal
        self._rows[refusal.reason] += 1
        found = list(self._taking(row, refusal.reason, self._spelled(row, ways)))
        if found:
            own = f"; or {refusal.fix}" if refusal.reason in _MENDED_OTHERWISE else ""
            refusal.fix = f"{' or '.join(found)} (tried: takes this row){own}"
        else:
            rest = f": {refusal.fix}" if refusal.fix else ""
            refusal.fix = f"of the encoder's options none that was tried takes this row{rest}"
        return refusal

    def _taking(self, row: Conversation, reason: str, ways: Mapping[str, dict[str, Any]]) -> Iterator[str]:
        count = 0
        for spelled, change in ways.items():
            if self._rows[reason] > _TRIALS and (reason, spelled) not in self._helped:
                continue
            if spelled not in self._chats:
                self._chats[spelled] = Chats(replace(self.options, **change))
            try:
                self._chats[spelled].sequences(row)
            except RowError:
                continue
            self._helped.add((reason, spelled))
            yield spelled
            count += 1
            if count == _ENOUGH:
                return

    def _spelled(self, row: Conversation, ways: tuple[tuple[str, str], ...]) -> dict[str, dict[str, Any]]:
        """Each way as a caller would write it, with what it changes in the options."""
        changes: dict[str, dict[str, Any]] = {}
        for name, value in ways:
            if name == "repair":
                changes[f"repair='default,{value}'"] = {"repairs": self.options.repairs | {value}}
            elif name == "template_kwargs":
                for setting in self._settings(row):
                    kwargs = {**self.options.template_kwargs, **setting}
                    changes[f"template_kwargs={setting}"] = {"template_kwargs": kwargs}
            else:
                changes[f"{name}={value!r}"] = {name: value}
        return changes

    def _settings(self, row: Conversation) -> Iterator[dict[str, Any]]:
        """Each switch of the template's about thinking with each of its values that the template names."""
        o = self.options
        own = {**o.template_kwargs, **row.template_kwargs}
        inputs = inputs_of(row.messages, row.tools, row.documents, own, o.now)
        try:
            template = self._plain.template(inputs)
        except RowError:
            return
        for name in sorted(n for n in template.undeclared - own.keys() if SWITCH.search(n)):
            of_name = re.findall(
                rf"\b{re.escape(name)}\b(?: not)?\s*(?:==|in)\s*\[?([^\]%}}]*)", template.source
            )
            words = dict.fromkeys(re.findall(r"""['"](\w+)['"]""", " ".join(of_name)))
            yield from ({name: value} for value in [*words] or [False, True])

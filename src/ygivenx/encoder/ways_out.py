"""Ways out of a refusal: options of the encoder that were tried on the very row, and take it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import RowError
from ..rows.nouns import Conversation
from .chats import Chats
from .policy import Options

_THOUGHTS = tuple({"thoughts": value} for value in ("off", "empty"))
_REPAIRS = tuple({"repair": name} for name in ("append_end", "developer_as_system", "system_as_user"))
# What is worth a trial, by the reason of the refusal, the least change first.
_WAYS: dict[str, tuple[dict[str, str], ...]] = {
    "straddling_token": (*_THOUGHTS, {"border": "split"}, {"border": "mask"}),
    "not_continued": (*_THOUGHTS, *_REPAIRS, {"context": "rendered"}),
    "no_end_of_turn": (*_REPAIRS, {"context": "rendered"}),
    "no_prompt": ({"context": "rendered"},),
    "dropped_field": (*_REPAIRS, {"dropped": "warn"}),
    "changed_text": ({"dropped": "warn"},),
    "no_thought": (*_THOUGHTS, *_REPAIRS),
    "template_error": _REPAIRS,
    "control_text": ({"control": "text"},),
    "no_origins": ({"control": "parse"},),
    "too_long": ({"overflow": "drop_turns"}, {"overflow": "drop_reply"}, {"overflow": "truncate"}),
}
_ENOUGH = 2  # ways that a refusal names


class WaysOut:
    """Tries options on refused rows; an encoder for each is made once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._chats: dict[str, Chats] = {}

    def named(self, row: Any, refusal: RowError) -> RowError:
        """The refusal with the options that take this row, or with the word that none does."""
        ways = _WAYS.get(refusal.reason)
        if ways is None or not isinstance(row, Conversation):
            return refusal
        found = list(self._taking(row, ways))
        if found:
            refusal.fix = f"tried on this row, and takes it: {' or '.join(found)}"
        else:
            rest = f": {refusal.fix}" if refusal.fix else ""
            refusal.fix = f"of the encoder's options none that was tried takes this row{rest}"
        return refusal

    def _taking(self, row: Conversation, ways: tuple[dict[str, str], ...]) -> Iterator[str]:
        count = 0
        for way in ways:
            ((name, value),) = way.items()
            spelled = f"{name}={'default,' if name == 'repair' else ''}{value}".replace("=", "='", 1) + "'"
            try:
                self._chats_of(spelled, name, value).sequences(row)
            except RowError:
                continue
            yield spelled
            count += 1
            if count == _ENOUGH:
                return

    def _chats_of(self, spelled: str, name: str, value: str) -> Chats:
        if spelled not in self._chats:
            more: dict[str, Any] = {name: value}
            if name == "repair":
                more = {"repairs": self.options.repairs | {value}}
            self._chats[spelled] = Chats(replace(self.options, **more))
        return self._chats[spelled]
